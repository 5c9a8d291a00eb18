"""LongVideoBench (validation), with subtitles in the question: letters, by length of the clip.

Reads lvb_val.json, videos/ and subtitles/, as longvideobench/LongVideoBench has them. Published
code writes the word "[image]" for each frame and a subtitle after the frames that come before its
middle, if a frame falls into it; the pictures themselves all come in front.
"""

from pathlib import Path

from tlv.benchmarks.letters import LETTERS, ask_letter, score_letters
from tlv.benchmarks.question import Question, read_rows
from tlv.benchmarks.sampling import left_steps, sixteen
from tlv.video import VideoError, probe

MAX_NEW_TOKENS = 1024
KEYS = ("id", "video_path", "question", "candidates", "correct_choice", "duration",
        "subtitle_path", "starting_timestamp_for_subtitles")  # fmt: skip


def read(folder: Path, num_frames=sixteen) -> list[Question]:
    return [_question(folder, row, num_frames) for row in read_rows(folder / "lvb_val.json", KEYS)]


def _question(folder, row, num_frames) -> Question:
    def rule(num_total, fps):
        return left_steps(row["duration"], fps, num_frames(num_total, fps))

    media = f"videos/{row['video_path']}"
    try:
        info = probe(folder / media)
        times = rule(info.num_frames, info.fps) / info.fps  # (T,)
    except VideoError:  # of which the answer will say why it is none
        times = []
    subtitles = read_rows(folder / "subtitles" / row["subtitle_path"])
    told = interleave(times, subtitles, row["starting_timestamp_for_subtitles"], row["duration"])
    options = tuple(map(str, row["candidates"]))
    asked = ask_letter(f"question: \n{row['question']}", options, "{}. {}")
    return Question(row["id"], f"subtitles:{''.join(told)}\n{asked}", media,
                    LETTERS[row["correct_choice"]], options,
                    str(row.get("duration_group", "")), rule, query=row["question"])  # fmt: skip


def interleave(times, subtitles, offset: float, duration: float) -> list[str]:
    """"[image]" for each frame (at `times`, seconds), and the subtitles among them.

    offset: what to take from a subtitle's times; one shorter than a second counts as a second long.
    """
    told, shown = [], 0
    for subtitle in subtitles:
        start, end, text = _span(subtitle, duration)
        start, end = start - offset, end - offset
        middle = (start + end) / 2
        num_before = sum(time <= middle for time in times)
        told += ["[image]"] * max(0, num_before - shown)
        shown = max(shown, num_before)
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times):
            told.append(text)
    return told + ["[image]"] * (len(times) - shown)


def _span(subtitle, duration) -> tuple[float, float, str]:
    """Start, end and words, of both forms of subtitle files."""
    if "timestamp" in subtitle:
        start, end = subtitle["timestamp"]
        return start, end if isinstance(end, float) else duration, subtitle["text"]
    return _seconds(subtitle["start"]), _seconds(subtitle["end"]), subtitle["line"]


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


score = score_letters

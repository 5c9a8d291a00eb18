"""Asking a model all questions of a benchmark."""

import os
from pathlib import Path

import numpy as np

from tlv import answering
from tlv.benchmarks import (
    gqa,
    llava_wild,
    longvideobench,
    mlvu,
    mm_vet,
    mmbench,
    mme,
    mmmu,
    mmvu,
    mvbench,
    pope,
    science_qa,
    text_vqa,
    video_mme,
    vqa_v2,
)
from tlv.benchmarks.question import Question
from tlv.benchmarks.sampling import each_once
from tlv.selector import FRAME_S
from tlv.video import VideoError, probe, read_image
from tlv.video_child import read_chunks_within

BENCHMARKS = {
    "gqa": gqa, "llava_wild": llava_wild, "longvideobench": longvideobench, "mlvu": mlvu,
    "mm_vet": mm_vet, "mmbench": mmbench, "mme": mme, "mmmu": mmmu, "mmvu": mmvu,
    "mvbench": mvbench, "pope": pope, "science_qa": science_qa, "text_vqa": text_vqa,
    "video_mme": video_mme, "vqa_v2": vqa_v2,
}  # fmt: skip
FRAME_RATE = 3.0  # of folders of frames: MVBench's


def find(name: str):
    """A benchmark's module by its name."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is unknown; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def answer(model, processor, questions: list[Question], folder, *, batch_size: int = 1,
           max_new_tokens: int = 1024, progress=iter) -> list[answering.Answer]:  # fmt: skip
    """Greedy answers, every question asked alone, of the frames that the benchmark names.

    A clip that hangs or crashes the decoder costs its own answers alone.
    """
    folder, rules = Path(folder), {}
    once = {question.media for question in questions if question.each_once}

    def place(number, question):
        """What stands for the question's clip: its file, or with frames of its own, a name."""
        if question.frames is None or processor.selector is not None:
            return question.media
        rules[f"{question.media}#{number}"] = question
        return f"{question.media}#{number}"

    def frames_of(name):
        if name not in rules:
            clip = processor.sample(folder / name, FRAME_S)
            return each_once(clip) if name in once else clip.frames
        return read_chosen(folder / rules[name].media, rules[name].frames)

    asked = [
        {"video": place(number, question), "question": question.prompt, "query": question.query}
        for number, question in enumerate(questions)
    ]
    return answering.generate_answers(model, processor, asked, folder, batch_size=batch_size,
                                      max_new_tokens=max_new_tokens, frames_of=frames_of,
                                      progress=progress)  # fmt: skip


def read_chosen(path: Path, rule) -> np.ndarray:
    """The frames that `rule` chooses, of a clip or of a folder of pictures -> (T, H, W, 3)."""
    if not path.is_dir():
        info = probe(path)
        chosen = rule(info.num_frames, info.fps)
        numbers, places = np.unique(chosen, return_inverse=True)
        (frames,) = read_chunks_within(FRAME_S, path, numbers, size=len(numbers))
        return frames[places]
    pictures = sorted(path.glob("*.jpg"))
    if not pictures:
        raise VideoError(path, "no pictures in it; 00001.jpg ... are wanted")
    chosen = rule(len(pictures), FRAME_RATE)
    return np.concatenate([read_image(path / f"{number:05}.jpg") for number in chosen])


def as_test_questions(questions: list[Question], folder, videos_dir) -> list[dict]:
    """Multiple choice in the form that notebook 05 reads, its clips told from `videos_dir`.

    The notebook shows what the model samples: ValueError where a benchmark has frames of its own.
    """
    if any(not q.options or q.media is None or q.frames for q in questions):
        raise ValueError("notebook 05 asks multiple choice alone, about clips of which it samples "
                         "the frames: video_mme or mlvu")
    return [
        {"id": q.id, "video": os.path.relpath(Path(folder) / q.media, videos_dir),
         "type": q.group or "all", "form": "choice", "question": q.prompt, "answer": q.answer,
         "options": list(q.options), "unseen_pair": False}
        for q in questions
    ]  # fmt: skip

"""Video-MME without subtitles: letters, by length of the clip.

Reads videomme/test-00000-of-00001.parquet and data/{videoID}.mp4, as lmms-lab/Video-MME has them.
"""

from pathlib import Path

from tlv.benchmarks.letters import score_letters
from tlv.benchmarks.question import LETTER, Question, read_rows

MAX_NEW_TOKENS = 1024
TABLE = "videomme/test-00000-of-00001.parquet"


def read(folder: Path, num_frames=None) -> list[Question]:
    rows = read_rows(folder / TABLE, ("videoID", "question", "options", "answer", "duration"))
    return [
        Question(
            id=str(row.get("question_id", number)),
            prompt="\n".join([row["question"], *row["options"], LETTER]),
            media=f"data/{row['videoID']}.mp4",
            answer=row["answer"],
            # Published code cuts an option's last character off, and all after a full stop in it.
            options=tuple(option.partition(". ")[2] for option in row["options"]),
            group=row["duration"],
            each_once=True,
        )
        for number, row in enumerate(rows)
    ]


score = score_letters

"""MLVU's multiple choice (dev): letters, the mean of its seven tasks (M-Avg).

Reads json/{task}.json and video/{task}/..., as MLVU/MVLU has them.
"""

from pathlib import Path

from tlv.benchmarks.letters import LETTERS, ask_letter, score_letters
from tlv.benchmarks.question import Question, read_rows

MAX_NEW_TOKENS = 1024
TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco",
         "7_topic_reasoning")  # fmt: skip


def read(folder: Path, num_frames: int = 16) -> list[Question]:
    keys = ("video", "question", "candidates", "answer")
    return [
        Question(
            id=f"{task}/{number}",
            prompt=ask_letter(row["question"], row["candidates"]),
            media=f"video/{task}/{row['video']}",
            answer=LETTERS[row["candidates"].index(row["answer"])],
            options=tuple(row["candidates"]),
            group=task,
        )
        for task in TASKS
        for number, row in enumerate(read_rows(folder / f"json/{task}.json", keys))
    ]


def score(questions, answers) -> dict[str, float]:
    scores = score_letters(questions, answers)
    tasks = [value for name, value in scores.items() if name.startswith("accuracy/")]
    return scores | {"m_avg": sum(tasks) / len(tasks)}

"""MLVU's multiple choice (dev): letters, the mean of its seven tasks (M-Avg).

Reads json/{task}.json and video/{task}/..., as MLVU/MVLU has them.
"""

from dataclasses import replace
from pathlib import Path

from tlv.benchmarks.candidates import read_task
from tlv.benchmarks.letters import score_letters
from tlv.benchmarks.question import Question

MAX_NEW_TOKENS = 1024
TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco",
         "7_topic_reasoning")  # fmt: skip


def read(folder: Path, num_frames=None) -> list[Question]:
    return [replace(question, each_once=True) for task in TASKS
            for question in read_task(folder / f"json/{task}.json", f"video/{task}")]  # fmt: skip


def score(questions, answers) -> dict[str, float]:
    scores = score_letters(questions, answers)
    tasks = [value for name, value in scores.items() if name.startswith("accuracy/")]
    return scores | {"m_avg": sum(tasks) / len(tasks)}

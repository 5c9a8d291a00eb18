"""MLVU's multiple choice (dev): letters, the mean of its seven tasks (M-Avg).

Reads json/{task}.json and video/{task}/..., as MLVU/MVLU has them.
"""

from pathlib import Path

from tlv.benchmarks.letters import LETTERS, ask_letter, score_letters
from tlv.benchmarks.question import BenchmarkError, Question, read_rows

MAX_NEW_TOKENS = 1024
TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco",
         "7_topic_reasoning")  # fmt: skip


def read(folder: Path, num_frames=None) -> list[Question]:
    keys, questions = ("video", "question", "candidates", "answer"), []
    for task in TASKS:
        path = folder / f"json/{task}.json"
        for number, row in enumerate(read_rows(path, keys)):
            if row["answer"] not in row["candidates"]:
                raise BenchmarkError(f"{path}: row {number}: answer {row['answer']!r} is none of "
                                     f"the candidates {row['candidates']}")
            questions.append(Question(
                id=f"{task}/{number}",
                prompt=ask_letter(row["question"], row["candidates"]),
                media=f"video/{task}/{row['video']}",
                answer=LETTERS[row["candidates"].index(row["answer"])],
                options=tuple(row["candidates"]),
                group=task,
            ))  # fmt: skip
    return questions


def score(questions, answers) -> dict[str, float]:
    scores = score_letters(questions, answers)
    tasks = [value for name, value in scores.items() if name.startswith("accuracy/")]
    return scores | {"m_avg": sum(tasks) / len(tasks)}

"""Questions of MVBench and MLVU: rows with `candidates`, the words of one being the `answer`."""

from tlv.benchmarks.letters import LETTERS, ask_letter
from tlv.benchmarks.question import BenchmarkError, Question, read_rows

KEYS = ("video", "question", "candidates", "answer")


def read_task(path, media: str, rule_of=lambda row: None, more_keys=()) -> list[Question]:
    """The questions of one task's file, their clips below `media`.

    rule_of: which frames a row's question is about (`Question.frames`); more_keys: what it reads.
    """
    questions = []
    for number, row in enumerate(read_rows(path, (*KEYS, *more_keys))):
        if row["answer"] not in row["candidates"]:
            raise BenchmarkError(f"{path}: row {number}: answer {row['answer']!r} is none of the "
                                 f"candidates {row['candidates']}")
        questions.append(Question(
            id=f"{path.stem}/{number}",
            prompt=ask_letter(row["question"], row["candidates"]),
            media=f"{media}/{row['video']}",
            answer=LETTERS[row["candidates"].index(row["answer"])],
            options=tuple(map(str, row["candidates"])),
            group=path.stem,
            frames=rule_of(row),
        ))  # fmt: skip
    return questions

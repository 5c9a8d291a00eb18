"""Ask a model all questions of a benchmark: `python -m tlv.benchmarks NAME FOLDER --model DIR`.

Writes OUT/answers.jsonl, a line for each question in the form of LLaVA's scripts (ids as text), and
OUT/metrics.json; where others score, OUT/upload.json, and `--judged FILE` brings back what a judge
said. `--questions FILE` asks nothing and writes multiple choice about clips as notebook 05 reads
it. Which files FOLDER holds says each module, and data/README.md. Taught in notebook 05.
"""

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from tlv.arguments import to_count, to_device
from tlv.benchmarks import run
from tlv.benchmarks.question import BenchmarkError
from tlv.benchmarks.sampling import frames_of
from tlv.builders import load_model
from tlv.files import write_json, write_text
from tlv.pretrained import ModelFolderError
from tlv.video import VideoError

WORDS = "neither yes nor no, and no letter"  # an answer that every scorer has to look at


def ask_all(options) -> dict[str, float]:
    """Answer, write and score; the scores, empty where others give them."""
    benchmark, out = run.find(options.name), Path(options.out)
    model, processor = load_model(options.model, getattr(torch, options.dtype), what="--model")
    questions = read_questions(benchmark, options, frames_of(processor))
    shown = [question.media for question in questions if question.media is not None]
    if shown and not any((options.folder / media).exists() for media in shown):
        raise BenchmarkError(f"{options.folder / shown[0]}: no such file, nor any other that the "
                             "questions are about; the folder tree stands in data/README.md")
    results(benchmark, options, questions, [WORDS] * len(questions))  # what cannot be scored
    num_tokens = options.max_new_tokens or benchmark.MAX_NEW_TOKENS
    answers = run.answer(model.to(options.device), processor.to(options.device), questions,
                         options.folder, batch_size=options.batch_size,
                         max_new_tokens=num_tokens, progress=tqdm)  # fmt: skip
    texts = [one.text for one in answers]
    lines = [
        {"question_id": q.id, "prompt": q.prompt, "text": a.text, "answer_id": q.id,
         "model_id": Path(options.model).resolve().name, "metadata": {}, "answer": q.answer,
         "group": q.group, "error": a.error}
        for q, a in zip(questions, answers, strict=True)
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out / "answers.jsonl", text)
    upload, scores = results(benchmark, options, questions, texts)
    if upload is not None:
        write_json(out / "upload.json", upload)
    if num_unseen := sum(bool(one.error) for one in answers):
        print(f"tlv.benchmarks: {num_unseen} questions could not be asked, their answers are "
              f"empty; {out}/answers.jsonl says why", file=sys.stderr)  # fmt: skip
    if scores:
        counts = {"num_questions": len(questions), "num_errors": num_unseen}
        write_json(out / "metrics.json", counts | scores)
    return scores


def read_questions(benchmark, options, *num_frames) -> list:
    """The first `--limit` questions. Raises BenchmarkError for files of another form."""
    with published_form(options):
        questions = benchmark.read(options.folder, *num_frames)[: options.limit]
    if not questions:
        raise BenchmarkError(f"{options.folder}: no questions to ask")
    return questions


def results(benchmark, options, questions, texts) -> tuple:
    """What another is sent, or None, and the scores, or {}."""
    upload, scores = None, {}
    with published_form(options):
        if hasattr(benchmark, "upload"):
            upload = benchmark.upload(options.folder, questions, texts)
        if hasattr(benchmark, "score"):
            scores = benchmark.score(questions, texts)
    return upload, scores


@contextmanager
def published_form(options):
    """Name the folder where a row has another form than the code that reads it expects."""
    try:
        yield
    except (BenchmarkError, VideoError):
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise BenchmarkError(f"{options.folder}: a row is not as the published files of "
                             f"{options.name} have it: {type(error).__name__}: {error}") from error


def score_judged(options) -> dict[str, float]:
    """Score what a judge said, and write it."""
    benchmark = run.find(options.name)
    if not hasattr(benchmark, "score_judged"):
        raise ValueError(f"{options.name} has no judge; leave --judged out")
    questions = read_questions(benchmark, options)
    scores = benchmark.score_judged(questions, options.judged)
    write_json(Path(options.out) / "metrics.json", {"num_questions": len(questions), **scores})
    return scores


def main(arguments=None) -> int:
    """Run the command; 2 and one line on stderr if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m tlv.benchmarks",
                                     description=__doc__.split("\n")[0])  # fmt: skip
    parser.add_argument("name", help=", ".join(run.BENCHMARKS))
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="a checkpoint to ask")
    what.add_argument("--judged", type=Path, metavar="FILE", help="a judge's words to score")
    what.add_argument("--questions", type=Path, metavar="FILE", help="write them for notebook 05")
    parser.add_argument("--videos-dir", metavar="DIR", help="of the data card whose --questions "
                        "these are (default: FOLDER)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="default: outputs/scratch/benchmarks/NAME")
    parser.add_argument("--device", type=to_device, default="auto", help="auto, cpu, cuda ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch-size", type=to_count, default=1, metavar="N", help="published: 1")
    parser.add_argument("--max-new-tokens", type=to_count, metavar="N",
                        help="default: as published")
    parser.add_argument("--limit", type=to_count, metavar="N", help="the first N questions alone")
    options = parser.parse_args(arguments)
    options.out = options.out or f"outputs/scratch/benchmarks/{options.name}"
    try:
        if options.questions:
            questions = read_questions(run.find(options.name), options)
            clips = options.videos_dir or options.folder
            write_json(options.questions, run.as_test_questions(questions, options.folder, clips))
            print(f"{len(questions)} questions: {options.questions}")
            return 0
        scores = score_judged(options) if options.judged else ask_all(options)
    except (BenchmarkError, ModelFolderError, VideoError, ValueError, OSError) as error:
        print(f"tlv.benchmarks: {error}", file=sys.stderr)
        return 2
    for name, value in scores.items():
        print(f"{name:32}{value:10.4f}")
    if not scores:
        is_other = hasattr(run.find(options.name), "upload")
        sent = f"{options.out}/{'upload.json' if is_other else 'answers.jsonl'}"
        print(f"{options.name} is scored elsewhere: {sent} is what to send")
    return 0


if __name__ == "__main__":
    sys.exit(main())

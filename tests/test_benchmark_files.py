"""Files of published benchmarks as a user downloads them, and the command that asks all of one."""

import base64
import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tlv import video_child
from tlv.answering import Answer
from tlv.benchmarks import mme, run
from tlv.benchmarks.__main__ import main
from tlv.benchmarks.question import LETTER, SHORT, BenchmarkError, read_rows, read_table
from tlv.mp4 import write_video
from tlv.video import VideoError, probe, read_frames, sample_frames


def put(path, value, lines=False):
    """Write JSON, or a line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines
                    else json.dumps(value))  # fmt: skip


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def clip(path, num_frames=8, fps=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num_frames)
    write_video(path, rng.integers(0, 255, (num_frames, 20, 24, 3), dtype=np.uint8), fps=fps)


# ---- folders, in the published formats ------------------------------------------------------


def make_video_mme(folder):
    rows = [{"videoID": "abc", "question_id": f"1-{i}", "question": "Who?", "duration": "short",
             "options": ["A. Mr. Smith", "B. A cat."], "answer": "B"}
            for i in range(2)]  # fmt: skip
    (folder / "videomme").mkdir()
    pd.DataFrame(rows).to_parquet(folder / "videomme/test-00000-of-00001.parquet")
    clip(folder / "data/abc.mp4")


def four(num_total, fps) -> int:
    """A model that looks at four frames."""
    return 4


def make_mvbench(folder):
    for task, place in run.find("mvbench").TASKS.items():
        row = {"video": "a.mp4", "question": "What?", "answer": "up", "candidates": ["up", "no"]}
        if task == "episodic_reasoning":
            row |= {"video": "show_01", "start": 1.0, "end": 3.0}
            for number in range(1, 13):
                picture(folder / f"video/{place}/show_01/{number:05}.jpg", number)
        else:
            clip(folder / f"video/{place}/a.mp4")
        put(folder / f"json/{task}.json", [row])


def make_longvideobench(folder):
    row = {"id": "x_0", "video_path": "x.mp4", "question": "What?", "candidates": ["a", "b"],
           "correct_choice": 1, "duration": 3.0, "duration_group": 15, "subtitle_path": "x.json",
           "starting_timestamp_for_subtitles": 0.0}  # fmt: skip
    put(folder / "lvb_val.json", [row])
    put(folder / "subtitles/x.json", [{"timestamp": [0.5, 1.5], "text": "hello"}])
    clip(folder / "videos/x.mp4", 12)


def make_mlvu(folder):
    for task in run.find("mlvu").TASKS:
        put(folder / f"json/{task}.json", [{"video": "v.mp4", "question": "What?", "answer": "b",
                                            "candidates": ["a", "b"]}])  # fmt: skip
        clip(folder / f"video/{task}/v.mp4")


def make_mmvu(folder):
    hub = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/1.mp4"
    put(folder / "validation.json", [
        {"id": "v0", "question_type": "multiple-choice", "question": "What?", "answer": "A",
         "choices": {"A": "red", "B": "blue"}, "video": hub},
        {"id": "v1", "question_type": "open-ended", "question": "Why?", "answer": "heat",
         "choices": {}, "video": hub}])  # fmt: skip
    clip(folder / "videos/Art/1.mp4")


def make_pope(folder):
    for place, category in enumerate(("random", "popular", "adversarial")):
        put(folder / f"coco/coco_pope_{category}.json",
            [{"question_id": k, "label": "no" if k else "yes"} for k in range(2)], lines=True)
        rows = [{"question_id": 2 * place + k, "image": "a.jpg", "category": category,
                 "text": f"Is there a dog?\n{SHORT}"} for k in range(2)]  # fmt: skip
        with open(folder / "llava_pope_test.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    picture(folder / "val2014/a.jpg")


def make_mme(folder):
    release = folder / mme.RELEASE
    for subtask, images, texts in (("color", "", ""), ("OCR", "images/", "questions_answers_YN/")):
        picture(release / subtask / images / "0001.png")
        path = release / subtask / texts / "0001.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("Is it red? Please answer yes or no.\tYes\n"
                        "Is it blue? Please answer yes or no.\tNo\n")  # fmt: skip
    put(folder / "llava_mme.jsonl", [
        {"question_id": f"{subtask}/0001.png", "image": f"{subtask}/0001.png",
         "text": f"Is it {colour}?\n{SHORT}"}
        for subtask in ("color", "OCR") for colour in ("red", "blue")], lines=True)  # fmt: skip


def make_text_vqa(folder):
    put(folder / "TextVQA_0.5.1_val.json",
        {"data": [{"image_id": "a", "question": "What Sign?", "answers": ["stop"] * 10}]})
    put(folder / "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "a", "image": "a.jpg",
         "text": f"What sign?\nReference OCR token: stop\n{SHORT}"}], lines=True)  # fmt: skip
    picture(folder / "train_images/a.jpg")


def make_vqa_v2(folder):
    rows = [{"question_id": k, "image": "a.jpg", "text": f"What?\n{SHORT}"} for k in (1, 2, 3)]
    put(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2], lines=True)
    put(folder / "llava_vqav2_mscoco_test2015.jsonl", rows, lines=True)
    picture(folder / "test2015/a.jpg")


def make_gqa(folder):
    put(folder / "testdev_balanced_questions.json", {"07": {"answer": "red"}})
    put(folder / "llava_gqa_testdev_balanced.jsonl",
        [{"question_id": "07", "image": "a.jpg", "text": f"What?\n{SHORT}"}], lines=True)
    picture(folder / "images/a.jpg")


def make_science_qa(folder):
    put(folder / "problems.json", {"4": {"answer": 1, "choices": ["a", "b"]},
                                   "5": {"answer": 0, "choices": ["a", "b"]}})  # fmt: skip
    put(folder / "llava_test_CQM-A.json", [
        {"id": "4", "image": "4/image.png",
         "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. a\nB. b"}]},
        {"id": "5", "conversations": [{"from": "human", "value": "Which?\nA. a\nB. b"}]},
    ])  # fmt: skip
    picture(folder / "images/test/4/image.png")


def make_mmmu(folder):
    put(folder / "anns_for_eval.json", [
        {"id": "validation_Art_1", "prompt": "<image>\nWho?\nA. x\nB. y", "image": "1.png",
         "question_type": "multiple-choice", "all_choices": ["A", "B"],
         "index2ans": {"A": "x", "B": "y"}},
        {"id": "validation_Art_2", "prompt": "How many?", "question_type": "short-answer"},
    ])  # fmt: skip
    put(folder / "eval/answer_dict_val.json", {
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Art_2": {"question_type": "short-answer", "ground_truth": ["2", "two"]},
    })  # fmt: skip
    picture(folder / "all_images/1.png")


def make_mmbench(folder):
    data = io.BytesIO()
    Image.new("RGB", (24, 20), (200, 10, 10)).save(data, "jpeg")
    rows = [("3", "a hint", "Which?", "up", "down", "", "", "A", "act", data.getvalue()),
            ("1000003", "a hint", "Which?", "down", "up", "", "", "B", "act", b"")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["index", "hint", "question", *"ABCD", "answer", "category",
                                        "image"])  # fmt: skip
    table["image"] = [base64.b64encode(data.getvalue()).decode(), "3"]
    table.to_csv(folder / "mmbench_dev_20230712.tsv", sep="\t", index=False)


def make_mm_vet(folder):
    put(folder / "mm-vet.json", {"v1_0": {"answer": "a<OR>b", "capability": ["ocr", "rec"]}})
    put(folder / "llava-mm-vet.jsonl", [{"question_id": "v1_0", "image": "v1_0.png", "text": "X?"}],
        lines=True)  # fmt: skip
    picture(folder / "images/v1_0.png")


def make_llava_wild(folder):
    put(folder / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "text": "Describe.",
                                      "category": "llava_bench_detail"}], lines=True)  # fmt: skip
    picture(folder / "images/001.jpg")


MAKERS = {name.removeprefix("make_"): make for name, make in globals().items()
          if name.startswith("make_")}  # fmt: skip


@pytest.fixture(params=run.BENCHMARKS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    MAKERS[name](tmp_path)
    return tmp_path


def test_every_benchmark_is_read_and_right_answers_are_right(name, folder):
    benchmark = run.find(name)
    questions = benchmark.read(folder, four)
    assert len({q.id for q in questions}) == len(questions) or name in ("mme",)
    for question in questions:
        assert "<image>" not in question.prompt and question.prompt.strip()
        assert question.media is None or (folder / question.media).exists()
    truths = [q.answer[0] if isinstance(q.answer, list) else q.answer for q in questions]
    if hasattr(benchmark, "score"):
        scores = benchmark.score(questions, truths)
        best = {"mme": 200.0, "pope": 1.0}.get(name, 1.0)
        key = "perception" if name == "mme" else "accuracy"
        assert scores[key] == pytest.approx(best * (2 if name == "mme" else 1))
        wrong = benchmark.score(questions, ["?"] * len(questions))
        assert wrong[key] == (1.5 / 3 if name == "pope" else 0.0)


def test_the_published_words(tmp_path):
    def first(name, number=0):
        folder = tmp_path / name
        folder.mkdir()
        MAKERS[name](folder)
        return run.find(name).read(folder, four)[number]

    assert first("video_mme").prompt == f"Who?\nA. Mr. Smith\nB. A cat.\n{LETTER}"
    assert first("mvbench").prompt == f"What?\n(A) up\n(B) no\n{LETTER}"
    assert first("longvideobench").prompt == (
        f"subtitles:[image][image]hello[image]\nquestion: \nWhat?\nA. a\nB. b\n{LETTER}")
    assert first("mmvu", 1).prompt == "Why?\nAnswer the question directly without explanation."
    assert first("mmbench").prompt == f"a hint\nWhich?\nA. up\nB. down\n{LETTER}"
    assert first("science_qa").prompt == f"Which?\nA. a\nB. b\n{LETTER}"


def test_frames_are_those_that_a_benchmark_names(tmp_path):
    make_mvbench(tmp_path)
    questions = {q.group: q for q in run.find("mvbench").read(tmp_path, four)}
    shown = questions["episodic_reasoning"]
    chosen = shown.frames(12, 3.0)  # seconds 1 to 3 at three a second, the first being 1
    assert chosen.tolist() == [3, 5, 6, 7]
    frames = run.read_chosen(tmp_path / shown.media, shown.frames)
    for frame, number in zip(frames, chosen, strict=True):
        with Image.open(tmp_path / shown.media / f"{number:05}.jpg") as wanted:
            assert np.array_equal(frame, np.asarray(wanted))
    assert questions["action_sequence"].frames is None  # published code shows it whole
    assert questions["fine_grained_pose"].frames(8, 4.0).tolist() == [0, 2, 4, 5]
    place = tmp_path / questions["fine_grained_pose"].media
    found = run.read_chosen(place, lambda num_total, fps: [5, 2, 2])  # any order, as read_frames
    assert np.array_equal(found, read_frames(place, [5, 2, 2]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: no pictures in it; 00001.jpg"):
        run.read_chosen(tmp_path / "empty", shown.frames)


# ---- the command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mvbench", "science_qa", "mm_vet", "longvideobench", "llava_wild"]
)
def test_a_model_is_asked_all_of_it(name, tmp_path, model_dir, capsys):
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    MAKERS[name](folder)
    arguments = [name, str(folder), "--model", str(model_dir), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    questions = run.find(name).read(folder, four)
    assert [line["question_id"] for line in lines] == [q.id for q in questions]
    assert not any(line["error"] for line in lines)
    printed = capsys.readouterr().out
    if name == "mm_vet":
        assert json.loads((out / "upload.json").read_text()) == {"v1_0": lines[0]["text"]}
        assert f"{out}/upload.json is what to send" in printed
    if name in ("mm_vet", "llava_wild"):
        assert "scored elsewhere" in printed and not (out / "metrics.json").exists()
        assert {"question_id", "prompt", "text", "answer_id", "model_id"} <= set(lines[0])
    else:
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["num_questions"] == len(questions) and "accuracy" in printed


def test_a_clip_that_is_not_there_is_told(tmp_path, model_dir, capsys):
    make_mlvu(tmp_path)
    (tmp_path / "video/4_count/v.mp4").unlink()
    call = ["mlvu", str(tmp_path), "--model", str(model_dir), "--device", "cpu", "--out",
            str(tmp_path / "out"), "--max-new-tokens", "2"]  # fmt: skip
    assert main(call) == 0
    assert "1 questions could not be asked, their answers are empty" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/metrics.json").read_text())["num_errors"] == 1


def test_answers_and_options_may_be_numbers(tmp_path):
    MAKERS["mmvu"](tmp_path)
    rows = json.loads((tmp_path / "validation.json").read_text())
    rows[0]["choices"], rows[1]["answer"] = {"A": 1, "B": 2}, 12
    put(tmp_path / "validation.json", rows)
    benchmark = run.find("mmvu")
    questions = benchmark.read(tmp_path)
    assert benchmark.score(questions, ["A", "It is 12."])["accuracy"] == 1.0


@pytest.mark.parametrize("option, value", [("--limit", "0"), ("--limit", "-1"),
                                           ("--batch-size", "0"), ("--max-new-tokens", "no")])
def test_a_count_below_one_is_refused(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["mlvu", str(tmp_path), "--model", "x", option, value])
    assert f"argument {option}: {value!r} must be a whole number from 1 on" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name, change, message", [
    ("mme", lambda f: (f / "llava_mme.jsonl").write_text(
        (f / "llava_mme.jsonl").read_text().split("\n")[0]), "has 1 questions; each has two"),
    ("vqa_v2", lambda f: (f / "llava_vqav2_mscoco_test2015.jsonl").unlink(),
     "llava_vqav2_mscoco_test2015.jsonl: no such file"),
    ("mlvu", lambda f: put(f / "json/3_ego.json", [
        {"video": "a", "question": "?", "candidates": None, "answer": "y"}]),
     "a row is not as the published files of mlvu have it: TypeError"),
    ("mme", lambda f: next(f.rglob("*.txt")).write_text("no tab"),
     "the line ['no tab'] must be a question and its answer"),
    ("gqa", lambda f: [path.unlink() for path in f.rglob("*.jpg")], ".jpg: no such file, nor any"),
])  # fmt: skip
def test_what_cannot_be_scored_is_told_before_anything_is_asked(name, change, message, tmp_path,
                                                                model_dir, monkeypatch, capsys):
    MAKERS[name](tmp_path)
    change(tmp_path)
    monkeypatch.setattr(run, "answer", None)
    assert main([name, str(tmp_path), "--model", str(model_dir), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_long_video_that_is_broken_costs_its_own_answer_alone(tmp_path, tiny):
    make_longvideobench(tmp_path)
    benchmark = run.find("longvideobench")
    (tmp_path / benchmark.read(tmp_path, four)[0].media).write_bytes(b"torn")
    questions = benchmark.read(tmp_path, four)
    assert "[image]" not in questions[0].prompt
    answers = run.answer(*tiny, questions, tmp_path, max_new_tokens=1)
    assert "not a readable video" in answers[0].error


def test_frames_are_chosen_by_the_question_not_by_what_stands_before_it(tmp_path, monkeypatch):
    make_longvideobench(tmp_path)
    asked = []
    monkeypatch.setattr(run.answering, "generate_answers",
                        lambda model, processor, rows, *_, **options: asked.extend(rows))
    model = SimpleNamespace(selector=None)
    run.answer(None, model, run.find("longvideobench").read(tmp_path, four), tmp_path)
    assert asked[0]["question"].startswith("subtitles:") and asked[0]["query"] == "What?"


def test_answers_are_of_the_frames_named(tmp_path, tiny, monkeypatch):
    """What the encoder is shown, question by question."""
    make_mvbench(tmp_path)
    questions = run.find("mvbench").read(tmp_path, four)
    model, processor = tiny
    shown = {}

    def watch(model, processor, asked, folder, frames_of, **options):
        shown.update({one["video"]: frames_of(one["video"]) for one in asked})
        return [Answer("A")] * len(asked)

    monkeypatch.setattr(run.answering, "generate_answers", watch)
    run.answer(model, processor, questions, tmp_path)
    by_segment = [name for name in shown if "#" in name]
    assert len(by_segment) == 3  # .avi, .webm, frames
    for name, frames in shown.items():
        assert len(frames) == 4, name
    whole = "video/star/Charades_v1_480/a.mp4"
    assert np.array_equal(shown[whole], processor.sample(tmp_path / whole).frames)
    shown.clear()
    make_mlvu(tmp_path)  # a clip shorter than what the model samples: each frame once
    many = SimpleNamespace(selector=None, sample=lambda path, timeout_s: sample_frames(path, 200))
    run.answer(model, many, run.find("mlvu").read(tmp_path)[:1], tmp_path)
    (name,) = shown
    assert len(shown[name]) == probe(tmp_path / name).num_frames < 200


@pytest.mark.parametrize("task", ["action_sequence", "fine_grained_pose"])  # sampled, or chosen
def test_a_clip_that_hangs_the_decoder_costs_its_own_answer_alone(task, tmp_path, tiny,
                                                                  monkeypatch):  # fmt: skip
    make_mvbench(tmp_path)
    (question,) = [q for q in run.find("mvbench").read(tmp_path, four) if q.group == task]
    monkeypatch.setattr(run, "FRAME_S", 0.3)
    os.kill(video_child.child()._process.pid, signal.SIGSTOP)  # it never answers
    (lost,) = run.answer(*tiny, [question], tmp_path, max_new_tokens=2)
    assert "decoding took over 0.3 s" in lost.error
    monkeypatch.undo()
    (found,) = run.answer(*tiny, [question], tmp_path, max_new_tokens=2)  # by a new child
    assert not found.error


def test_a_judges_words_are_scored(tmp_path, capsys):
    make_mm_vet(tmp_path)
    put(tmp_path / "judged.json", {"v1_0": "0.5"})
    call = ["mm_vet", str(tmp_path), "--judged", str(tmp_path / "judged.json"), "--out"]
    assert main([*call, str(tmp_path / "out")]) == 0
    assert "total" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text())["total"] == 50
    assert main(["mlvu", str(tmp_path), "--judged", str(tmp_path / "judged.json")]) == 2
    assert "mlvu has no judge" in capsys.readouterr().err


def test_questions_for_notebook_05(tmp_path, capsys):
    make_video_mme(tmp_path)
    target = tmp_path / "test_questions.json"
    assert main(["video_mme", str(tmp_path), "--questions", str(target)]) == 0
    first = json.loads(target.read_text())[0]
    assert main(["video_mme", str(tmp_path), "--questions", str(target), "--limit", "1"]) == 0
    assert json.loads(target.read_text()) == [first]
    assert first == {
        "id": "1-0", "video": "data/abc.mp4", "type": "short", "form": "choice", "answer": "B",
        "question": f"Who?\nA. Mr. Smith\nB. A cat.\n{LETTER}", "options": ["Mr. Smith", "A cat."],
        "unseen_pair": False}  # fmt: skip
    clips = ["--videos-dir", str(tmp_path / "other")]
    assert main(["video_mme", str(tmp_path), "--questions", str(target), *clips]) == 0
    assert json.loads(target.read_text())[1]["video"] == "../data/abc.mp4"
    for name in ("mmvu", "mvbench", "science_qa"):  # open answers; frames of its own; no clip
        MAKERS[name](tmp_path)
        assert main([name, str(tmp_path), "--questions", str(target)]) == 2
        assert "multiple choice alone, about clips" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, model_dir, capsys):
    make_mlvu(tmp_path)
    (tmp_path / "json/2_needle.json").unlink()
    assert main(["mlvu", str(tmp_path), "--model", str(model_dir), "--device", "cpu"]) == 2
    assert "json/2_needle.json: no such file; the folder tree" in capsys.readouterr().err
    put(tmp_path / "json/2_needle.json", [{"video": "v.mp4", "question": "What?"}])
    with pytest.raises(BenchmarkError, match="row 0 has no 'candidates', 'answer'; it has 'video'"):
        run.find("mlvu").read(tmp_path)
    put(tmp_path / "a.json", {"data": []})
    with pytest.raises(BenchmarkError, match="must hold a list of rows, not a dict"):
        read_rows(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(BenchmarkError, match="b.jsonl: not readable as jsonl"):
        read_rows(tmp_path / "b.jsonl")
    (tmp_path / "c.parquet").write_bytes(b"none")
    with pytest.raises(BenchmarkError, match="c.parquet: not readable as parquet"):
        read_rows(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("pope", lambda f: (f / "coco/coco_pope_popular.json").write_text('{"label": "no"}'),
         "1 labels for 2 questions of the category 'popular'"),
        ("mme", lambda f: (f / f"{mme.RELEASE}/color/0001.txt").write_text("A?\tYes"),
         "no answer to 'Is it red[?]' about 0001.png"),
        ("gqa", lambda f: put(f / "testdev_balanced_questions.json", {}), "no question '07'"),
        ("text_vqa", lambda f: put(f / "TextVQA_0.5.1_val.json", {"data": []}),
         "no answers to 'what sign[?]' about picture 'a'"),
        ("science_qa", lambda f: put(f / "problems.json", {}), "no problem '4'"),
        ("mmmu", lambda f: put(f / "eval/answer_dict_val.json", {}),
         "no answer to 'validation_Art_1'"),
        ("mm_vet", lambda f: put(f / "mm-vet.json", {}), "no question 'v1_0'"),
        ("mvbench", lambda f: put(f / "json/scene_transition.json", [
            {"video": "a", "question": "?", "candidates": ["x"], "answer": "y"}]),
         "answer 'y' is none of the candidates"),
        ("mvbench", lambda f: put(f / "json/episodic_reasoning.json", [
            {"video": "a", "question": "?", "candidates": ["x"], "answer": "x"}]),
         "row 0 has no 'start', 'end'"),
        ("mlvu", lambda f: put(f / "json/3_ego.json", [
            {"video": "a", "question": "?", "candidates": ["x"], "answer": "y"}]),
         "json/3_ego.json: row 0: answer 'y' is none of the candidates"),
    ],
)  # fmt: skip
def test_files_of_different_versions_are_refused(name, change, message, tmp_path):
    MAKERS[name](tmp_path)
    change(tmp_path)
    with pytest.raises(BenchmarkError, match=message):
        run.find(name).read(tmp_path)


@pytest.mark.parametrize(
    "name, judged, message",
    [
        ("mm_vet", '["0.5"]', "must hold an object, not a list"),
        ("mm_vet", "{", "not readable as json: "),
        ("mm_vet", '{"v1_0": {"score": 7}}', "the judge's word on v1_0 is {'score': 7}; a score"),
        ("llava_wild", '{"tuple": [1, 2]}', "must hold a list of rows, not a dict"),
        ("llava_wild", '[{"tuple": [1, 2]}]', "row 0 has no 'category'; it has 'tuple'"),
        ("llava_wild", "[7]", "row 0 is 7; every row must be an object"),
        ("llava_wild", '[{"tuple": 7, "category": "x"}]', "review 0: tuple = 7; two scores from"),
        ("llava_wild", '[{"tuple": ["8", "9"], "category": "x"}]', "tuple = ['8', '9']; two"),
    ],
)
def test_a_judges_file_of_another_form_is_told_in_one_line(name, judged, message, tmp_path, capsys):
    MAKERS[name](tmp_path)
    (tmp_path / "judged.json").write_text(judged)
    assert main([name, str(tmp_path), "--judged", str(tmp_path / "judged.json")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/judged.json: " in said and message in said and said.count("\n") == 1


def test_a_table_that_is_no_json_is_named(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(BenchmarkError, match="torn.json: not readable as json: "):
        read_table(tmp_path / "torn.json")

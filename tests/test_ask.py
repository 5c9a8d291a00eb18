"""`python -m tlv.ask`: an answer and its frames, or one clear line."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tlv import ROOT
from tlv.ask import answer, ask, main
from tlv.mp4 import write_video
from tlv.templates import render


@pytest.fixture
def clip(tmp_path, clip_frames):
    write_video(tmp_path / "clip.mp4", clip_frames(9), fps=3)
    return tmp_path / "clip.mp4"


def test_without_a_model_it_is_the_one_that_the_pipeline_trains(clip, capsys, monkeypatch):
    asked = []
    monkeypatch.setitem(main.__globals__, "ask", lambda *given: asked.append(given) or "red")
    assert main([str(clip), "What colour?", "--device", "cpu"]) == 0
    trained = ROOT / "outputs/tiny/04_sft/checkpoint"
    assert asked == [(str(clip), "What colour?", trained, "cpu", 64)]


def test_answer_is_what_generate_gives(tiny, clip_frames):
    model, processor = tiny
    batch = processor(text=render([("<video>\nWhere?", None)], "qwen2_base"),
                      videos=[clip_frames()])  # fmt: skip
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    wanted = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :],
                                        skip_special_tokens=True).strip()  # fmt: skip
    assert answer(model, processor, clip_frames(), "Where?", 8) == wanted
    other = answer(model, processor, np.zeros_like(clip_frames()), "Where?", 8)
    assert wanted and other != wanted
    assert isinstance(answer(model, processor, None, "Where?", 8), str)


def test_command_says_which_frames(clip, model_dir, capsys):
    arguments = [str(clip), "What is he doing?", "--model", str(model_dir), "--device", "cpu"]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "frames looked at: 4 of 9 (3.00 s at 3 fps)" in printed
    assert printed.endswith("0 (0.00 s), 2 (0.67 s), 5 (1.67 s), 8 (2.67 s)\n")


def test_a_picture(tmp_path, clip_frames, model_dir, capsys):
    Image.fromarray(clip_frames()[0]).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "What?", "--model", str(model_dir), "--device", "cpu"]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    assert "the picture" in capsys.readouterr().out


def test_an_empty_answer_is_said(clip, model_dir, monkeypatch):
    monkeypatch.setattr("tlv.ask.answer", lambda *others: "")
    assert ask(clip, "What?", model_dir).startswith("(no answer: the model ended at once)\nframes")


@pytest.mark.slow
def test_as_a_user_runs_it(clip, model_dir):
    command = [sys.executable, "-m", "tlv.ask", str(clip), "Where?", "--model", str(model_dir),
               "--device", "cpu", "--max-new-tokens", "2"]  # fmt: skip
    users = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(command, capture_output=True, text=True, env=users)
    assert done.returncode == 0 and "frames looked at: 4 of 9" in done.stdout
    assert done.stderr == ""


def test_bad_inputs_end_in_one_line(clip, model_dir, llm_dir, tmp_path, capsys):
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clip.read_bytes()[:2000])
    cases = [
        (clip, "What?", tmp_path / "none", "none: no such folder"),
        (clip, "What?", tmp_path, "no config.json"),
        (clip, "What?", llm_dir, "a 'qwen2' model; a 'tlv' one is wanted"),
        (torn, "What?", model_dir, "torn.mp4: "),
        (tmp_path / "no.mp4", "What?", model_dir, "no.mp4: no such file"),
        (clip, " ", model_dir, "the question is empty"),
        (clip, "why " * 900, model_dir, "more than the LLM's context of "),
    ]
    for path, question, folder, message in cases:
        assert main([str(path), question, "--model", str(folder), "--device", "cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1 and err.startswith("tlv.ask: ")


def test_a_wrong_option_is_refused_before_the_model_is_loaded(clip, tmp_path, capsys):
    for option, message in ((("--device", "gpu"), "'gpu' cannot be used here; take 'auto'"),
                            (("--max-new-tokens", "0"), "'0' must be a whole number from 1 on")):
        with pytest.raises(SystemExit, match="2"):
            main([str(clip), "What?", "--model", str(tmp_path), *option])
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(clip, model_dir, capsys):
    assert main([str(clip), "What?", "--model", str(model_dir), "--device", "cuda"]) == 0

"""The trainer on a tiny model: what must not change the result does not, what must stop it does."""

import copy
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_manifest import make_sample, make_world

from tlv import ROOT, processor, runlog, train
from tlv import launch as launcher
from tlv.bad_samples import TooManyBadSamples
from tlv.builders import load_model
from tlv.config import ConfigError, resume_root
from tlv.connectors import CONNECTORS
from tlv.launch import LaunchConfig, LaunchError, environment, find_finished, launch
from tlv.runlog import RunLog, read_log
from tlv.templates import render
from tlv.train import TrainingError
from tlv.train_config import TrainConfig, as_dict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 10)


@pytest.fixture
def configure(model_dir, world, tmp_path):
    """configure(name, **changes) -> a config that writes into tmp_path/name."""

    def make(name="out", **changes):
        values = dict(
            model_dir=str(model_dir), data=str(world / "data.json"), videos_dir=str(world),
            out_dir=str(tmp_path / name), num_steps=6, trainable=("connector", "llm"),
            lr_connector=1e-3, lr_llm=1e-3, micro_batch_size=2, grad_accum_steps=2, device="cpu",
            decode_timeout_s=None)  # fmt: skip
        return TrainConfig(**(values | changes))

    return make


def run(config) -> list[dict]:
    train.train(config)
    return read_log(Path(config.out_dir) / "log.jsonl")


def losses(rows) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def close(rows, relative):
    return pytest.approx(losses(rows), rel=relative)


def contents(config) -> dict[str, str]:
    """Hashes of the log and of every file of the finished model."""
    out_dir = Path(config.out_dir)
    files = [out_dir / "log.jsonl", *sorted((out_dir / "checkpoint").glob("*.*"))]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Interrupt(Exception):
    """Ends a run before step `at`."""

    def __init__(self, at, monkeypatch):
        original = train.learning_rate

        def stop(step, *args):
            if step == at:
                raise self
            return original(step, *args)

        monkeypatch.setattr(train, "learning_rate", stop)


# ---- what must not change the losses --------------------------------------------------------


def test_zero_stages_give_the_same_losses(configure):
    plain = run(configure())
    assert losses(plain)[-1] < losses(plain)[1]  # it learns
    for stage in (1, 2, 3):
        config = configure(zero_config=f"params/deepspeed_zero{stage}.json")
        rows = run(config)
        assert losses(rows) == close(plain, 1e-5), stage
        norms = [row["grad_norm"] for row in rows]
        assert norms == pytest.approx([row["grad_norm"] for row in plain], rel=1e-4)


def test_pictures_clips_and_text_train_in_one_run_grouped_by_modality(configure, tmp_path):
    """One rank and two, which DeepSpeed's launcher starts; with micro-batches of text alone, which
    show the encoder nothing, and with Muon, whose work the ranks share."""
    world = make_world(tmp_path / "world", 4)
    samples = json.loads((world / "data.json").read_text())
    for i in range(4):
        Image.new("RGB", (20, 24), (60 * i, 10, 10)).save(world / f"{i}.png")
        said = make_sample(4 + i, "")["conversations"]
        samples.append({"id": f"p{i}", "image": f"{i}.png", "conversations": said})
        said = [said[0] | {"value": "Hi?"}, *said[1:]]
        samples.append({"id": f"t{i}", "conversations": said})
    (world / "data.json").write_text(json.dumps(samples))
    base = dict(data=str(world / "data.json"), videos_dir=str(world), group_by_length=True,
                trainable=("connector", "llm", "vision"), lr_vision=1e-4, optimizer="muon",
                warmup_ratio=0.5)  # fmt: skip
    one = run(configure("one", **base))
    assert json.loads((tmp_path / "one/report.json").read_text())["num_bad"] == 0
    two = configure("two", grad_accum_steps=1, **base)
    launch(two, LaunchConfig(num_ranks=2, launcher="deepspeed"))
    assert losses(read_log(Path(two.out_dir) / "log.jsonl")) == close(one, 1e-5)
    assert json.loads((Path(two.out_dir) / "report.json").read_text())["num_ranks"] == 2


def test_clipping_shortens_what_is_learnt(configure, model_dir):
    start = load_file(model_dir / "model.safetensors")
    moved = {}
    for limit in (None, 1e-12):  # AdamW forgets the length, but for its epsilon of 1e-8
        config = configure(max_grad_norm=limit, num_steps=2)
        rows = run(config)
        assert rows[0]["grad_norm"] > 0.1  # the log has the norm before the cut
        end = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
        moved[limit] = max((end[name] - start[name]).abs().max().item() for name in start)
    assert moved[1e-12] < 1e-5 < 1e-4 < moved[None]


def test_a_converted_model_trains_on_cut_rows_and_counts_them(configure, build_tiny, tmp_path):
    for part in build_tiny(max_seq_len=115, long_rows="cut"):
        part.save_pretrained(tmp_path / "converted")
    config = configure(model_dir=str(tmp_path / "converted"), num_steps=5)
    assert len(losses(run(config))) == 5
    report = json.loads((Path(config.out_dir) / "report.json").read_text())
    assert report["num_noted"] > 0 == report["num_bad"]
    assert all("beyond max_seq_len = 115 are cut" in s["reason"] for s in report["bad_samples"])


def test_accumulation_does_not_change_the_losses(configure):
    first = run(configure(micro_batch_size=4, grad_accum_steps=1))
    for size in (1, 2):
        rows = run(configure(micro_batch_size=size, grad_accum_steps=4 // size))
        assert losses(rows) == close(first, 1e-5), size


def test_two_ranks_equal_one_also_when_a_micro_batch_is_empty(configure, tmp_path):
    # Micro-batches of one sample: a bad one leaves a rank with an empty micro-batch.
    world = make_world(tmp_path / "world", 8, bad=(2, 5))
    base = dict(num_steps=20, micro_batch_size=1, data=str(world / "data.json"),
                videos_dir=str(world), max_bad_share=0.3, max_grad_norm=1.0,
                val_data=str(world / "data.json"), val_every=20)
    one = configure("one", grad_accum_steps=4, **base)
    rows = run(one)
    for stage in (0, 3):
        two = configure(f"two{stage}", grad_accum_steps=2,
                        zero_config=f"params/deepspeed_zero{stage}.json", **base)
        launch(two, LaunchConfig(num_ranks=2))
        theirs = read_log(Path(two.out_dir) / "log.jsonl")
        assert len(losses(theirs)) == 20 and losses(theirs) == close(rows, 1e-5)
        assert theirs[-1]["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-5)
        reports = [json.loads((Path(c.out_dir) / "report.json").read_text()) for c in (one, two)]
        assert reports[0]["bad_samples"] == reports[1]["bad_samples"]
        assert reports[1]["num_ranks"] == 2
        weights = [load_file(Path(c.out_dir) / "checkpoint" / "model.safetensors")
                   for c in (one, two)]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_cached_features_give_the_same_losses(configure, world, monkeypatch):
    common = dict(val_data=str(world / "data.json"), val_every=3, num_steps=8)
    plain = run(configure(**common))
    calls = []
    decode = processor.sample_frames_within
    monkeypatch.setattr(processor, "sample_frames_within",
                        lambda limit, path, **kw: calls.append(path) or decode(limit, path, **kw))
    cached = run(configure(cache_features=True, **common))
    assert losses(cached) == close(plain, 1e-5)
    measured = [[r["val_loss"] for r in rows if "val_loss" in r] for rows in (plain, cached)]
    assert len(measured[0]) == 4 and measured[1] == pytest.approx(measured[0], rel=1e-5)
    assert len(calls) == len(set(calls)) == 10  # over 3 epochs and 4 validations


def test_equal_runs_write_equal_bytes_whatever_the_folder(configure):
    first, second = configure("a/out"), configure("b/other")
    run(first)
    run(second)
    assert contents(first) == contents(second)
    assert "model.safetensors" in contents(first)


# ---- what must change them ------------------------------------------------------------------


@pytest.mark.parametrize("num_samples,changes", [
    (10, {}),  # the order of the samples
    (8, dict(group_by_length=True)),  # no two are equally long: the order of the batches alone
    (1, dict(lora=("llm",), lora_rank=4, lora_alpha=8.0, lora_dropout=0.5)),  # adapters, dropout
    (1, dict(spread_positions=True))])
def test_another_seed_gives_other_losses(configure, world, tmp_path, num_samples, changes):
    samples = json.loads((world / "data.json").read_text())[:num_samples]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    common = dict(data=str(tmp_path / "data.json"), num_steps=min(4, num_samples + 1),
                  micro_batch_size=min(2, num_samples), grad_accum_steps=1, warmup_ratio=0.0)
    first, second = (run(configure(f"seed{k}", seed=k, **common, **changes)) for k in (0, 1))
    assert losses(first) != close(second, 1e-4)


def test_zero_3_that_lets_go_of_every_matrix_gives_the_same_losses(configure, tmp_path):
    """At their defaults DeepSpeed keeps matrices as small as the tests' on every rank."""
    tight = {"stage": 3, "stage3_param_persistence_threshold": 0,
             "stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 3000,
             "stage3_prefetch_bucket_size": 1000}  # fmt: skip
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": tight}))
    common = dict(gradient_checkpointing=True, trainable=("connector", "llm"))
    plain, sharded = (run(configure(name, **common, **zero)) for name, zero in
                      (("plain", {}), ("sharded", dict(zero_config=str(path)))))
    assert losses(sharded) == close(plain, 1e-5)


# ---- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage,precision,others", [
    (0, "fp32", {}), (3, "bf16", {}), (2, "fp16", {}), (0, "fp32", dict(optimizer="muon")),
    # Dropout draws from the generator that a checkpoint holds.
    (0, "fp32", dict(lora=("llm",), lora_rank=4, lora_alpha=8.0, lora_dropout=0.5))])
def test_a_resumed_run_equals_the_uninterrupted_one(
    configure, fp16_here, world, monkeypatch, capsys, stage, precision, others
):
    common = dict(save_every=2, num_steps=7, val_data=str(world / "data.json"), val_every=3,
                  precision=precision, zero_config=f"params/deepspeed_zero{stage}.json", **others)
    whole, broken = configure("whole", **common), configure("broken", **common)
    run(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        Interrupt(5, patch)
        run(broken)
    shutil.rmtree(broken.out_dir)  # as the pipeline does before it runs a stage again
    capsys.readouterr()
    run(broken)
    assert "resuming at step 4" in capsys.readouterr().err
    assert contents(broken) == contents(whole)
    root = resume_root(broken.out_dir)
    assert not list(root.glob("*/step-*"))  # nothing left behind


def test_a_finished_run_survives_what_a_failed_stage_loses(configure, capsys):
    """A notebook may fail after its training, and DVC deletes its outputs before the next try."""
    config = configure(num_steps=2)
    run(config)
    whole = contents(config)
    shutil.rmtree(config.out_dir)
    assert not find_finished(dataclasses.replace(config, seed=1), LaunchConfig())
    capsys.readouterr()
    launch(config, LaunchConfig())
    said = capsys.readouterr().err
    assert "a finished run with equal settings" in said and "starting clean" not in said
    assert contents(config) == whole


def test_random_numbers_of_numpy_and_python_go_on_too(configure, monkeypatch):
    """As a reader's own connector may draw them."""
    answer_nll = train.answer_nll
    monkeypatch.setattr(train, "answer_nll", lambda *args: answer_nll(*args)
                        * (1 + np.random.rand()) * (1 + random.random()))  # fmt: skip
    whole, broken = (configure(name, save_every=2) for name in ("whole", "broken"))
    run(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        Interrupt(3, patch)
        run(broken)
    run(broken)
    assert contents(broken) == contents(whole)


def test_two_ranks_that_are_killed_go_on_as_if_nothing_had_been(configure, capfd):
    """With all that the pipeline of the preset tiny asks for."""
    common = dict(save_every=5, num_steps=60, grad_accum_steps=1, max_grad_norm=1.0,
                  cache_features=True, group_by_length=True, turns="isolated",
                  optimizer="muon")  # fmt: skip
    whole, broken = configure("whole", **common), configure("broken", **common)
    launch(whole, LaunchConfig(num_ranks=2))
    code = ("import json, sys; from tlv.config import build; "
            "from tlv.launch import LaunchConfig, launch; "
            "from tlv.train_config import TrainConfig; "
            "launch(build(TrainConfig, json.loads(sys.argv[1])), LaunchConfig(num_ranks=2))")
    started = subprocess.Popen([sys.executable, "-c", code, json.dumps(as_dict(broken))], cwd=ROOT)
    root = resume_root(broken.out_dir)
    while not list(root.glob("*/step-*[0-9]")) and started.poll() is None:
        time.sleep(0.005)
    started.kill()  # its ranks end with it
    assert started.wait() != 0, "it was done before it could be killed"
    with open(root / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until the first rank is gone
    capfd.readouterr()
    launch(broken, LaunchConfig(num_ranks=2))
    assert "resuming at step" in capfd.readouterr().err
    assert contents(broken) == contents(whole)


def test_other_settings_start_clean_and_say_so(configure, monkeypatch, capsys):
    config = configure(save_every=2, num_steps=6)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        Interrupt(3, patch)
        run(config)
    other = dataclasses.replace(config, lr_llm=2e-3)
    capsys.readouterr()
    rows = run(other)
    assert "starting clean: the settings, inputs or code differ" in capsys.readouterr().err
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_a_stopped_run_leaves_no_report_of_the_one_before_it(configure, monkeypatch):
    first = configure(num_steps=2)
    run(first)
    assert find_finished(first, LaunchConfig())
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        Interrupt(1, patch)
        run(dataclasses.replace(first, lr_llm=2e-3))
    assert not find_finished(first, LaunchConfig())  # the log is now another run's


def test_a_killed_run_leaves_checkpoints_that_load_and_goes_on(configure, tmp_path):
    """Twenty random points, also inside saving."""
    whole = configure("whole", save_every=1, num_steps=4)
    run(whole)
    killed = dataclasses.replace(whole, out_dir=str(tmp_path / "killed"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_dict(killed)))
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kill_runs.py"), str(path), "20",
                           "1"], capture_output=True, text=True, cwd=ROOT,
                          env=environment(killed, LaunchConfig(num_ranks=1), dict(os.environ)))
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = json.loads(done.stdout.splitlines()[-1])
    assert sum(r["killed"] for r in rounds) >= 15 and not rounds[-1]["killed"]
    assert sum(r["loads"] > 0 for r in rounds) >= 10
    assert contents(killed) == contents(whole)


def test_machines_that_share_no_disk_are_refused(tmp_path):
    words = []
    first = SimpleNamespace(is_first=True, share=lambda word: words.append(word) or word,
                            barrier=lambda: None, gather=lambda seen: [seen])  # fmt: skip
    train.check_disk(tmp_path / "mine", first)
    there = SimpleNamespace(is_first=False, share=lambda _: words[0], barrier=lambda: None,
                            gather=lambda seen: [True, seen])  # fmt: skip
    train.check_disk(tmp_path / "mine", there)
    (tmp_path / "own").mkdir()
    with pytest.raises(TrainingError, match=r"own is not the same folder .*rank 1 does not see it"):
        train.check_disk(tmp_path / "own", there)


# ---- what is trained ------------------------------------------------------------------------


@pytest.mark.parametrize("trainable,prefixes", [
    (("connector",), {"connector"}), (("connector", "llm"), {"connector", "language_model"}),
    (("vision",), {"vision_encoder"})])
def test_only_the_trainable_parts_change(configure, model_dir, trainable, prefixes):
    rates = {f"lr_{part}": 1e-3 if part in trainable else None
             for part in ("connector", "llm", "vision")}
    config = configure(trainable=trainable, num_steps=2, **rates)
    rows = run(config)
    assert {key for key in rows[0] if key.startswith("lr_")} == {f"lr_{p}" for p in trainable}
    before = load_file(model_dir / "model.safetensors")
    after = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == prefixes
    report = json.loads((Path(config.out_dir) / "report.json").read_text())
    assert {part for part, n in report["trained_parameters"].items() if n} == set(trainable)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_first_step_of_warm_up_leaves_the_weights_as_they_were(configure, model_dir, optimizer):
    start, moved = load_file(model_dir / "model.safetensors"), {}
    for warmup_ratio in (0.5, 0.0):
        config = configure(optimizer=optimizer, num_steps=1, warmup_ratio=warmup_ratio)
        run(config)
        end = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
        moved[warmup_ratio] = any(not torch.equal(end[name], start[name]) for name in start)
    assert moved == {0.5: False, 0.0: True}


def test_gradient_checkpointing_computes_the_layers_twice(configure, monkeypatch):
    start_engine = train.start_engine

    def watched(config, model):
        for layer in model.language_model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda part, _: calls.append(part))
        return start_engine(config, model)

    monkeypatch.setattr(train, "start_engine", watched)
    for is_on, times in ((True, 2), (False, 1)):
        calls = []
        run(configure(gradient_checkpointing=is_on, num_steps=1, grad_accum_steps=1))
        assert [calls.count(part) for part in set(calls)] == [times] * 2  # layers


def test_the_finished_model_loads_and_answers(configure):
    from tlv.builders import load_model

    config = configure(num_steps=2)
    run(config)
    model, tools = load_model(Path(config.out_dir) / "checkpoint")
    assert tools.tokenizer.pad_token_id is not None and model.dtype == torch.float32


def test_separate_turns_are_more_rows_and_the_same_answers(configure):
    packed, separate = run(configure(num_steps=3)), run(configure(num_steps=3, turns="separate"))
    assert [r["num_tokens"] for r in packed] == [r["num_tokens"] for r in separate]
    assert losses(packed)[0] != pytest.approx(losses(separate)[0], rel=1e-6)


def test_isolated_turns_are_trained_as_separate_ones(configure):
    isolated = run(configure(turns="isolated"))
    assert losses(isolated) == close(run(configure(turns="separate")), 1e-5)


def test_the_paper_recipe_runs_bf16_zero3_checkpointing(configure):
    config = configure(precision="bf16", zero_config="params/deepspeed_zero3.json", num_steps=3,
                       gradient_checkpointing=True, warmup_ratio=0.03)
    rows, plain = run(config), run(configure("plain", num_steps=3))
    assert losses(rows) == close(plain, 0.02)
    state = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


def test_16_bit_without_zero_follows_16_bit_with_it(configure):
    first = run(configure(precision="bf16"))
    assert losses(run(configure(precision="bf16", zero_config="params/deepspeed_zero2.json"))
                  ) == close(first, 2e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_follows_fp32(configure, fp16_here, stage):
    config = configure("fp16", precision="fp16", max_grad_norm=1.0,
                       zero_config=f"params/deepspeed_zero{stage}.json")
    half, whole = run(config), run(configure("fp32", max_grad_norm=1.0))
    assert losses(half) == close(whole, 1e-3)
    norms = [row["grad_norm"] for row in half]
    assert norms == pytest.approx([row["grad_norm"] for row in whole], rel=5e-3)
    state = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_fp16_follows_fp32_on_a_gpu(configure, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")  # these tests' own is the CPU; the ranks choose theirs
    rows = {}
    for precision, zero in (("fp16", 3), ("fp32", 0)):
        config = configure(precision, precision=precision, device="auto",
                           zero_config=f"params/deepspeed_zero{zero}.json")
        launch(config, LaunchConfig())
        rows[precision] = read_log(Path(config.out_dir) / "log.jsonl")
    assert losses(rows["fp16"]) == close(rows["fp32"], 0.02)


def test_a_step_that_overflows_fp16_is_skipped_and_the_next_is_taken(
    configure, fp16_here, model_dir, monkeypatch
):
    answer_nll = train.answer_nll
    monkeypatch.setattr(train, "answer_nll", lambda *args: answer_nll(*args) * next(factors))
    start = load_file(model_dir / "model.safetensors")
    moved = {}
    for num_steps in (1, 2):
        config = configure(precision="fp16", num_steps=num_steps, warmup_ratio=0.0,
                           zero_config="params/deepspeed_zero2.json")
        factors = iter([1e6, 1e6, 1.0, 1.0])  # the first step's two micro-batches, the second's
        norms = [row["grad_norm"] for row in run(config)]
        assert norms[0] is None and all(norm > 0.1 for norm in norms[1:])
        end = load_file(Path(config.out_dir) / "checkpoint" / "model.safetensors")
        moved[num_steps] = any(not torch.equal(end[name], start[name].half()) for name in start)
    assert moved == {1: False, 2: True}


def test_a_selector_on_a_gpu_and_workers_are_refused(tiny):
    processor = copy.copy(tiny[1])
    train.place_selector(processor, torch.device("cuda"), 4)  # it has none
    processor.selector = SimpleNamespace(model=torch.nn.Linear(1, 1))
    train.place_selector(processor, torch.device("cpu"), 4)
    with pytest.raises(ConfigError, match="num_workers = 4.*take 0"):
        train.place_selector(processor, torch.device("cuda"), 4)


# ---- what must stop it ----------------------------------------------------------------------


def test_bad_samples_are_counted_and_listed_and_too_many_stop(configure, tmp_path):
    world = make_world(tmp_path / "world", 8, bad=(3,))
    config = configure(data=str(world / "data.json"), videos_dir=str(world), max_bad_share=0.2)
    run(config)
    report = json.loads((Path(config.out_dir) / "report.json").read_text())
    assert report["num_bad"] == 1 and report["bad_samples"][0]["id"] == "s3"
    assert report["bad_samples"][0]["reason"].startswith("3.mp4: not a readable video")
    with pytest.raises(TooManyBadSamples, match=r"1 bad train samples among 8.*0\.1"):
        run(dataclasses.replace(config, max_bad_share=0.1))


def test_a_step_without_any_good_sample_is_not_taken(configure, tmp_path):
    world = make_world(tmp_path / "world", 2, bad=(0, 1))
    config = configure(data=str(world / "data.json"), videos_dir=str(world), max_bad_share=1.0,
                       num_steps=2)
    assert [(r["loss"], r["num_tokens"]) for r in run(config)] == [(None, 0), (None, 0)]


def test_a_loss_that_is_no_number_stops_with_advice(configure):
    with pytest.raises(train.TrainingError, match=r"step \d: the loss is nan.*learning rate"):
        run(configure(lr_connector=1e30, lr_llm=1e30, warmup_ratio=0.0))


def test_what_stops_two_ranks_is_said_once(configure, tmp_path):
    world = make_world(tmp_path / "world", 8, bad=(1, 3))
    config = configure(data=str(world / "data.json"), videos_dir=str(world), max_bad_share=0.1)
    with pytest.raises(LaunchError) as error:
        launch(config, LaunchConfig(num_ranks=2))
    said = str(error.value)
    assert "data.json: 2 bad train samples among 8: more than max_bad_share = 0.1. Filter" in said
    assert said.count("3.mp4: not a readable video") == 1 and "Traceback" not in said


@pytest.mark.parametrize("changes,message", [
    ({"adapter_dir": "/nowhere", "lora": ("llm",)},
     "adapter_dir = /nowhere/adapter_model.safetensors: .* does not exist"),
    ({"data": "/nowhere.json"}, "data = /nowhere.json: .* does not exist; run the stage that"),
    ({"model_dir": "/nowhere"}, "model_dir = /nowhere/config.json: .* does not exist"),
    ({"videos_dir": "/nowhere"}, "videos_dir = /nowhere: .* is no folder; it is named in the"),
    ({"optimizer": "muon", "precision": "bf16"}, "'muon' with .* precision = 'bf16': it needs"),
    ({"optimizer": "muon", "zero_config": "params/deepspeed_zero2.json"}, "take fp32 and ZeRO 0"),
    ({"zero_config": {"zero_optimisation": {"stage": 3}}}, "zero.json: must be an object with z"),
    ({"zero_config": {"zero_optimization": {"stage": 7}}}, "zero.json: .* a stage from 0 to 3"),
    ({"zero_config": {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}},
     "zero.json: gradient_clipping is set by the stage's own parameters; leave it out"),
    ({"precision": "fp16"}, "'fp16' with .*deepspeed_zero0.json.* take ZeRO 1 to 3, or 'bf16'")])
def test_wrong_inputs_are_named_before_anything_starts(configure, changes, message, tmp_path):
    if isinstance(changes.get("zero_config"), dict):
        (tmp_path / "zero.json").write_text(json.dumps(changes["zero_config"]))
        changes = {"zero_config": str(tmp_path / "zero.json")}
    with pytest.raises(ConfigError, match=message):
        launch(configure(**changes))


def test_a_wrong_key_of_zero_is_named_with_its_file(configure, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "stagee": 1}}')
    with pytest.raises(ConfigError, match="zero.json: zero_optimization: stagee: Extra inputs"):
        run(configure(zero_config=str(tmp_path / "zero.json")))


def test_a_missing_hostfile_is_named(configure):
    hosts = LaunchConfig(launcher="deepspeed", hostfile="/nowhere", master_addr="a", master_port=7)
    with pytest.raises(ConfigError, match="hostfile = /nowhere: no such file; it names a machine"):
        launch(configure(), hosts)


def test_fp16_on_a_cpu_without_it_is_refused_with_what_to_take(configure, monkeypatch):
    monkeypatch.setattr(deepspeed.get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="precision = 'fp16' needs a GPU; take 'bf16' or 'fp32'"):
        run(configure(precision="fp16", zero_config="params/deepspeed_zero2.json"))


def test_a_second_run_of_a_live_stage_is_refused(configure):
    config = configure(num_steps=1)
    with train.lock_run(resume_root(config.out_dir)):
        with pytest.raises(train.TrainingError, match="another run of this stage is alive"):
            run(config)
    run(config)


def test_a_second_launch_leaves_the_files_of_a_live_run_alone(configure, monkeypatch):
    config, started = configure(num_steps=1), []
    monkeypatch.setattr(launcher, "_run", lambda *args: started.append(args))
    root = resume_root(config.out_dir)
    with train.lock_run(root):
        (root / "config.json").write_text("theirs")
        with pytest.raises(LaunchError, match="lock is held: another run of this stage is alive"):
            launch(config)
        assert (root / "config.json").read_text() == "theirs" and not started
    launch(config)
    assert (root / "config.json").read_text() != "theirs" and len(started) == 1


def test_machines_that_share_a_disk_have_a_log_each(configure, monkeypatch):
    config, logs = configure(num_steps=1), []
    monkeypatch.setattr(launcher, "_run", lambda line, env, log_path: logs.append(log_path.name))
    hosts = dict(num_nodes=3, master_addr="a", master_port=7)
    launch(config, LaunchConfig(node_rank=0, **hosts))
    with train.lock_run(resume_root(config.out_dir)):  # by the first machine's rank
        for node_rank in (1, 2):
            launch(config, LaunchConfig(node_rank=node_rank, **hosts))
    assert logs == ["train.log", "train.1.log", "train.2.log"]


# ---- the launcher ---------------------------------------------------------------------------


def test_launch_trains_in_a_subprocess_once(configure, capsys, monkeypatch, tmp_path):
    """With the progress shown, and without a compiler: nothing is built."""
    config = configure(num_steps=2, val_every=None)
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, "/nonexistent")
    path = launch(config)
    assert not (tmp_path / "built").exists()
    shown = capsys.readouterr().err
    assert path == Path(config.out_dir) / "checkpoint" and (path / "config.json").is_file()
    assert "starting clean" in shown and "samples/s" in shown and "8/8" in shown
    assert re.search(r"<\d\d:\d\d", shown)  # the time left
    in_process = configure("here", num_steps=2)
    run(in_process)
    assert contents(in_process) == contents(config)
    launch(config)
    assert "a finished run with equal settings" in capsys.readouterr().err


def test_tensorboard_is_an_extra(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is missing
    with pytest.raises(ConfigError, match="tensorboard: true .*: pip install tensorboard"):
        launch(configure("it", num_steps=2), LaunchConfig(tensorboard=True))


def test_tensorboard_shows_the_whole_log_of_a_resumed_run(tmp_path, monkeypatch):
    drawn = []
    writer = SimpleNamespace(add_scalar=lambda *row: drawn.append(row), close=lambda: None)
    monkeypatch.setattr(runlog, "find_tensorboard", lambda: lambda folder: writer)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events.of.the.run.that.was.killed").touch()
    log = RunLog(tmp_path, True, [{"step": 1, "loss": 3.0, "val_loss": None}], tensorboard=True)
    log.add({"step": 2, "loss": 2.0})
    log.close()
    assert drawn == [("loss", 3.0, 1), ("loss", 2.0, 2)]
    assert not (tmp_path / "tensorboard").exists()  # else its rows would show twice


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None,
                    reason="pip install tensorboard==2.21.0 to try the real one")  # fmt: skip
def test_tensorboard_writes_events(tmp_path):
    log = RunLog(tmp_path, True, tensorboard=True)
    log.add({"step": 1, "loss": 2.0})
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


# ---- a connector of one's own ---------------------------------------------------------------


class Squares(torch.nn.Module):
    """One token for the four patches of a frame, by one matrix."""

    def __init__(self, sizes):
        super().__init__()
        self.linear = torch.nn.Linear(4 * sizes["vision_width"], sizes["llm_width"])

    def forward(self, x, lengths=None):
        return self.linear(x.unflatten(1, (-1, 4)).flatten(2))

    def num_tokens(self, num_patches):
        return num_patches // 4


def test_a_connector_of_ones_own_is_asked_saved_loaded_and_trained(
    configure, build_tiny, clip_frames, tmp_path, monkeypatch
):
    monkeypatch.setitem(CONNECTORS, "mine", Squares)
    model, asker = build_tiny(connector_type="mine")
    assert asker.num_tokens(4) == 4 and asker.num_tokens(7) == 7  # a frame has four patches
    for part in (model, asker):
        part.save_pretrained(tmp_path / "mine")
    batch = asker(text=[render([("<video>\nWhere?", None)], "qwen2_base")], videos=[clip_frames()])
    assert (batch["input_ids"] == model.config.video_token_id).sum() == 4
    with torch.no_grad():
        loaded = load_model(tmp_path / "mine")[0](**batch).logits
        assert torch.equal(loaded, model(**batch).logits)
    config = configure(model_dir=str(tmp_path / "mine"), num_steps=2, trainable=("connector",),
                       lr_llm=None)  # fmt: skip
    assert all(math.isfinite(loss) for loss in losses(run(config)))
    before, after = (load_file(Path(folder) / "model.safetensors")
                     for folder in (tmp_path / "mine", Path(config.out_dir) / "checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector.linear.weight", "connector.linear.bias"}
    assert load_model(Path(config.out_dir) / "checkpoint")[0].config.connector_type == "mine"


# ---- a connector that chooses frames --------------------------------------------------------


@pytest.fixture
def long_dir(build_tiny, pair_dir, tmp_path):
    """A model of connector vilamp that looks at every frame."""
    parts = build_tiny(connector_type="vilamp", selector_dir=pair_dir, sampling="fps", fps=8.0,
                       max_frames=64, num_keyframes=2, merging_width=8)  # fmt: skip
    for part in parts:
        part.save_pretrained(tmp_path / "long")
    return str(tmp_path / "long")


def test_keyframes_and_gaps_train_alike_with_and_without_a_cache(configure, long_dir):
    long = dict(model_dir=long_dir, spread_positions=True, turns="isolated")
    plain = run(configure("plain", **long))
    cached = run(configure("cached", **long, cache_features=True))
    contiguous = run(configure("contiguous", **{**long, "spread_positions": False}))
    assert losses(plain) == close(cached, 1e-5)
    assert losses(plain) != close(contiguous, 1e-3)  # gaps are there
    start, end = (load_file(Path(folder) / "model.safetensors")
                  for folder in (long_dir, configure("plain", **long).out_dir + "/checkpoint"))
    moved = {name for name in start if not start[name].equal(end[name])}
    assert {name for name in start if name.startswith("connector.")} <= moved
    assert not [name for name in moved if name.startswith("vision_encoder.")]
    selector = Path(configure("plain").out_dir) / "checkpoint" / "selector"
    before = load_file(Path(long_dir) / "selector" / "model.safetensors")
    assert all(before[k].equal(v) for k, v in load_file(selector / "model.safetensors").items())

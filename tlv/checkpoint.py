"""Checkpoints that are whole or absent: a run killed at any moment leaves one that loads.

Unfinished runs live in `outputs/.resume/<stage>/<fingerprint>/step-N/`, outside what DVC deletes,
and finished ones, until their stage is done, beside them in `finished/`.
A folder is written as `step-N.tmp`, flushed to disk, then renamed; older ones go only after that.
The fingerprint covers settings, annotations (not the clips), model and code: a run resumes only
where all are equal.
Nothing is unpickled: tensors load with `weights_only=True`. Notebook 03.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tlv import ROOT
from tlv.config import resolve
from tlv.files import draft_of, publish, write_bytes, write_json
from tlv.imports import modules_needed
from tlv.train_config import as_dict

FINISHED = "finished"
LEFT = ("checkpoint", "log.jsonl", "train_config.json", "report.json")  # by a finished run
STEP = re.compile(r"step-(\d+)")
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
PACKAGES = ("torch", "deepspeed", "transformers", "peft")  # whose versions may change a run


# ---- identity -------------------------------------------------------------------------------


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(config, world_size: int) -> str:
    """16 hex digits of settings, number of ranks, annotations (not the clips), model folder, code
    and versions.

    Of the code, what training needs: a run goes on, and its report stays, when all else changes.
    """
    inputs = [config.data, config.val_data, config.zero_config]
    files = [resolve(p) for p in inputs if p is not None]
    files += sorted(p for p in resolve(config.model_dir).rglob("*") if p.is_file())
    adapter = config.adapter_dir and resolve(config.adapter_dir)
    files += sorted(p for p in adapter.rglob("*") if p.is_file()) if adapter else []
    files += [ROOT / name for name in modules_needed("import tlv.train", ROOT)]
    versions = [version(package) for package in PACKAGES]
    parts = [as_dict(config), world_size, versions, [_hash_file(p) for p in files]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---- whole or absent ------------------------------------------------------------------------


def list_steps(folder: Path) -> list[Path]:
    """Finished step folders, oldest first; unfinished ones (`.tmp`, `.old`) do not count."""
    steps = [p for p in folder.glob("step-*") if STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(steps, key=lambda p: int(STEP.fullmatch(p.name)[1]))


def list_runs(root: Path) -> list[Path]:
    """The folders of a stage's unfinished runs; a stage nested in it has its own beside them."""
    return [p for p in root.glob("*") if FINGERPRINT.fullmatch(p.name) and p.is_dir()]


def find_resume(root: Path, mark: str) -> tuple[Path | None, str]:
    """The newest checkpoint of the run with fingerprint `mark`, and the sentence that says so."""
    steps = list_steps(root / mark)
    if steps:
        return steps[-1], f"resuming at step {STEP.fullmatch(steps[-1].name)[1]}"
    if any(list_steps(run) for run in list_runs(root)):
        return None, ("starting clean: the settings, inputs or code differ from those of the "
                      "unfinished run, which is removed")
    return None, "starting clean: no unfinished run"


def remove_others(root: Path, mark: str) -> None:
    """Delete unfinished runs with another fingerprint, and this run's unfinished drafts."""
    for run in list_runs(root):
        if run.name != mark:
            shutil.rmtree(run)
    for folder in [*(root / mark).glob("*.tmp"), *(root / mark).glob("*.old")]:
        shutil.rmtree(folder)


# ---- the state of a run ---------------------------------------------------------------------


def safe_classes() -> list:
    """What may stand in DeepSpeed's checkpoint files besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _use_safe_loading(engine) -> None:
    """DeepSpeed loads checkpoints as pickles; load tensors and the classes above instead."""
    def load(path, map_location=None):
        with torch.serialization.safe_globals(safe_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load


def save_step(engine, folder: Path, step: int, state: dict, ranks) -> None:
    """Every rank calls it. Saves trained weights, optimizer, loss scale, RNG and `state` (JSON).

    Frozen weights are left out: they are those of `model_dir`, which the fingerprint covers.
    """
    draft, final = folder / f"step-{step}.tmp", folder / f"step-{step}"
    if ranks.is_first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    ranks.barrier()
    engine.save_checkpoint(str(draft), tag="engine", save_latest=False,
                           exclude_frozen_parameters=True)
    name, words, *rest = np.random.get_state()
    random_state = {"cpu": torch.get_rng_state(), "python": random.getstate(),
                    "numpy": (name, words.tolist(), *rest)}  # fmt: skip
    if ranks.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    torch.save(random_state, draft / f"random-{ranks.rank}.pt")
    if ranks.is_first:
        write_json(draft / "state.json", {"step": step, **state})
    ranks.barrier()
    if ranks.is_first:
        publish(draft, final)
        for old in list_steps(folder)[:-1]:
            trash = old.with_name(old.name + ".old")
            os.replace(old, trash)
            shutil.rmtree(trash)
    ranks.barrier()


def load_step(engine, path: Path, ranks) -> dict:
    """The inverse of `save_step`; returns its `state` with `step`."""
    _use_safe_loading(engine)
    engine.load_checkpoint(str(path), tag="engine", load_module_strict=False)
    random_state = torch.load(path / f"random-{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(random_state["cpu"])
    random.setstate(random_state["python"])
    name, words, *rest = random_state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], ranks.device)
    return json.loads((path / "state.json").read_text())


# ---- the finished run -----------------------------------------------------------------------


def keep_finished(out_dir: Path, folder: Path) -> None:
    """A second way to the finished run in `out_dir`, below its `folder` of steps, which go.

    What a failed stage left in `out_dir` DVC deletes before it runs the stage again, and a notebook
    may fail after its training. Weights are linked, so that they take no room twice.
    """
    with draft_of(folder / FINISHED) as draft:
        for name in LEFT:
            _copy(out_dir / name, draft / name)
    for step in list_steps(folder):
        shutil.rmtree(step)


def bring_back(folder: Path, out_dir: Path) -> bool:
    """Put a finished run that was kept into `out_dir`; is there one?"""
    kept = folder / FINISHED
    if not kept.is_dir():
        return False
    for name in LEFT:  # the report, which vouches for all, comes last
        _copy(kept / name, out_dir / name)
    return True


def _copy(source: Path, target: Path) -> None:
    """A file, or a folder of files, which are linked: nothing writes into them."""
    if source.is_dir():
        with draft_of(target) as draft:
            shutil.copytree(source, draft, copy_function=_link, dirs_exist_ok=True)
    else:
        write_bytes(target, source.read_bytes())


def _link(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copy2(source, target)


# ---- the finished model ---------------------------------------------------------------------


def gather_weights(model, is_first: bool) -> dict:
    """name -> CPU tensor of every parameter and saved buffer; ZeRO-3 shards are put together.

    Every rank calls it; only the first keeps the tensors (the others get an empty dict).
    """
    import deepspeed

    weights, saved = {}, set(model.state_dict().keys())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_sharded = hasattr(tensor, "ds_id")
        whole = deepspeed.zero.GatheredParameters([tensor]) if is_sharded else None
        with whole or contextlib.nullcontext():
            if is_first and name in saved:
                weights[name] = tensor.detach().cpu().clone()
    return weights


def save_model(model, weights: dict, processor, final: Path, ranks) -> None:
    """Write the Hugging Face folder `final`, whole or not at all. Every rank calls it; the first
    one's `weights` are those of `gather_weights`."""
    if ranks.is_first:
        with draft_of(final) as draft:
            model.save_pretrained(draft, state_dict=weights)
            processor.save_pretrained(draft)
    ranks.barrier()

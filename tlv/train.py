"""The trainer: DeepSpeed's engine in one visible loop. `python -m tlv.train config.json`

The loss is the sum over answer tokens divided by the number of answer tokens of the whole global
batch (all ranks, all accumulation steps): neither accumulation nor the number of ranks changes it.
DeepSpeed averages gradients over ranks, so each micro-batch's sum is multiplied by their number;
its own division by the accumulation steps is switched off. Taught in notebooks 03 and 04.
Writes into out_dir: checkpoint/ (a tlv folder, with adapter/ in it where adapters were trained),
log.jsonl, report.json and train_config.json.
"""

import argparse
import contextlib
import fcntl
import math
import os
import secrets
import sys
import textwrap
import traceback
from pathlib import Path

import torch

from tlv import checkpoint, lora
from tlv.bad_samples import BadSamples, TooManyBadSamples
from tlv.builders import load_model
from tlv.chat import IGNORE_INDEX
from tlv.config import ConfigError, build, load_json, resolve, resume_root
from tlv.data import VideoTextDataset, make_loader
from tlv.engine import load_zero, start_engine
from tlv.feature_cache import FeatureCache
from tlv.files import write_json, write_text
from tlv.manifest import load_samples
from tlv.order import group_alike, rank_batches, sample_key, sample_stream
from tlv.ranks import Ranks, end_with_launcher, leave, start_ranks
from tlv.recipes import count_warmup_steps, learning_rate, set_trainable
from tlv.runlog import SAID, RunLog, bar, say
from tlv.train_config import TrainConfig, as_dict

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to try."""


# ---- the loop -------------------------------------------------------------------------------


def train(config: TrainConfig, tensorboard: bool = False) -> Ranks:
    """Run one stage from `config`, resuming an unfinished run of the same fingerprint."""
    check_inputs(config)
    ranks = start_ranks(config.device, config.num_threads, config.seed)
    root = resume_root(config.out_dir)
    with lock_run(root) if ranks.is_first else contextlib.nullcontext():
        run_stage(config, ranks, root, tensorboard)
    return ranks


def run_stage(config: TrainConfig, ranks: Ranks, root: Path, tensorboard: bool) -> None:
    """Train from the start, or from the checkpoint found under `root`, to the finished model."""
    out_dir = resolve(config.out_dir)
    mark = ranks.share(checkpoint.fingerprint(config, ranks.world_size) if ranks.is_first else "")
    found, sentence = ranks.share(checkpoint.find_resume(root, mark))
    say(sentence, ranks.is_first)
    check_disk(root, ranks)
    if ranks.is_first:
        checkpoint.remove_others(root, mark)

    # DeepSpeed would round to the precision of training; adapters are drawn in float32.
    dtype = torch.float32 if config.lora or config.quantize else DTYPES[config.precision]
    model, processor = load_model(resolve(config.model_dir), dtype)
    place_selector(processor, ranks.device, config.num_workers)
    if config.gradient_checkpointing:
        model.language_model.activation_checkpointing_enable()
    samples = load_samples(resolve(config.data))
    global_batch = config.micro_batch_size * config.grad_accum_steps * ranks.world_size
    num_steps = config.num_steps or math.ceil(config.num_epochs * len(samples) / global_batch)
    stream = sample_stream(len(samples), config.seed, 0, num_steps * global_batch)
    if config.group_by_length:
        keys = [sample_key(sample) for sample in samples]
        stream = group_alike(stream, keys, global_batch, config.seed)
    batches = rank_batches(stream, config.micro_batch_size, ranks.rank, ranks.world_size)
    val_samples = load_samples(resolve(config.val_data)) if config.val_every else []
    val_batches = rank_batches(range(len(val_samples)), config.micro_batch_size, ranks.rank,
                               ranks.world_size)
    cache = FeatureCache(ranks.device, DTYPES[config.precision])
    data = make_dataset(config, samples, model, processor, cache, stream, ranks)
    val_data = make_dataset(config, val_samples, model, processor, cache, range(len(val_samples)),
                            ranks)
    if config.quantize:
        lora.quantize(model, config.lora, config.quantize, DTYPES[config.precision], ranks.device)
    if config.lora:
        lora.add_adapters(model, config.lora, rank=config.lora_rank, alpha=config.lora_alpha,
                          dropout=config.lora_dropout,
                          adapter_dir=config.adapter_dir and resolve(config.adapter_dir))
    counts = set_trainable(model, config.trainable, config.lora, config.vision_from)
    engine = start_engine(config, model)
    state = {"step": 0, "rows": [], "bad": []}
    if found is not None:
        state = checkpoint.load_step(engine, found, ranks)
    first_step = state["step"]
    bad = BadSamples(config.max_bad_share, state["bad"], list_path=root / "bad_samples.json")
    if ranks.is_first:  # or an earlier run's report would vouch for this one's log and weights
        (out_dir / "report.json").unlink(missing_ok=True)
    log = RunLog(out_dir, ranks.is_first, state["rows"], tensorboard)

    def validate() -> float:
        loss = measure_loss(engine, val_data, val_batches, config, bad, ranks)
        bad.check("val", len(val_samples), len(val_samples), config.val_data)
        return loss

    if config.val_every and first_step == 0:
        log.add({"step": 0, "val_loss": validate()})
    warmup_steps = count_warmup_steps(config.warmup_ratio, num_steps)
    todo = batches[first_step * config.grad_accum_steps :]
    loader = iter(make_loader(data, todo, config.micro_batch_size, config.num_workers))
    progress = bar(ranks.is_first, total=num_steps * global_batch, unit=" samples",
                   initial=first_step * global_batch)

    for step in range(first_step, num_steps):
        micro_batches = [next(loader) for _ in range(config.grad_accum_steps)]
        num_tokens = count_answers(micro_batches, "train", bad, ranks)
        bad.check("train", (step + 1) * global_batch, len(samples), config.data)
        rates = set_learning_rates(engine, step, num_steps, warmup_steps)
        loss, grad_norm = None, None
        if num_tokens:  # else every sample of the global batch is bad: no rank takes this step
            total = 0.0
            for batch in micro_batches:
                nll = answer_nll(engine, batch, ranks.device)
                engine.backward(nll * (ranks.world_size / num_tokens), scale_wrt_gas=False)
                grad_norm = plain_grad_norm(engine)
                engine.step()
                total += nll.item()
            loss = ranks.sum(total)[0] / num_tokens
            if not math.isfinite(loss):
                raise TrainingError(f"step {step + 1}: the loss is {loss}. Lower the learning "
                                    f"rate {rates}, clip with max_grad_norm, or leave fp16")
            grad_norm = grad_norm if grad_norm is not None else engine.get_global_grad_norm()
        done = step + 1
        row = {"step": done, "loss": loss, **rates, "num_tokens": num_tokens,
               "grad_norm": finite(grad_norm)}
        if config.val_every and (done % config.val_every == 0 or done == num_steps):
            row["val_loss"] = validate()
        log.add(row)
        progress.update(global_batch)
        progress.set_postfix_str("" if loss is None else f"step {done} loss {loss:.4f}")
        if config.save_every and done % config.save_every == 0 and done < num_steps:
            state = {"rows": log.rows, "bad": bad.as_list()}
            checkpoint.save_step(engine, root / mark, done, state, ranks)

    progress.close()
    log.close()
    weights = checkpoint.gather_weights(engine.module, ranks.is_first)
    trained = weights
    if config.lora and ranks.is_first:
        before = load_model(resolve(config.model_dir))[0].state_dict() if config.quantize else None
        weights = lora.merge(trained, model.adapter_settings, before)
    checkpoint.save_model(engine.module, weights, processor, out_dir / "checkpoint", ranks)
    if config.lora and ranks.is_first:
        lora.save_adapter(trained, model.adapter_settings, out_dir / "checkpoint" / "adapter")
    if ranks.is_first:
        write_json(out_dir / "train_config.json", as_dict(config))
        write_json(out_dir / "report.json", {
            "fingerprint": mark, "num_steps": num_steps, "global_batch_size": global_batch,
            "num_ranks": ranks.world_size, "num_samples": len(samples),
            "trained_parameters": counts, "num_bad": bad.count(is_used=False),
            "num_noted": bad.count(is_used=True), "bad_samples": bad.as_list(),
            "loss": log.last("loss"), "val_loss": log.last("val_loss")})
        checkpoint.keep_finished(out_dir, root / mark)
    say(f"finished {num_steps} steps: {out_dir / 'checkpoint'}", ranks.is_first)
    ranks.barrier()  # without it the end of a ZeRO-3 run was seen to abort
    engine.destroy()


# ---- one micro-batch ------------------------------------------------------------------------


def answer_nll(engine, batch: dict, device) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the micro-batch's answer tokens, a float32 scalar.

    Only the positions that predict an answer token in some row go through the LLM's head.
    """
    clips, key = batch["clips"], batch["clip_key"]
    moved = clips.to(device) if torch.is_tensor(clips) else [clip.to(device) for clip in clips]
    targets = batch["labels"][:, 1:].to(device)  # (R, L - 1)
    keep = (targets != IGNORE_INDEX).any(dim=0).nonzero().flatten()  # (K,)
    keep = keep if len(keep) else torch.zeros(1, dtype=torch.long, device=device)
    rows = {name: batch[name].to(device)
            for name in ("input_ids", "attention_mask", "position_ids", "video_index", "queries")
            if name in batch}
    if "keyframes" in batch:
        rows["keyframes"] = batch["keyframes"]
    output = engine(**rows, use_cache=False, logits_to_keep=keep, **{key: moved})
    return torch.nn.functional.cross_entropy(
        output.logits.float().flatten(0, 1), targets[:, keep].flatten(), reduction="sum",
        ignore_index=IGNORE_INDEX)


def count_answers(micro_batches, split: str, bad: BadSamples, ranks: Ranks) -> int:
    """Answer tokens of the micro-batches of all ranks; their bad samples are noted on each."""
    mine = [sample for batch in micro_batches for sample in batch["bad"]]
    # The first token of a row is never predicted.
    num = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches)
    num_tokens, num_bad = ranks.sum(num, len(mine))
    if num_bad:
        for theirs in ranks.gather(mine):
            bad.add(split, theirs)
    return int(num_tokens)


@torch.no_grad()
def measure_loss(engine, data, batches, config, bad: BadSamples, ranks: Ranks) -> float:
    """Loss per answer token over a whole split, all ranks together."""
    engine.eval()
    total, count = 0.0, 0
    for batch in make_loader(data, batches, config.micro_batch_size, config.num_workers):
        count += count_answers([batch], "val", bad, ranks)
        total += answer_nll(engine, batch, ranks.device).item()
    engine.train()
    return ranks.sum(total)[0] / max(count, 1)


def set_learning_rates(engine, step: int, num_steps: int, warmup_steps: int) -> dict[str, float]:
    """Give each group its rate of this step; return them by name, as the log holds them."""
    rates = {}
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(step, num_steps, warmup_steps, group["peak"])
        rates[f"lr_{group['part']}"] = group["lr"]
    return rates


def finite(value) -> float | None:
    """`value` as JSON holds it: None where there is none, as when fp16 skips a step."""
    return float(value) if value is not None and math.isfinite(value) else None


def plain_grad_norm(engine) -> float | None:
    """The gradient's norm where DeepSpeed does not measure it: fp32 without ZeRO."""
    if engine.zero_optimization_stage() > 0 or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


# ---- before the loop ------------------------------------------------------------------------


def check_inputs(config: TrainConfig) -> None:
    """Every path of the config, before anything is started."""
    files = {"data": config.data, "val_data": config.val_data, "zero_config": config.zero_config,
             "model_dir": str(Path(config.model_dir) / "config.json"),
             "adapter_dir": config.adapter_dir and str(Path(config.adapter_dir) / lora.WEIGHTS)}
    for name, path in files.items():
        if path is not None and not resolve(path).is_file():
            raise ConfigError(f"{name} = {path}: {resolve(path)} does not exist; run the stage "
                              "that writes it, or correct the path")
    if not resolve(config.videos_dir).is_dir():
        raise ConfigError(f"videos_dir = {config.videos_dir}: {resolve(config.videos_dir)} is no "
                          "folder; it is named in the data card (world.json)")
    zero = load_zero(config.zero_config)
    if config.optimizer == "muon" and (zero.get("stage") or config.precision != "fp32"):
        raise ConfigError(f"optimizer = 'muon' with {config.zero_config} and precision = "
                          f"{config.precision!r}: it needs whole matrices; take fp32 and ZeRO 0, "
                          "or 'adamw'")
    if config.precision == "fp16" and not zero.get("stage"):
        raise ConfigError(f"precision = 'fp16' with {config.zero_config}: without ZeRO DeepSpeed "
                          "divides the gradients by a loss scale that it never multiplied the "
                          "loss by; take ZeRO 1 to 3, or 'bf16'")
    if config.quantize and zero.get("stage") == 3:
        raise ConfigError(f"quantize = {config.quantize!r}, but {config.zero_config} shares out "
                          "every matrix; take ZeRO 0 to 2")
    if config.quantize:
        lora.find_bitsandbytes(config.quantize)


@contextlib.contextmanager
def lock_run(root: Path):
    """Hold the stage's lock, also released by kill -9: no two runs may write the same files."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{root / 'lock'} is held: another run of this stage is alive; "
                                "wait for it or stop it") from None
        yield


def check_disk(root: Path, ranks: Ranks) -> None:
    """All ranks write into one checkpoint: refuse machines that do not share a disk."""
    word = ranks.share(secrets.token_hex() if ranks.is_first else "")
    if ranks.is_first:
        write_text(root / "disk", word)
    ranks.barrier()
    seen = ranks.gather((root / "disk").is_file() and (root / "disk").read_text() == word)
    if not all(seen):
        raise TrainingError(f"{root} is not the same folder on all machines (rank "
                            f"{seen.index(False)} does not see it): put the project on a disk that "
                            "they share, at one path")


def place_selector(processor, device: torch.device, num_workers: int) -> None:
    """Move the selector, where there is one, to where the model computes."""
    if processor.selector is not None and num_workers and device.type != "cpu":
        raise ConfigError(f"num_workers = {num_workers}: this model chooses keyframes with an "
                          "encoder on the GPU, which worker processes cannot use; take 0")
    processor.to(device)


def make_dataset(config, samples, model, processor, cache, indices, ranks) -> VideoTextDataset:
    """The dataset of one split; with cache_features its clips (those of the samples `indices`) are
    encoded here, each once."""
    data = VideoTextDataset(samples, resolve(config.videos_dir), model, processor,
                            template=config.template, turns=config.turns,
                            timeout_s=config.decode_timeout_s,
                            gap_seed=config.seed if config.spread_positions else None)
    if config.cache_features:
        cache.fill(model, data, indices, lambda items: bar(ranks.is_first, iterable=items,
                                                    desc="encoding clips"), ranks)
        data.cache = cache
    return data


# ---- the command ----------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """`python -m tlv.train config.json [--tensorboard]`"""
    parser = argparse.ArgumentParser(prog="python -m tlv.train")
    parser.add_argument("config", help="a TrainConfig as JSON, as tlv.launch writes it")
    parser.add_argument("--tensorboard", action="store_true", help="also draw the log there")
    options = parser.parse_args(arguments)
    if os.environ.get("TLV_END_WITH_PARENT"):
        end_with_launcher()
    try:
        config = build(TrainConfig, load_json(options.config), options.config)
        leave(train(config, options.tensorboard))
    except (ValueError, TrainingError, TooManyBadSamples) as error:  # whose words say what to do
        traceback.print_exc()
        print(textwrap.indent(str(error), SAID), file=sys.stderr, flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])

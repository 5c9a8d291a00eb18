"""The paper preset without its weights: the published numbers stand in its YAML files, the files
are read by the code that runs, and they train small random folders of the same architectures.

The settings are built by the notebooks' own cells, so that a name that a notebook does not pass on
cannot stay unnoticed. Published values: TinyLLaVA-Video, scripts/train/qwen2 (arXiv 2501.15513).
"""

import ast
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_manifest import make_sample, make_world

from tlv import ROOT, ask, chat, notebooks, recipes, train
from tlv.builders import build_model, load_model
from tlv.config import build, load_json, load_params, resolve
from tlv.data import VideoTextDataset
from tlv.designs import paper_config
from tlv.launch import LaunchConfig, command, launch
from tlv.manifest import load_samples
from tlv.notebook_parameters import defaults_of
from tlv.recipes import count_warmup_steps, learning_rate, set_trainable
from tlv.runlog import read_log
from tlv.stage import load_stage_params
from tlv.train_config import TrainConfig

STAGES = ["03_pretraining", "04_sft"]
PUBLISHED = {  # stage: peak rates, global batch, accumulation on four GPUs
    "03_pretraining": ({"connector": 1e-4, "llm": None, "vision": None}, 128, 4),
    "04_sft": ({"connector": 2e-5, "llm": 2e-5, "vision": None}, 64, 2),
}


def settings(name: str, preset: str = "paper", **changed) -> TrainConfig:
    """The TrainConfig that the notebook builds from the preset's YAML: its own lines, run here."""
    notebook = notebooks.read(notebooks.FOLDER / f"{name}.ipynb")
    values = load_stage_params(name, preset, notebook) | changed
    defaults = defaults_of(notebook)
    world = ROOT / values["world_dir"]
    names = defaults | values | {
        "build": build, "TrainConfig": TrainConfig, "recipes": recipes, "ranks": ranks(preset),
        "start_dir": "model", "manifest": "data.json",
        "card": {key: world / key for key in ("videos_dir", "val_captions", "val_qa")}}
    cells = [c.source for c in notebook.cells
             if c.cell_type == "code" and "build(TrainConfig" in c.source]
    line = next(node for node in ast.parse(cells[0]).body if "TrainConfig" in ast.unparse(node))
    exec(compile(ast.Module([line], []), name, "exec"), names)  # config = build(TrainConfig, ...)
    return names["config"]


def ranks(preset: str = "paper") -> LaunchConfig:
    folder = ROOT / "params" / preset.split("/")[0]  # own/image starts as own does
    return build(LaunchConfig, load_params(folder / "launch.yaml"))


@pytest.mark.parametrize("name", STAGES)
def test_the_published_recipe_stands_in_the_yaml(name):
    config, (rates, global_batch, accumulation) = settings(name), PUBLISHED[name]
    assert config.learning_rates() == rates
    assert set(config.trainable) == {part for part, rate in rates.items() if rate}
    assert config.micro_batch_size == 8 and config.grad_accum_steps == accumulation
    assert 8 * accumulation * ranks().world_size == global_batch
    assert (config.num_epochs, config.num_steps) == (1, None)
    assert config.warmup_ratio == 0.03 and config.weight_decay == 0.0
    assert config.max_grad_norm is None
    assert config.precision == "bf16" and config.gradient_checkpointing
    assert load_json(resolve(config.zero_config))["zero_optimization"]["stage"] == 3
    assert config.template == ("pretrain" if name == "03_pretraining" else None)  # the model's own
    assert config.turns == "packed" and config.seed == 42
    assert config.num_threads == 4  # of the machine's 16 a rank's share


@pytest.mark.parametrize("name, rate, llm_rate, global_batch", [
    ("03_pretraining", 1e-3, None, 256), ("04_sft", 2e-5, 2e-5, 128)])  # fmt: skip
def test_the_image_models_recipe_is_tinyllavas(name, rate, llm_rate, global_batch):
    config = settings(name, "paper/image")
    assert config.learning_rates() == {"connector": rate, "llm": llm_rate, "vision": None}
    samples = config.micro_batch_size * config.grad_accum_steps * ranks().world_size
    assert samples == global_batch and config.precision == "fp16" and config.num_epochs == 1
    assert config.group_by_length == (name == "04_sft")


@pytest.mark.parametrize("recipe, name, stage, rates", [
    ("share", "03_pretraining", "pretrain", (1e-3, None, None)),
    ("share", "03_pretraining", "pretrain_share", (2e-5, 2e-5, 2e-5)),
    ("share_frozen", "03_pretraining", "pretrain_share", (2e-5, 2e-5, None)),
    ("share", "04_sft", "", (2e-5, 2e-5, None)),
    ("lora", "03_pretraining", "pretrain", (1e-3, None, None)),
    ("lora", "04_sft", "", (2e-4, 2e-4, None)), ("qlora", "04_sft", "", (2e-4, 2e-4, None)),
])  # fmt: skip
def test_another_recipe_brings_its_own_rates(recipe, name, stage, rates):
    """README names these settings alone; rates in the YAML would stand in their way."""
    config = settings(name, "paper/image", recipe=recipe, **({"stage": stage} if stage else {}))
    assert config.learning_rates() == dict(zip(("connector", "llm", "vision"), rates, strict=True))


WORLD = "outputs/paper/00_toy_world/world"
PUBLISHED_MODELS = {  # the whole of 02_architecture.yaml, as the published configs and scripts say
    "paper": dict(
        seed=42, world_dir=WORLD, connector_type="group_resampler", num_queries=512, num_groups=16,
        num_resampler_layers=3, resampler_heads=8, resampler_head_dim=64, num_frames=16,
        sampling="uniform", template="qwen2_base", drop_first_patch=True, position_dtype="float16",
        max_seq_len=3072, long_rows="cut"),
    "paper/image": dict(
        seed=42, world_dir=f"{WORLD}/pictures", connector_type="mlp2x_gelu", num_frames=1,
        sampling="uniform", template="phi", drop_first_patch=True, max_seq_len=2048,
        long_rows="cut"),
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED_MODELS)
def test_the_published_model_stands_in_the_yaml(preset):
    values = load_params(ROOT / f"params/{preset}/02_architecture.yaml")
    assert values == PUBLISHED_MODELS[preset]


def test_the_yamls_model_is_the_one_whose_parameters_are_counted():
    config, values = paper_config(), load_params(ROOT / "params/paper/02_architecture.yaml")
    for name in ("seed", "world_dir", "long_rows"):  # on which no shape hangs
        del values[name]
    assert {name: getattr(config, name) for name in values} == values
    # what the YAML leaves open is what every model takes by itself
    assert (config.vision_feature_layer, config.image_mode) == (-2, "square")


@pytest.mark.parametrize("preset, dtype", [("paper", "float32"), ("paper/image", "float16")])
def test_published_models_answer_as_upstream_asks_them(preset, dtype):
    values = load_params(ROOT / f"params/{preset}/05_evaluation.yaml")
    assert (values["dtype"], values["max_new_tokens"]) == (dtype, 1024)
    assert values["num_clips"] == 0  # all


@pytest.mark.parametrize("preset", ["own", "own/image"])
def test_the_own_preset_has_the_numbers_of_custom_finetune(preset):
    """TinyLLaVA Factory's: rank 128, alpha 256, rate 1e-4, 4 x 8 x 4 = 128, here on one device."""
    config = settings("04_sft", preset)
    assert (config.lora, config.lora_rank, config.lora_alpha) == (("llm",), 128, 256.0)
    assert config.learning_rates() == {"connector": 1e-4, "llm": 1e-4, "vision": None}
    assert (config.micro_batch_size, config.grad_accum_steps) == (2, 64)
    assert ranks(preset).world_size == 1 and config.num_epochs == 1
    assert load_params(ROOT / f"params/{preset}/02_architecture.yaml")["max_seq_len"] == 3072


@pytest.mark.parametrize("name, num_samples, steps", [
    ("03_pretraining", 397_000, 3_102), ("04_sft", 491_000, 7_672)])  # fmt: skip
def test_warmup_and_cosine_are_the_published_ones(name, num_samples, steps):
    config, (rates, global_batch, _) = settings(name), PUBLISHED[name]
    num_steps = math.ceil(num_samples / global_batch)
    assert num_steps == steps
    warmup, peak = count_warmup_steps(config.warmup_ratio, num_steps), rates["connector"]
    assert warmup == math.ceil(0.03 * steps)
    middle = warmup + (num_steps - warmup) / 2
    found = [learning_rate(s, num_steps, warmup, peak) for s in (0, warmup, middle, num_steps)]
    assert found == pytest.approx([0.0, peak, peak / 2, 0.0], abs=1e-12)


def test_the_launch_command_starts_four_ranks_on_one_machine():
    assert command("config.json", ranks(), 29500) == [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--nnodes=1",
        "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=29500", "--module",
        "tlv.train", "config.json"]


@pytest.mark.parametrize("side", ["", "/image"])
@pytest.mark.parametrize("preset", ["tiny", "gpu", "paper", "own"])
@pytest.mark.parametrize("name", STAGES)
def test_every_preset_gives_settings_that_the_trainer_takes(name, preset, side):
    preset += side
    config = settings(name, preset)
    assert config.out_dir == f"outputs/{preset}/{name}" and resolve(config.zero_config).is_file()
    launch_path = load_params(ROOT / f"params/{preset}/{name}.yaml")["launch_config"]
    assert build(LaunchConfig, load_params(ROOT / launch_path)).num_nodes == 1


# ---- three steps on small random folders ----------------------------------------------------


@pytest.fixture(scope="module")
def paper_model(build_tiny, tmp_path_factory):
    """A SigLIP-form encoder and a Qwen2-form LLM, put together as params/paper/02 says."""
    values = load_params(ROOT / "params/paper/02_architecture.yaml")
    kept = ("connector_type", "sampling", "template", "drop_first_patch", "position_dtype")
    folder = tmp_path_factory.mktemp("paper") / "model"
    for part in build_tiny(max_seq_len=512, **{key: values[key] for key in kept}):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_both_stages_run_three_steps_as_the_preset_says(paper_model, tmp_path, monkeypatch):
    """The YAML with smaller counts and a CPU: bf16, ZeRO-3 and gradient checkpointing stay."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    world = make_world(tmp_path / "world", 6)
    model_dir = paper_model
    for name, num_ranks in zip(STAGES, (1, 2), strict=True):
        config = dataclasses.replace(
            settings(name), model_dir=str(model_dir), data=str(world / "data.json"),
            val_data=None, videos_dir=str(world), out_dir=str(tmp_path / name), num_steps=3,
            num_epochs=None, micro_batch_size=1, num_workers=0, num_threads=1, device="cpu")
        assert config.precision == "bf16" and config.gradient_checkpointing
        final = launch(config, dataclasses.replace(ranks(), num_ranks=num_ranks))
        check_run(config, num_ranks, Path(model_dir), final)
        model_dir = final


@pytest.mark.slow
def test_the_own_preset_tunes_adapters_on_one_device(vision_dir, llm_dir, tmp_path, monkeypatch):
    """Any encoder and LLM, here small random folders: both stages, then a question."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    values = load_params(ROOT / "params/own/02_architecture.yaml")
    fields = {key: value for key, value in values.items() if key not in ("seed", "world_dir")}
    fields |= dict(num_queries=8, num_groups=4, num_frames=4, max_seq_len=512)
    model_dir = tmp_path / "start"
    for part in build_model(vision_dir, llm_dir, **fields):
        part.save_pretrained(model_dir)
    world = make_world(tmp_path / "world", 4)
    for name in STAGES:
        config = dataclasses.replace(
            settings(name, "own"), model_dir=str(model_dir), data=str(world / "data.json"),
            val_data=None, videos_dir=str(world), out_dir=str(tmp_path / name), num_steps=2,
            num_epochs=None, micro_batch_size=1, grad_accum_steps=2, num_workers=0,
            num_threads=1, device="cpu")
        assert config.lora == (("llm",) if name == "04_sft" else ())
        model_dir = launch(config, ranks("own"))
    assert (tmp_path / "04_sft/checkpoint/adapter/adapter_config.json").is_file()
    told = ask.ask(world / "0.mp4", "What happens?", model_dir, max_new_tokens=4)
    assert "frames looked at: 4 of 6" in told


@pytest.mark.slow
def test_the_image_models_stages_run_three_steps_in_fp16(
    build_tiny, fp16_here, tmp_path, monkeypatch
):
    """ZeRO-3 and gradient checkpointing stay; in this process, whose CPU can be said to have it."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    values = load_params(ROOT / "params/paper/image/02_architecture.yaml")
    kept = ("connector_type", "num_frames", "template", "drop_first_patch", "long_rows")
    model_dir = tmp_path / "model"
    for part in build_tiny(max_seq_len=512, **{key: values[key] for key in kept}):
        part.save_pretrained(model_dir)
    samples = [make_sample(i, "") for i in range(6)]
    for i, sample in enumerate(samples):
        del sample["video"]
        sample["image"] = f"{i}.png"
        sample["conversations"][0]["value"] = "<image>\nWhat is this?"
        Image.new("RGB", (20, 24), (40 * i, 10, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for name in STAGES:
        config = dataclasses.replace(
            settings(name, "paper/image"), model_dir=str(model_dir), val_data=None,
            data=str(tmp_path / "data.json"), videos_dir=str(tmp_path), num_steps=3,
            out_dir=str(tmp_path / name), num_epochs=None, micro_batch_size=1,
            grad_accum_steps=2, num_workers=0, num_threads=1, device="cpu")
        assert config.precision == "fp16" and config.gradient_checkpointing
        train.train(config)
        final = tmp_path / name / "checkpoint"
        check_run(config, 1, model_dir, final, torch.float16)
        model_dir = final
    told = ask.ask(tmp_path / "0.png", "What is this?", model_dir, max_new_tokens=4)
    assert "frames looked at: the picture" in told


def check_run(config: TrainConfig, num_ranks: int, start: Path, final: Path,
              dtype: torch.dtype = torch.bfloat16) -> None:
    rows = read_log(Path(config.out_dir) / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    for part in config.trainable:
        peak = config.learning_rates()[part]
        assert [row[f"lr_{part}"] for row in rows] == [learning_rate(s, 3, 1, peak)
                                                       for s in range(3)]
    report = json.loads((Path(config.out_dir) / "report.json").read_text())
    assert report["num_ranks"] == num_ranks and report["num_bad"] == 0
    model, _ = load_model(final)
    counts = set_trainable(model, config.trainable)
    assert report["trained_parameters"] == counts
    before, after = (load_file(folder / "model.safetensors") for folder in (start, final))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    changed = {name.split(".")[0] for name, tensor in before.items()
               if not torch.equal(tensor.to(dtype), after[name])}
    modules = {"connector": "connector", "llm": "language_model"}
    assert changed == {modules[part] for part in config.trainable}


def test_rows_of_both_stages_have_the_published_form(paper_model, tmp_path):
    world = make_world(tmp_path / "world", 1)
    model, processor = load_model(paper_model)
    samples = load_samples(world / "data.json")
    texts = {}
    for name in STAGES:
        config = settings(name)
        data = VideoTextDataset(samples, world, model, processor, template=config.template,
                                turns=config.turns)
        (row,) = data[0]["rows"]
        learnt = [i for i in row["labels"] if i != chat.IGNORE_INDEX]
        texts[name] = (processor.tokenizer.decode(row["input_ids"]).replace("<video>", ""),
                       processor.tokenizer.decode(learnt))
    (q1, a1), (q2, a2) = chat.parse_conversation(samples[0])
    assert texts["03_pretraining"] == (f"{a1}\n{a2}\n", f"{a1}\n{a2}\n")
    whole, learnt = texts["04_sft"]
    end = "<|endoftext|>"
    assert whole.startswith("A chat between a curious user")
    first = f"USER: \nWhat happens? ASSISTANT: {a1}{end}"
    assert whole.endswith(f"{first}USER: {q2} ASSISTANT: {a2}{end}")
    assert learnt == f" {a1}{end} {a2}{end}"

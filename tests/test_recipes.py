"""What is trained and how fast."""

import math
import re

import pytest
import torch

from tlv.config import build
from tlv.designs import make_design, paper_config
from tlv.lora import add_adapters
from tlv.model import TlvForConditionalGeneration
from tlv.recipes import (
    RECIPES,
    count_warmup_steps,
    learning_rate,
    parameter_groups,
    part_module,
    published,
    set_trainable,
)
from tlv.train_config import TrainConfig


class Model(torch.nn.Module):
    """The three parts of the real model, as small as can be."""

    def __init__(self):
        super().__init__()
        self.vision_encoder = torch.nn.Linear(3, 4)
        self.connector = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
        self.language_model = torch.nn.Linear(5, 7, bias=False)


def test_only_the_named_parts_are_trainable():
    model = Model()
    counts = set_trainable(model, ("connector", "llm"))
    assert counts == {"connector": 35, "llm": 35, "vision": 0}
    set_trainable(model, ("connector",))  # a second stage starts from a frozen model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector.0.weight", "connector.0.bias", "connector.1.weight",
                       "connector.1.bias"}


def test_an_unknown_part_lists_the_right_ones():
    with pytest.raises(KeyError, match="connector, llm, vision"):
        part_module(Model(), "projector")


def test_groups_have_the_rate_of_their_part_and_no_decay_on_biases_and_norms():
    model = Model()
    set_trainable(model, ("connector", "llm"))
    groups = parameter_groups(model, {"connector": 1.0, "llm": 0.5, "vision": None}, 0.1)
    seen = [(g["part"], g["peak"], g["weight_decay"], len(g["params"])) for g in groups]
    assert seen == [("connector", 1.0, 0.1, 1), ("connector", 1.0, 0.0, 3), ("llm", 0.5, 0.1, 1)]


def test_the_schedule_is_the_published_one():
    from transformers import get_cosine_schedule_with_warmup

    num_steps, warmup = 57, count_warmup_steps(0.03, 57)
    assert warmup == 2
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        ours = learning_rate(step, num_steps, warmup, 2e-5)
        assert math.isclose(ours, schedule.get_last_lr()[0], rel_tol=1e-12, abs_tol=1e-20)
        optimizer.step()
        schedule.step()


def test_the_schedule_reaches_its_peak_and_ends_near_zero():
    rates = [learning_rate(s, 100, 3, 1.0) for s in range(100)]
    assert max(rates) == rates[3] == 1.0 and rates[0] == 0.0 and rates[-1] < 1e-3
    assert learning_rate(0, 1, 0, 1.0) == 1.0  # one step, no warm-up


# ---- published numbers ----------------------------------------------------------------------

STAGES = [(recipe, stage) for recipe, stages in RECIPES.items() for stage in stages]
PATHS = dict(model_dir="m", data="d", videos_dir="v", out_dir="o", num_steps=1)
ALIGN, TUNE, ADAPT = (1e-3, None, None), (2e-5, 2e-5, None), (2e-4, 2e-4, None)
NUMBERS = {  # (recipe, stage): peak rates of connector, LLM and encoder; with adapters; in few bits
    # TinyLLaVA section 3; TinyLLaVA Factory's pretrain.sh, finetune.sh and share/
    ("base", "pretrain"): (ALIGN, (), None),
    ("base", "sft"): (TUNE, (), None),
    ("share", "pretrain"): (ALIGN, (), None),
    ("share", "pretrain_share"): ((2e-5, 2e-5, 2e-5), (), None),
    ("share", "sft"): (TUNE, (), None),
    ("share_frozen", "pretrain"): (ALIGN, (), None),
    ("share_frozen", "pretrain_share"): (TUNE, (), None),
    ("share_frozen", "sft"): (TUNE, (), None),
    # Factory's lora/finetune_lora.sh and lora/finetune_qlora.sh; lora_vision and qlora_nf4 were
    # never published and have the same numbers
    ("lora", "pretrain"): (ALIGN, (), None),
    ("lora", "sft"): (ADAPT, ("llm",), None),
    ("lora_vision", "pretrain"): (ALIGN, (), None),
    ("lora_vision", "sft"): ((2e-4, 2e-4, 2e-4), ("llm", "vision"), None),
    ("qlora", "pretrain"): (ALIGN, (), None),
    ("qlora", "sft"): (ADAPT, ("llm",), "int8"),
    ("qlora_nf4", "pretrain"): (ALIGN, (), None),
    ("qlora_nf4", "sft"): (ADAPT, ("llm",), "nf4"),
    # TinyLLaVA-Video's scripts/train/qwen2
    ("video", "pretrain"): ((1e-4, None, None), (), None),
    ("video", "sft"): (TUNE, (), None),
}


def test_every_recipe_and_stage_has_its_published_numbers():
    assert list(NUMBERS) == STAGES


@pytest.mark.parametrize("recipe, stage", NUMBERS)
def test_the_published_numbers(recipe, stage):
    """Typed out from papers and scripts. Batches, epochs and lengths: for base and video see
    tests/test_paper_preset.py; those of the others are comments in params/paper/image/."""
    rates, adapted, bits = NUMBERS[recipe, stage]
    config = build(TrainConfig, PATHS | published(recipe, stage))
    assert (config.lr_connector, config.lr_llm, config.lr_vision) == rates
    assert (config.lora, config.quantize) == (adapted, bits)
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (128, 256.0, 0.05)
    assert (config.optimizer, config.warmup_ratio, config.weight_decay) == ("adamw", 0.03, 0.0)
    assert config.max_grad_norm is None  # DeepSpeed's files name none


# ---- census ---------------------------------------------------------------------------------

QWEN, ADAPTERS = 3_085_938_688, 36 * 128 * (2 * 2048 + 2 * (2048 + 256) + 2 * 2048
                                            + 3 * (2048 + 11_008))  # fmt: skip
# of the encoder, layers 12 to 25 of 0 to 26: the last one is not seen
VISION = {("share", "pretrain_share"): 14 * 15_239_504,
          ("lora_vision", "sft"): 26 * 128 * (4 * 2 * 1152 + 2 * (1152 + 4304))}
LLM = {"pretrain": 0, "pretrain_share": QWEN, "sft": QWEN}


@pytest.mark.parametrize("recipe, stage", STAGES)
def test_what_each_recipe_trains_at_the_published_size(recipe, stage):
    """The census of every recipe and stage, of TinyLLaVA-Video's shapes without numbers."""
    config = build(TrainConfig, PATHS | RECIPES[recipe][stage])
    with torch.device("meta"):
        model = TlvForConditionalGeneration(paper_config())
        if config.lora:
            add_adapters(model, config.lora, rank=config.lora_rank, alpha=config.lora_alpha,
                         dropout=config.lora_dropout)  # fmt: skip
    counts = set_trainable(model, config.trainable, config.lora, config.vision_from)
    wanted = ADAPTERS if config.lora else LLM[stage]
    assert counts == {"connector": 115_714_048, "llm": wanted,
                      "vision": VISION.get((recipe, stage), 0)}  # fmt: skip
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained if n.startswith("language_model.")) or not config.lora
    layers = {int(n.split("layers.")[1].split(".")[0]) for n in trained if "vision_enc" in n}
    seen = {("share", "pretrain_share"): range(12, 26), ("lora_vision", "sft"): range(26)}
    assert layers == set(seen.get((recipe, stage), ()))


def test_a_recipe_is_chosen_by_name_and_what_is_given_replaces_its_own():
    chosen = published("lora", "sft", lr_llm=1e-3, lora_rank=None)
    assert chosen == RECIPES["lora"]["sft"] | {"lr_llm": 1e-3} and chosen["lora_rank"] == 128
    with pytest.raises(ValueError, match="'full' is no recipe; known are base, share"):
        published("full", "sft")
    with pytest.raises(ValueError, match="'second' is no stage of the recipe 'base'; known are"):
        published("base", "second")


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "facebook/dinov2-large",
                                  "CLIP + DINOv2"])
def test_other_encoders_are_partly_tuned_from_the_same_share_of_their_depth(name):
    with torch.device("meta"):
        design = make_design(name, "Qwen/Qwen2-0.5B", connector_type="linear")
        model = TlvForConditionalGeneration(design)
    whole = set_trainable(model, ("vision",), (), 0)["vision"]
    part = set_trainable(model, ("vision",), (), 12 / 27)["vision"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    numbers = {int(re.search(r"layers?\.(\d+)\.", n)[1]) for n in trained}
    assert numbers == set(range(11, 23))  # 12 of 27 is 10.7 of 24; the last one is never seen
    a_layer = 12 * 1024**2 + 13 * 1024  # weights and biases, and the two norms
    scales = 2 * 1024 if name == "facebook/dinov2-large" else 0  # DINOv2 scales both branches
    encoders = 2 if name == "CLIP + DINOv2" else 1
    assert part == 12 * encoders * (a_layer + scales) + 12 * 2 * 1024 * (encoders - 1)
    assert part < whole < sum(p.numel() for p in model.vision_encoder.parameters())


def test_every_trained_parameter_of_the_encoder_gets_a_gradient(tiny):
    model, _ = tiny
    for share in (0.0, 12 / 27):
        set_trainable(model, ("vision",), (), share)
        model.zero_grad()
        model.vision_features(torch.randn(1, 3, 16, 16)).square().sum().backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(p.grad is not None for p in trained.values())
        assert any("embeddings" in n for n in trained) == (share == 0)


def test_a_part_with_nothing_left_to_train_is_refused(tiny):
    with pytest.raises(ValueError, match="'vision', but nothing .* with vision_from = 1"):
        set_trainable(tiny[0], ("vision",), (), 1.0)

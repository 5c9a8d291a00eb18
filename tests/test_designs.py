"""What published designs cost, against the numbers of the papers and of their checkpoints."""

import pytest

from tlv import ROOT
from tlv.connectors import CONNECTORS
from tlv.designs import (
    CONNECTOR_SIZES,
    ENCODERS,
    LLMS,
    count_parameters,
    count_tokens,
    make_design,
    tabulate_designs,
)

CLIP, SIGLIP, DINO, MIXTURE = ENCODERS
TINYLLAMA, STABLELM, PHI, GEMMA, OPENELM, QWEN_HALF, QWEN = LLMS


@pytest.mark.parametrize(
    "encoder, llm, connector, total",
    [
        (SIGLIP, QWEN, dict(connector_type="group_resampler"), 3_629_878_336),
        (SIGLIP, QWEN, dict(connector_type="naive_resampler"), 3_630_861_376),
        (SIGLIP, PHI, dict(connector_type="naive_resampler"), 3_385_238_080),
        (SIGLIP, GEMMA, dict(connector_type="group_resampler"), 3_050_112_064),
    ],
)
def test_totals_of_the_published_checkpoints(encoder, llm, connector, total):
    assert count_parameters(make_design(encoder, llm, **connector))["total"] == total


@pytest.mark.parametrize(
    "llm, billions",
    [(TINYLLAMA, 1.1), (STABLELM, 1.6), (PHI, 2.8), (GEMMA, 2.5), (OPENELM, 0.5),
     (QWEN_HALF, 0.5), (QWEN, 3.1)],  # fmt: skip
)
def test_llms_are_as_large_as_their_names_say(llm, billions):
    counts = count_parameters(make_design(CLIP, llm, connector_type="linear"))
    assert round(counts["llm"] / 1e9, 1) == billions
    assert counts["vision"] == 303_507_456  # 0.3 billion


@pytest.mark.parametrize(
    "encoder, connector, num_frames, tokens",
    [
        (CLIP, "mlp2x_gelu", 1, 576),
        (SIGLIP, "mlp2x_gelu", 1, 729),
        (DINO, "linear", 1, 16 * 16),  # positions for 518 pixels, pictures of 224
        (MIXTURE, "mof_mlp", 1, 1152),
        (SIGLIP, "group_resampler", 16, 512),
        (SIGLIP, "frame_resampler", 16, 512),
        (CLIP, "naive_resampler", 64, 512),
        (CLIP, "mlp2x_gelu", 16, 16 * 576),
    ],
)
def test_tokens_of_a_picture_and_of_clips(encoder, connector, num_frames, tokens):
    assert count_tokens(make_design(encoder, QWEN, connector_type=connector), num_frames) == tokens


@pytest.mark.parametrize(
    "names, message",
    [
        (("siglip", QWEN), "encoder 'siglip' is unknown; known are openai/clip-.*, CLIP . DINOv2"),
        ((SIGLIP, "Qwen2.5-3B"), "llm 'Qwen2.5-3B' is unknown; known are TinyLlama/.*-3B"),
    ],
)
def test_an_unknown_part_is_refused_with_the_known_ones(names, message):
    with pytest.raises(ValueError, match=message):
        make_design(*names)


def test_the_list_of_weights_names_every_part_of_the_designs():
    text = (ROOT / "data" / "README.md").read_text()
    singles = [name for name in ENCODERS if name != MIXTURE]
    assert [name for name in (*LLMS, *singles) if name not in text] == []


def test_connectors_that_are_compared_give_as_many_tokens():
    groups = {"group_resampler": 16, "naive_resampler": 16, "frame_resampler": 16, "mean_pool": 8}
    for connector, num_groups in groups.items():
        design = make_design(SIGLIP, QWEN, connector_type=connector, num_groups=num_groups)
        assert count_tokens(design, 16) == 512, connector


def test_siglip_without_its_first_patch_gives_728_tokens():
    design = make_design(SIGLIP, QWEN, connector_type="linear", drop_first_patch=True)
    assert count_tokens(design, 1) == 728


def test_the_table_of_designs_counts_what_building_each_would_give():
    table = tabulate_designs()
    mixed = {("CLIP + DINOv2", "mof_mlp"), ("CLIP + DINOv2", "identity")}  # 2048 wide, as TinyLlama
    everywhere = {name for name in CONNECTOR_SIZES if name not in ("identity", "mof_mlp")}
    assert set(table) == mixed | {(e, name) for e in ENCODERS for name in everywhere}
    assert [table[encoder, "linear"]["picture"] for encoder in ENCODERS] == [576, 729, 256, 576]
    assert table[MIXTURE, "mof_mlp"]["picture"] == 1152
    only = [llm for llm in LLMS if table[MIXTURE, "identity"][llm]]
    assert only == [TINYLLAMA, STABLELM, GEMMA, QWEN]
    for encoder, name in ((SIGLIP, "mlp2x_gelu"), (CLIP, "qformer"), (MIXTURE, "mof_mlp")):
        fields = dict(connector_type=name, **CONNECTOR_SIZES[name])
        total = count_parameters(make_design(encoder, QWEN_HALF, **fields))["total"]
        assert table[encoder, name][QWEN_HALF] == total


def test_connectors_of_the_table_are_all_that_there_are_in_their_published_sizes():
    assert list(CONNECTOR_SIZES) == [name.replace("{N}", "2") for name in CONNECTORS]
    cells = tabulate_designs()
    linear = cells[CLIP, "linear"][TINYLLAMA]
    more = {"mlp2x_gelu": 6_295_552, "resampler": 115_648_512, "bench_resampler": 24_101_376}
    for name, wanted in more.items():
        assert cells[CLIP, name][TINYLLAMA] - linear == wanted - 2_099_200, name
    assert cells[SIGLIP, "group_resampler"]["clip"] == cells[SIGLIP, "mean_pool"]["clip"] == 512

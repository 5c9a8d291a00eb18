"""The connectors against numbers computed independently from the published code."""

import math

import numpy as np
import pytest
import torch

from tlv.connectors import CONNECTORS, build_connector
from tlv.resamplers import group_sizes, position_encoding

SIZES = dict(vision_width=48, llm_width=64, num_queries=32, num_groups=4, num_layers=2, width=32,
             vision_widths=(32, 16), patches_per_frame=4)
SPECIAL = {"identity": dict(llm_width=48), "mean_pool": dict(num_queries=16)}
# vilamp wants frames, keyframes and a query: tests/test_vilamp.py
NAMES = [name.replace("{N}", "3") for name in CONNECTORS if name != "vilamp"]


def build(name, **changes):
    return build_connector(name, **{**SIZES, **SPECIAL.get(name, {}), **changes}).eval()


def fill(module):
    """The weights behind the golden numbers: seeded, in the order of the sorted names."""
    rng, state = np.random.RandomState(1234), module.state_dict()
    for key in sorted(state):
        value = rng.standard_normal(tuple(state[key].shape))
        if key != "latents" and value.ndim == 1:
            value = 1 + 0.1 * value if key.endswith("weight") else 0.1 * value
        elif key != "latents":
            value = value / np.sqrt(value.shape[1])
        state[key] = torch.from_numpy(value).float()
    module.load_state_dict(state)
    return module


@pytest.fixture(scope="module")
def x():
    return torch.from_numpy(np.random.RandomState(7).standard_normal((1, 30, 48))).float()


GOLDEN = {
    "group_resampler": (0.435824, 1.178129, 2068.48, [0.59279, 0.14936, -0.50008, 0.01215],
                        [-1.26574, -0.05998, -0.68219, -1.27765],
                        [-0.48009, 1.27284, 0.42980, -0.61051]),
    "naive_resampler": (0.017008, 0.990463, 1619.785, [-0.28588, -0.65664, 1.11196, 0.62992],
                        [-0.05684, 0.81423, 1.02473, 0.38808],
                        [-0.23456, 0.52916, -0.25019, -0.60454]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_values(name, x):
    mean, std, total, first, sixth, last = GOLDEN[name]
    y = fill(build(name))(x)
    assert y.shape == (1, 32, 64)
    assert y.mean().item() == pytest.approx(mean, abs=2e-6)
    assert y.std().item() == pytest.approx(std, abs=5e-5)
    assert y.abs().sum().item() == pytest.approx(total, abs=6e-3)
    for got, wanted in ((y[0, 0, :4], first), (y[0, 5, :4], sixth), (y[0, -1, -4:], last)):
        assert torch.allclose(got, torch.tensor(wanted), atol=1e-5)


def test_position_encoding_is_rounded_to_half_precision():
    table = position_encoding(32, 64)
    wanted = torch.tensor([0.84130859, 0.54052734, 0.68164062, 0.73193359])
    assert torch.equal(table[1, :4], wanted)
    assert table[31, 62:].tolist() == pytest.approx([0.00413513, 1.0], abs=1e-8)
    exact = position_encoding(32, 64, "float32")
    assert (table - exact).abs().max().item() == pytest.approx(2.4e-4, abs=1e-5)
    wide = position_encoding(512, 2048) - position_encoding(512, 2048, "float32")
    assert wide.abs().max().item() == pytest.approx(2.6e-4, abs=3e-5)


def test_positions_of_a_whole_clip_equal_the_published_table_to_the_bit():
    """16 frames of 728 patches; so far out, frequencies made in another way are seen."""
    n, d = 11_648, 64
    position, column = torch.arange(n).float()[:, None], torch.arange(0, d, 2).float()
    divisor = torch.exp(column * -(math.log(10_000.0) / d))
    wanted = torch.zeros(n, d, dtype=torch.float16)
    wanted[:, 0::2], wanted[:, 1::2] = torch.sin(position * divisor), torch.cos(position * divisor)
    table = position_encoding(n, d)
    assert torch.equal(table, wanted.float())
    assert not torch.equal(table[:, 0::2], torch.sin(position / 10_000.0 ** (column / d)).half())


@pytest.mark.parametrize(
    "num_patches, longer, size",
    [(728, 8, 46), (2912, 16, 182), (3640, 8, 228), (5824, 16, 364), (11648, 16, 728),
     (12376, 8, 774), (14560, 16, 910), (22568, 8, 1411), (46592, 16, 2912)],
)  # fmt: skip
def test_group_sizes(num_patches, longer, size):
    assert group_sizes(num_patches, 16) == [size] * longer + [size - 1] * (16 - longer)


def test_group_sizes_of_few_patches(x):
    assert group_sizes(30, 4) == [8, 8, 7, 7]
    assert group_sizes(3, 4) == [1, 1, 1, 0]
    y = build("group_resampler")(x[:, :3])  # the last group reads its own latents only
    assert y.shape == (1, 32, 64) and y.isfinite().all()


@torch.no_grad()
def test_groups_do_not_see_each_other(x):
    connector = fill(build("group_resampler"))
    y = connector(x)
    for token, rows in ((7, slice(0, 8)), (29, slice(24, 32))):
        moved = x.clone()
        moved[0, token] += 1
        changed = (connector(moved) - y).abs().amax(dim=(0, 2)) > 1e-6
        assert changed[rows].all() and changed.sum() == 8
    order = torch.cat([torch.arange(8).flip(0), torch.arange(8, 30)])
    assert (connector(x[:, order]) - y).abs().max() < 2e-6  # inside a group order is not seen
    naive = fill(build("naive_resampler"))
    assert (naive(x[:, order]) - naive(x)).abs().max() > 0.1


@torch.no_grad()
def test_swapping_groups_swaps_their_tokens(x):
    connector = fill(build("group_resampler"))
    order = torch.cat([torch.arange(8, 16), torch.arange(8), torch.arange(16, 30)])
    table = position_encoding(32, 64)
    plain, swapped = connector(x)[0] - table, connector(x[:, order])[0] - table
    assert torch.allclose(swapped[:8], plain[8:16], atol=1e-5)
    assert torch.allclose(swapped[16:], plain[16:], atol=1e-5)


@torch.no_grad()
def test_one_group_is_the_naive_resampler_but_for_the_positions(x):
    group, naive = fill(build("group_resampler", num_groups=1)), fill(build("naive_resampler"))
    naive.positions = lambda media: 0.0
    assert torch.allclose(group(x) - position_encoding(32, 64), naive(x), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padded_clips_equal_single_clips(name):
    """Clips of unequal length in one call give what each gives alone, whatever the padding is."""
    torch.manual_seed(0)
    connector, lengths = build(name), [28, 32, 8, 4]
    x = torch.randn(4, 32, 48) * 3
    y = connector(x, lengths)
    for row, length in enumerate(lengths):
        alone = connector(x[row : row + 1, :length])[0]
        assert len(alone) == connector.num_tokens(length)
        assert torch.allclose(y[row, : len(alone)], alone, atol=1e-5)


def test_state_dict_names_and_paper_size_counts():
    with torch.device("meta"):
        sizes = dict(vision_width=1152, num_queries=512, num_groups=16, num_layers=3)
        models = {
            (name, width): build(name, **sizes, llm_width=width)
            for name in ("group_resampler", "naive_resampler")
            for width in (2048, 2560)
        }
    counts = {key: sum(p.numel() for p in m.parameters()) for key, m in models.items()}
    assert counts == {
        ("group_resampler", 2048): 115_714_048, ("naive_resampler", 2048): 116_697_088,
        ("group_resampler", 2560): 176_099_840, ("naive_resampler", 2560): 177_328_640,
    }  # fmt: skip
    state = {k: tuple(v.shape) for k, v in models["group_resampler", 2048].state_dict().items()}
    layer = {
        "0.norm_media.weight": (2048,), "0.norm_media.bias": (2048,),
        "0.norm_latents.weight": (2048,), "0.norm_latents.bias": (2048,),
        "0.to_q.weight": (512, 2048), "0.to_kv.weight": (1024, 2048),
        "0.to_out.weight": (2048, 512), "1.0.weight": (2048,), "1.0.bias": (2048,),
        "1.1.weight": (8192, 2048), "1.3.weight": (2048, 8192),
    }  # fmt: skip
    wanted = {"latents": (32, 2048), "linear.weight": (2048, 1152), "linear.bias": (2048,),
              "norm.weight": (2048,), "norm.bias": (2048,)}  # fmt: skip
    wanted |= {f"layers.{i}.{k}": shape for i in range(3) for k, shape in layer.items()}
    assert state == wanted and len(state) == 38


@torch.no_grad()
def test_padded_groups_of_unequal_length_equal_single_clips():
    torch.manual_seed(0)
    connector, lengths, x = build("group_resampler"), [30, 32, 7, 3], torch.randn(4, 32, 48)
    for row, length in enumerate(lengths):
        alone = connector(x[row : row + 1, :length])[0]
        assert torch.allclose(connector(x, lengths)[row], alone, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    connector = build(name)
    connector(torch.randn(2, 16, 48)).square().sum().backward()
    silent = {k for k, p in connector.named_parameters() if p.grad is None or not p.grad.any()}
    # all latents of a Q-Former are alike to a key's bias: softmax takes it out
    assert {k for k in silent if not k.endswith("key.bias")} == set()


SIZES_OF = {  # (encoder, LLM): vision_width, llm_width
    "CLIP -> TinyLlama": dict(vision_width=1024, llm_width=2048),
    "SigLIP -> Phi-2": dict(vision_width=1152, llm_width=2560),
}
FACTORY = dict(num_queries=128, num_groups=1)
BENCH = dict(FACTORY, num_layers=3, num_heads=12, width=768)


@pytest.mark.parametrize(
    "name, pair, sizes, wanted",
    [
        ("identity", "CLIP -> TinyLlama", dict(llm_width=1024), 0),
        ("linear", "CLIP -> TinyLlama", {}, 2_099_200),
        ("linear", "SigLIP -> Phi-2", {}, 2_951_680),
        ("mlp2x_gelu", "CLIP -> TinyLlama", {}, 6_295_552),
        ("mlp2x_gelu", "SigLIP -> Phi-2", {}, 9_507_840),
        ("mlp4x_gelu", "CLIP -> TinyLlama", {}, 2_099_200 + 3 * 4_196_352),
        ("resampler", "CLIP -> TinyLlama", dict(FACTORY, num_layers=3), 115_648_512),
        ("resampler", "SigLIP -> Phi-2", dict(FACTORY, num_layers=3), 176_345_600),
        ("bench_resampler", "CLIP -> TinyLlama", BENCH, 24_101_376),
        # 12 x (self-attention 2,363,904 + feed-forward 4,723,968) + 6 x cross-attention 2,757,120
        # + queries 98,304 + matrix 1,574,912; its first norm has no parameters
        ("qformer", "CLIP -> TinyLlama", dict(BENCH, num_layers=12), 103_270_400),
        ("mof_mlp", "CLIP -> TinyLlama", dict(vision_widths=(1024, 1024)), 2 * 6_295_552),
    ],
)
def test_parameter_counts_of_the_published_sizes(name, pair, sizes, wanted):
    with torch.device("meta"):
        connector = build_connector(name, **{**SIZES, **SIZES_OF[pair], **sizes})
    assert sum(p.numel() for p in connector.parameters()) == wanted


@torch.no_grad()
def test_identity_gives_what_it_is_given(x):
    assert torch.equal(build("identity")(x), x)


@pytest.mark.parametrize("name, depth", [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2),
                                         ("mlp3x_gelu", 3)])
@torch.no_grad()
def test_mlps_are_matrices_with_exact_gelus_between(name, depth, x):
    connector = fill(build(name)).double()
    w, y = connector.state_dict(), x.double()
    for i in range(0, 2 * depth, 2):
        if i:
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        y = y @ w[f"layers.{i}.weight"].T + w[f"layers.{i}.bias"]
    assert torch.allclose(connector(x.double()), y, atol=1e-10)


@torch.no_grad()
def test_as_many_frames_as_groups_make_a_frame_resampler_a_group_resampler(x):
    frames, groups = fill(build("frame_resampler")), fill(build("group_resampler"))
    assert torch.equal(frames(x[:, :16]), groups(x[:, :16]))  # 4 frames of 4 patches, 4 groups
    assert frames.num_tokens(28) == 7 * 8 and groups.num_tokens(28) == 32


@torch.no_grad()
def test_mean_pool_is_the_mean_over_time_and_places(x):
    over_time = build("mean_pool", num_queries=4, num_groups=1)
    wanted = over_time.linear(x[0, :28].unflatten(0, (7, 4)).mean(0))  # (N, D)
    assert torch.allclose(over_time(x[:, :28])[0], wanted, atol=1e-6)
    over_all = build("mean_pool", num_queries=1, num_groups=1)
    assert torch.allclose(over_all(x[:, :28])[0, 0], over_all.linear(x[0, :28].mean(0)), atol=1e-6)


@torch.no_grad()
def test_mof_deals_out_two_encoders_in_turn(x):
    connector = build("mof_mlp")
    first, second = connector.mlps
    y = connector(x)[0]
    assert torch.equal(y[0::2], first(x[0, :, :32])) and torch.equal(y[1::2], second(x[0, :, 32:]))


@torch.no_grad()
def test_factory_resampler_is_naive_without_positions(x):
    plain, naive = fill(build("resampler")), fill(build("naive_resampler"))
    assert (plain(x) - naive(x)).abs().max() > 0.1
    naive.positions = lambda media: 0.0
    assert torch.equal(plain(x), naive(x))


def test_bad_connectors_are_refused():
    with pytest.raises(ValueError, match="num_queries = 30 .* num_groups = 4"):
        build("group_resampler", num_queries=30)
    with pytest.raises(ValueError, match="'mlp' is unknown; known are identity, linear, mlp{N}x_g"):
        build("mlp")
    with pytest.raises(ValueError, match="unknown"):
        build("mlp0x_gelu")
    with pytest.raises(ValueError, match="'identity' needs an encoder as wide .* 48 and 64 wide"):
        build("identity", llm_width=64)
    with pytest.raises(ValueError, match="'mof_mlp' needs a mixture of two encoders"):
        build("mof_mlp", vision_widths=())
    with pytest.raises(ValueError, match="num_queries / num_groups = 8; take a square number"):
        build("mean_pool", num_queries=32)
    with pytest.raises(ValueError, match="square grid of patches, but a frame has 37"):
        build("mean_pool", patches_per_frame=37)
    with pytest.raises(ValueError, match="'bfloat16' is unknown; known are float16, float32"):
        build("naive_resampler", position_dtype="bfloat16")


GROUPED = ("mean_pool", "group_resampler", "frame_resampler")
ASKING = (*GROUPED, "resampler", "bench_resampler", "qformer", "naive_resampler")


@pytest.mark.parametrize("count", [0, -4])
@pytest.mark.parametrize("name, field", [*((n, "num_queries") for n in ASKING),
                                         *((n, "num_groups") for n in GROUPED)])
def test_a_size_below_one_is_refused(name, field, count):
    with pytest.raises(ValueError, match=f"{field} = {count} must be 1 or more"):
        build(name, **{field: count})


def test_a_connectors_name_is_given_once():
    linear = CONNECTORS["linear"]
    with pytest.raises(ValueError, match="connector 'linear' is there already; take another name"):
        CONNECTORS["linear"] = CONNECTORS["mof_mlp"]
    assert CONNECTORS["linear"] is linear
    for _ in range(2):  # what was taken out may come again
        CONNECTORS["mine"] = linear
        assert build("mine").num_tokens(7) == 7
        del CONNECTORS["mine"]

"""Vision encoders: the layer that is read, the class token, mixtures, and what never runs."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tlv.connectors import MofMlp
from tlv.pretrained import ModelFolderError
from tlv.vision import (
    MixtureConfig,
    MixtureEncoder,
    check_mixture,
    count_patches,
    count_unseen,
    encode_frames,
    load_mixture,
)

TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
            image_size=32, patch_size=8)  # fmt: skip
KINDS = {
    "siglip": (SiglipVisionModel, SiglipVisionConfig, 16),
    "clip": (CLIPVisionModel, CLIPVisionConfig, 17),
    "dinov2": (Dinov2Model, Dinov2Config, 17),
}


def encoder(kind, **changes):
    torch.manual_seed(0)
    model, config, _ = KINDS[kind]
    return model(config(**{**TINY, **changes})).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
@torch.no_grad()
def test_features_are_the_hidden_states_of_that_layer(kind, layer, pixels):
    model, last = encoder(kind), []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    hook = layers[-1].register_forward_hook(lambda module, args, out: last.append(out))
    wanted = list(model(pixels, output_hidden_states=True).hidden_states)
    hook.remove()
    assert len(wanted) == 5
    wanted[-1] = last[0]  # some models report it after the final norm
    features = encode_frames(model, pixels, layer)
    assert torch.equal(features, wanted[layer])
    assert features.shape == (3, KINDS[kind][2], 32)
    assert torch.equal(encode_frames(model, pixels, layer, True), features[:, 1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_that_the_output_never_sees_are_not_run_and_stay(kind, pixels):
    model = encoder(kind)
    names, ran = list(model.state_dict()), []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encode_frames(model, pixels)
    assert ran == [0, 1, 2] and list(model.state_dict()) == names
    model(pixels)
    assert ran == [0, 1, 2, 0, 1, 2, 3]


def test_gradients_reach_the_layers_below_under_checkpointing(pixels):
    plain, saving = encoder("siglip"), encoder("siglip")
    saving.train().gradient_checkpointing_enable()
    for model in (plain, saving):
        encode_frames(model, pixels).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5), name


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_is_not_there_is_refused(layer, pixels):
    with pytest.raises(ValueError, match=f"feature_layer = {layer}: the encoder has 4 layers"):
        encode_frames(encoder("clip"), pixels, layer)


@torch.no_grad()
def test_a_mixture_puts_features_side_by_side_and_survives_saving(pixels, tmp_path):
    clip, dino = encoder("clip"), encoder("dinov2", hidden_size=16)
    mixture = load_mixture(clip, dino)
    features = encode_frames(mixture, pixels, drop_first_patch=True)
    assert features.shape == (3, 16, 48) and mixture.config.widths == (32, 16)
    assert torch.equal(features[..., :32], encode_frames(clip, pixels, drop_first_patch=True))
    assert torch.equal(features[..., 32:], encode_frames(dino, pixels, drop_first_patch=True))
    mixture.save_pretrained(tmp_path)
    again = MixtureEncoder.from_pretrained(tmp_path).eval()
    assert torch.equal(encode_frames(again, pixels, drop_first_patch=True), features)


def test_a_mixture_of_unequal_patches_is_refused():
    with pytest.raises(ModelFolderError, match="17 and 65 features .*patches of 8 and 4"):
        load_mixture(encoder("clip"), encoder("dinov2", patch_size=4))
    with pytest.raises(ModelFolderError, match="give 16 and 17 features"):
        load_mixture(encoder("siglip"), encoder("dinov2"))


def published(config, **fields):
    return config(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=2, **fields)  # fmt: skip


@pytest.mark.parametrize(
    "config, drop, wanted",
    [
        (published(CLIPVisionConfig, image_size=336, patch_size=14), True, 576),
        (published(CLIPVisionConfig, image_size=336, patch_size=14), False, 577),
        (published(SiglipVisionConfig, image_size=384, patch_size=14), False, 729),
        (published(SiglipVisionConfig, image_size=384, patch_size=14), True, 728),
        (published(Dinov2Config, image_size=518, patch_size=14, picture_size=224), True, 256),
    ],
)
def test_tokens_per_frame_of_the_published_encoders(config, drop, wanted):
    assert count_patches(config, drop) == wanted


def test_a_mixture_at_224_pixels_gives_512_tokens_from_both():
    clip = published(CLIPVisionConfig, image_size=224, patch_size=14)
    dino = published(Dinov2Config, image_size=518, patch_size=14)
    mixture = MixtureConfig(first_config=clip, second_config=dino)
    check_mixture(mixture)
    connector = MofMlp(mixture.widths, 8)
    assert connector.num_tokens(count_patches(mixture, True)) == 512


@pytest.mark.parametrize("config", [CLIPVisionConfig, SiglipVisionConfig])
def test_a_second_encoder_of_another_picture_size_is_refused(config):
    first = published(CLIPVisionConfig, image_size=336, patch_size=14)
    second = published(config, image_size=224, patch_size=14)
    message = "second_vision_dir: made for pictures of 224 pixels, but .* 336; take an encoder"
    with pytest.raises(ModelFolderError, match=message):
        check_mixture(MixtureConfig(first_config=first, second_config=second))


def test_unseen_parameters_are_the_last_layer_the_final_norm_and_the_head():
    model = encoder("siglip")
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    unseen = [layers[-1], model.post_layernorm, model.head]
    wanted = sum(p.numel() for m in unseen for p in m.parameters())
    assert count_unseen(model.config) == wanted

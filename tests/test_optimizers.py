"""Muon and AdamW over the groups of a recipe."""

import math

import pytest
import torch

from tlv.lora import add_adapters
from tlv.optimizers import Muon, new_optimizer, split_matrices
from tlv.recipes import parameter_groups, set_trainable

RATES = {"connector": 1e-3, "llm": 1e-4, "vision": None}


@pytest.fixture
def model(build_tiny):
    model, _ = build_tiny()
    set_trainable(model, ("connector", "llm"))
    return model


def fill_gradients(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_takes_the_matrices_of_layers_and_adamw_all_else(model):
    matrices, others = split_matrices(model)
    assert len(matrices) + len(others) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim == 2 and ".layers." in names[id(p)] for p in matrices)
    left = {names[id(p)] for p in others if p.ndim == 2}
    assert {"language_model.model.embed_tokens.weight", "connector.latents",
            "connector.linear.weight"} <= left  # fmt: skip
    optimizer = new_optimizer("muon", model, parameter_groups(model, RATES, 0.1))
    members = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(members) == len(trained) and {*map(id, members)} == {*map(id, trained)}
    muon = [group for group in optimizer.param_groups if "momentum" in group]
    assert {(g["part"], g["peak"], g["weight_decay"]) for g in muon} == {
        ("connector", 1e-3, 0.1), ("llm", 1e-4, 0.1)}  # fmt: skip


def test_a_step_is_as_long_as_one_of_adamw_in_every_direction(model):
    before = weights(model)
    fill_gradients(model)
    optimizer = new_optimizer("muon", model, parameter_groups(model, RATES, 0.0))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]  # as the trainer sets it
    optimizer.step()
    for name, after in weights(model).items():
        moved = after - before[name]
        if name.startswith("vision_encoder."):
            assert not moved.any()
        elif moved.ndim == 2 and ".layers." in name:
            values = torch.linalg.svdvals(moved)
            unit = 0.2 * math.sqrt(max(moved.shape)) * RATES[
                "connector" if name.startswith("connector") else "llm"]  # fmt: skip
            assert 0.5 < values.min() / unit <= values.max() / unit < 1.3, name
        else:
            assert moved.any(), name


def test_steps_are_those_of_torch_but_for_its_bfloat16():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 24), (24, 8), (8, 8))]
                    for _ in range(2))  # fmt: skip
    optimizers = (Muon(ours, lr=0.1, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    for _ in range(3):
        for p, other in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=0.01)
        assert (p - 1).abs().max() > 0.1


def test_vectors_are_no_matrices():
    with pytest.raises(ValueError, match=r"for matrices; \[3\] is"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_its_state_goes_on_from_a_file(model, tmp_path):
    def make():
        return new_optimizer("muon", model, parameter_groups(model, RATES, 0.1))

    optimizer = make()
    fill_gradients(model)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    start = weights(model)
    fill_gradients(model, 1)
    optimizer.step()
    wanted = weights(model)
    model.load_state_dict(start, strict=False)  # the head is the embeddings
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for group in again.param_groups:
        assert group["lr"] == group["peak"]
    again.step()
    assert all(torch.equal(value, wanted[name]) for name, value in weights(model).items())


def test_adapters_are_matrices_alone(model):
    add_adapters(model, ("llm",), rank=2, alpha=4.0, dropout=0.0)
    set_trainable(model, ("llm",), ("llm",))
    fill_gradients(model)
    before = weights(model)
    new_optimizer("muon", model, parameter_groups(model, {"llm": 1e-3}, 0.0)).step()
    changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_an_unknown_name_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match="'sgd' is unknown; known are adamw, muon"):
        new_optimizer("sgd", model, parameter_groups(model, RATES, 0.0))

"""Muon and AdamW over the groups of a recipe."""

import math

import pytest
import torch

from tlv.lora import add_adapters
from tlv.optimizers import Muon, new_optimizer, orthogonalize, split_matrices
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
            assert 0.65 < values.median() / unit <= values.max() / unit < 1.3, name
        else:
            assert moved.any(), name


def test_a_matrix_keeps_its_singular_vectors_and_gets_equal_values():
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (128, 128), (192, 128)):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        matrix = left @ torch.linspace(0.1, 1, min(shape)).diag() @ right
        found = left.T @ orthogonalize(matrix) @ right.T
        assert (found - found.diag().diag()).abs().max() < 1e-3
        assert 0.65 < found.diag().min() <= found.max() < 1.21
    small = torch.diag(torch.tensor([1.0, 0.5, 0.001]))  # lifted some fortyfold, and no further
    assert 0.03 < torch.linalg.svdvals(orthogonalize(small))[-1] < 0.05
    assert not orthogonalize(torch.zeros(3, 4)).any()


def test_steps_go_where_those_of_torch_go():
    """torch's Muon multiplies in bfloat16, and five rounds: other lengths by up to a sixth."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 24), (24, 8), (9, 8))]
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
        mine, its = (x.detach().flatten() - 0.99**3 for x in (p, other))  # without the decay
        assert torch.cosine_similarity(mine, its, dim=0) > 0.97
        assert float(mine.norm()) == pytest.approx(float(its.norm()), rel=0.17)


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

"""What is trained and how fast."""

import math

import pytest
import torch

from tlv.recipes import (
    count_warmup_steps,
    learning_rate,
    parameter_groups,
    part_module,
    set_trainable,
)


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

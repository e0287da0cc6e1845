"""What decisions cost a model: experts run as planned, likelihoods, intervals, and the tools around them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_config, tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from wdmoe.backbone.planned_experts import EXACT, Order, PlannedExperts, travelled

HALF = 2.0**-11  # relative error of one rounding to float16
IDS = torch.arange(24).reshape(2, 12) % 60


def everything(bits: int, **changes: Any) -> Any:
    """Computes all that the gate asks for, on two devices."""

    def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
        used = np.where(experts >= 0, bits, 0).astype(np.int32)
        device = np.where(experts >= 0, experts % 2, -1).astype(np.int32)
        return Order(**{"experts": experts, "device": device, "down_bits": used, "up_bits": used, **changes})

    return decide


@pytest.fixture(scope="module", params=["mixtral", "granitemoeshared", "deepseek_v3", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny_model(tiny_config(request.param))
    made.set_experts_implementation("eager")
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_a_plan_that_changes_nothing_is_the_model_itself(model: Any) -> None:
    plain = logits(model)
    with PlannedExperts(model, everything(EXACT)):
        assert torch.equal(logits(model), plain)
    assert model.get_experts_implementation()[""] == "eager"
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("partial_sums", [False, True])
def test_16_bits_are_float16(model: Any, partial_sums: bool) -> None:
    plain = logits(model)
    with PlannedExperts(model, everything(16, partial_sums=partial_sums)):
        rounded = logits(model)
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=0, atol=8 * HALF * float(plain.abs().max()))


@pytest.mark.parametrize(("bits", "steps"), [(4, 7), (8, 127)])
def test_few_bits_are_that_many_steps(bits: int, steps: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0])[:, None]
    arrived = travelled(vectors, bits)
    top = vectors.abs().amax(1, keepdim=True)
    assert float(((arrived - vectors).abs() - top / steps * (0.5 + steps * HALF)).max()) <= 1e-6
    assert all(len(row.unique()) <= 2 * steps + 1 for row in arrived)


@pytest.mark.parametrize("renormalise", [False, True])
def test_what_is_dropped_is_not_computed_and_what_is_replaced_is_by_another(model: Any, renormalise: bool) -> None:
    def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
        assert ((ranks > 0) & (ranks < 1)).all()
        wanted = experts.copy()
        wanted[:, 0] = (wanted[:, 0] + 1) % planned.expert_count  # another expert, perhaps a second time
        wanted[::2, 1] = -1
        return everything(EXACT)(layer, wanted, ranks)

    def reference(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        index, left = index.clone(), weights.clone()
        index[:, 0] = (index[:, 0] + 1) % planned.expert_count
        left[::2, 1] = 0
        if renormalise:
            left = left * weights.sum(1, keepdim=True) / left.sum(1, keepdim=True)
        alone = inspect.unwrap(type(module).forward)
        return sum(alone(module, hidden, index[:, [k]], left[:, [k]]) for k in range(index.shape[1]))

    planned = PlannedExperts(model, decide)
    planned.renormalise = renormalise
    with planned:
        found = logits(model)
    ALL_EXPERTS_FUNCTIONS.register("wdmoe-test", reference)
    model.set_experts_implementation("wdmoe-test")
    wanted = logits(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_devices_with_different_bits_get_different_vectors() -> None:
    """One device at 4 bits is half of what both at 4 bits change."""
    made = tiny_model(tiny_config("granitemoeshared", num_hidden_layers=1))
    made.set_experts_implementation("eager")
    plain = logits(made)

    def error(first: int, second: int) -> float:
        def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
            bits = np.where(experts % 2 == 0, first, second).astype(np.int32)
            return everything(0, down_bits=bits, up_bits=bits)(layer, experts, ranks)

        with PlannedExperts(made, decide):
            return float((logits(made) - plain).square().sum())

    assert error(EXACT, EXACT) == 0
    both, one, other = error(4, 4), error(4, EXACT), error(EXACT, 4)
    assert 0 < one < both
    assert 0 < other < both
    assert one + other == pytest.approx(both, rel=0.5)

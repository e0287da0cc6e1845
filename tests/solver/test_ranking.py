"""What policies rank by: as the text says, for any leading axes, and nothing for empty slots."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.config import RANKS
from wdmoe.solver.ranking import rank_weights


def test_probability_is_the_softmax_over_the_temperature(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(5, 8))
    experts = np.argsort(-scores, axis=1)[:, :3].astype(np.int32)
    expected = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum(axis=1, keepdims=True)
    found = rank_weights(scores, experts, 0.1)
    np.testing.assert_allclose(found, np.take_along_axis(expected, experts.astype(np.int64), axis=1))
    np.testing.assert_allclose(rank_weights(scores + 1e4, experts, 0.1), found, rtol=1e-9)


def test_energy_tells_tokens_apart_and_ignores_what_predicts_nothing() -> None:
    scores = np.array([[0.2, 0.1, -0.3], [2.0, 1.0, -3.0]])
    found = rank_weights(scores, np.array([[0, 1, 2], [0, 1, 2]]), rank="energy")
    np.testing.assert_allclose(found, [[0.04, 0.01, 0.0], [4.0, 1.0, 0.0]])


@pytest.mark.parametrize("rank", RANKS)
def test_layers_go_in_front_and_empty_slots_weigh_nothing(rank: str, rng: np.random.Generator) -> None:
    scores = rng.normal(size=(3, 5, 8)).astype(np.float16)
    experts = np.argsort(-scores, axis=2)[:, :, :4].astype(np.int16)
    experts[1, 2, 3] = -1
    found = rank_weights(scores, experts, 0.5, rank)
    assert found[1, 2, 3] == 0
    for layer in range(3):
        assert (rank_weights(scores[layer], experts[layer], 0.5, rank) == found[layer]).all()

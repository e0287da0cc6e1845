"""How the next token is chosen from its scores."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.backbone.runtime.choosing import SORTED, Chooser
from wdmoe.errors import NotFiniteError
from wdmoe.records import Sampling


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.95)])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, top_p: float) -> None:
    scores = np.array([2.0, -1.0, 1.5, 0.0, 1.5, -3.0], np.float32)
    chooser = Chooser(Sampling(max_tokens=1, temperature=temperature, top_p=top_p, seed=3))
    draws = 20_000
    counts = np.bincount([chooser.choose(scores, place) for place in range(draws)], minlength=6)
    want = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    order = np.argsort(-want, kind="stable")
    before = np.cumsum(want[order]) - want[order]
    want[order[before >= top_p]] = 0
    want /= want.sum()
    assert (counts[want == 0] == 0).all()
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - draws * want) <= 5 * np.sqrt(draws * want * (1 - want)) + 1e-9).all()


def test_the_best_of_a_large_vocabulary_are_those_of_a_whole_sort(rng: np.random.Generator) -> None:
    for scale in (0.01, 0.1, 3.0):  # flat ones need nearly all tokens
        scores = (scale * rng.standard_normal(3 * SORTED**2)).astype(np.float32)
        for top_p in (0.001, 0.5, 0.9, 0.999):
            chooser = Chooser(Sampling(max_tokens=1, temperature=1.0, top_p=top_p, seed=1))
            weights = np.exp(scores.astype(np.float64) - scores.max())
            order = np.argsort(-weights, kind="stable")
            allowed = set(
                order[np.cumsum(weights[order]) - weights[order] < top_p * weights.sum() * (1 + 1e-6)].tolist()
            )
            assert {chooser.choose(scores, place) for place in range(50)} <= allowed


def test_a_seed_and_a_place_say_which_token() -> None:
    scores = np.zeros(1000, np.float32)
    chosen = [Chooser(Sampling(max_tokens=1, temperature=1.0, seed=9)).choose(scores, place) for place in range(50)]
    again = Chooser(Sampling(max_tokens=1, temperature=1.0, seed=9))
    assert [again.choose(scores, place) for place in reversed(range(50))] == chosen[::-1]
    assert len(set(chosen)) > 30
    assert [Chooser(Sampling(max_tokens=1, temperature=1.0, seed=10)).choose(scores, p) for p in range(50)] != chosen


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(NotFiniteError):
        Chooser(Sampling(max_tokens=1)).choose(np.array([0.0, value], np.float32), 0)

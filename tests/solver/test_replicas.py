"""Copies of experts: as soon as brute force is done; substitutes: as the plain loop chooses them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.solver.replicas import choose_copies
from wdmoe.solver.substitution import replace_far


def end_s(device: np.ndarray, token_s: np.ndarray, busy_s: np.ndarray) -> float:
    load = np.bincount(device[device >= 0], minlength=len(token_s))
    return float(np.where(load > 0, busy_s + load * token_s, 0).max())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_choice_of_copies_is_done_sooner(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, top_k, count, devices = (int(rng.integers(1, n)) for n in (5, 3, 5, 4))
    experts = rng.integers(-1, count, (tokens, top_k), np.int32)
    holders = rng.random((count, devices)) < 0.5
    token_s = rng.choice([0.5, 1.0, 1.5, 2.7], devices)
    busy_s = rng.choice([0.0, 1.0], devices)
    device = choose_copies(experts, holders, token_s, busy_s)
    served = (experts >= 0) & holders.any(axis=1)[experts]
    assert ((device >= 0) == served).all()
    assert holders[experts[served], device[served]].all()
    best = min(
        end_s(np.array(choice, int), token_s, busy_s)
        for choice in product(*(np.flatnonzero(holders[expert]) for expert in experts[served]))
    )
    assert end_s(device, token_s, busy_s) == pytest.approx(best)


def test_a_long_chain_of_moves_is_found() -> None:
    holders = np.zeros((9, 10), bool)
    for expert in range(9):
        holders[expert, expert : expert + 2] = True
    experts = np.repeat(np.arange(9, dtype=np.int32), 10)[:, None]
    device = choose_copies(experts, holders, np.ones(10))
    assert (np.bincount(device[:, 0], minlength=10) == 9).all()


def test_experts_of_one_token_share_a_device_where_it_costs_nothing() -> None:
    experts = np.tile(np.array([[0, 1]], np.int32), (8, 1))
    device = choose_copies(experts, np.ones((2, 2), bool), np.ones(2))
    assert (np.bincount(device.ravel()) == 8).all()
    assert (device[:, 0] == device[:, 1]).all()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_substitutes_are_those_of_the_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, top_k, count = (int(rng.integers(1, n)) for n in (6, 5, 9))
    experts = rng.integers(-1, count, (tokens, top_k), np.int32)
    weights = np.where(experts >= 0, rng.integers(0, 5, experts.shape), 0) / 4
    alike = rng.integers(0, 5, (count, count)) / 4
    seconds = rng.choice([1.0, 2.0, 4.0, np.inf], count)
    least, times, share = rng.choice([0.25, 0.75]), rng.choice([1.0, 2.0]), rng.choice([0.3, 1.0])
    expected = experts.copy()
    for token, row in enumerate(expected):
        used = set(row.tolist())
        for slot in np.argsort(-weights[token], kind="stable"):
            expert = row[slot]
            if expert < 0 or weights[token, slot] > share * weights[token].sum():
                continue
            faster = (seconds * times <= seconds[expert]) & (seconds < seconds[expert])
            fit = [f for f in range(count) if faster[f] and alike[expert, f] >= least and f not in used]
            if fit:
                row[slot] = max(fit, key=lambda f, e=expert: alike[e, f])
                used.add(int(row[slot]))
    assert (replace_far(experts, weights, alike, seconds, least, times, share) == expected).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": np.array([[2]])}, "experts must be from -1 to 1"),
        ({"experts": np.array([0])}, "experts must be integers .tokens, top_k."),
        ({"experts": np.array([[0.0]])}, "experts must be integers"),
        ({"holders": np.ones((2, 2))}, "holders must be bool"),
        ({"token_s": np.array([1.0, np.nan])}, "token_s must be .2,., positive"),
        ({"token_s": np.ones(3)}, "token_s must be .2,."),
        ({"busy_s": np.array([-1.0, 0.0])}, "busy_s must be"),
    ],
)
def test_bad_input_of_copies_is_named(changes: dict[str, np.ndarray], said: str) -> None:
    fields = {"experts": np.array([[0]]), "holders": np.ones((2, 2), bool), "token_s": np.ones(2)}
    with pytest.raises(ValueError, match=said):
        choose_copies(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": [[-1.0]]}, "weights must be finite"),
        ({"similarity": np.ones((2, 3))}, "similarity must be .2, 2."),
        ({"similarity": np.full((2, 2), np.nan)}, "similarity must be"),
        ({"seconds": np.array([1.0, 0.0])}, "seconds must be"),
        ({"experts": [[2]]}, "experts must be from -1 to 1"),
        ({"least_similarity": np.nan}, "least_similarity must be"),
        ({"times_faster": 0.5}, "times_faster must be"),
        ({"most_share": 2.0}, "most_share must be"),
    ],
)
def test_bad_input_of_replacing_is_named(changes: dict[str, object], said: str) -> None:
    fields: dict[str, object] = {
        "experts": [[0]],
        "weights": [[1.0]],
        "similarity": np.ones((2, 2)),
        "seconds": np.ones(2),
        "least_similarity": 0.5,
    }
    with pytest.raises(ValueError, match=said):
        replace_far(**{**fields, **changes})  # type: ignore[arg-type]


def test_no_tokens_no_work() -> None:
    none = np.zeros((0, 2), np.int32)
    assert choose_copies(none, np.ones((2, 2), bool), np.ones(2)).shape == (0, 2)
    assert replace_far(none, np.zeros((0, 2)), np.ones((2, 2)), np.ones(2), 0.5).shape == (0, 2)

"""How pictures share blocks, and what a device takes in, keeps and gives up of a broadcast."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.wire_examples import a_tune
from wdmoe.broadcast.codec.blocks import BlockPlan, share_of
from wdmoe.broadcast.codec.reception import MOST_BLOCKS, Reception, SymbolStore, plan_reception
from wdmoe.broadcast.codec.tiling import Grid, cut
from wdmoe.errors import ProtocolError
from wdmoe.transport.codec.messages import Symbols

USES = 8


def a_reception(height: int = 48, width: int = 200, blocks: int = 0, shared: int = 0) -> Reception:
    tiles = Grid(height, width).tiles
    tune = a_tune(height=height, width=width, uses=USES, blocks=blocks or tiles, shared=shared or tiles, snr_db=5.0)
    return plan_reception(tune)


def symbols(first: int, count: int, uses: int = USES) -> Symbols:
    return Symbols(broadcast=9, first=first, symbols=np.full((count, uses, 2), first + 1, np.float16))


@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 130), st.integers(1, 130), st.floats(0, 1))
def test_blocks_of_two_pictures(height: int, width: int, other_height: int, other_width: int, alpha: float) -> None:
    """Each tile is sent once, in the block of its number; where a picture has none, the block is the other's alone."""
    rng = np.random.default_rng(0)
    pair = tuple(
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((height, width), (other_height, other_width))
    )
    plan = BlockPlan((Grid(height, width), Grid(other_height, other_width)))
    middle = plan.blocks // 2
    both = np.concatenate([plan.pictures(pair, 0, middle), plan.pictures(pair, middle, plan.blocks)])
    alphas = np.concatenate([plan.alpha(0, middle, alpha), plan.alpha(middle, plan.blocks, alpha)])
    assert both.shape == (plan.blocks, 2, 32, 32, 3)
    for user, (picture, grid) in enumerate(zip(pair, plan.grids, strict=True)):
        assert np.array_equal(both[: grid.tiles, user], cut(picture, grid, 0, grid.tiles))
        tune = a_tune(
            user=user,
            height=grid.height,
            width=grid.width,
            blocks=plan.blocks,
            shared=plan.shared,
            share=share_of(user, alpha),
        )
        reception = plan_reception(tune)  # what the device makes of it is what the encoder was told
        own = alphas if user == 0 else 1 - alphas
        np.testing.assert_allclose(reception.shares(0, grid.tiles), own[: grid.tiles], atol=1e-6)
    assert (alphas[: plan.shared] == np.float32(alpha)).all()
    assert np.array_equal(both[plan.shared :, 0], both[plan.shared :, 1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"height": 5000}, "at most 4000x3000"),
        ({"snr_db": 60.0}, "from -30 to 40 dB"),
        ({"blocks": 8, "shared": 7}, "does not fit"),
        ({"blocks": MOST_BLOCKS + 1}, "does not fit"),
        ({"blocks": 5, "shared": 4}, "does not fit"),
        ({"uses": 20_000_000}, "MiB of symbols"),
        ({"decoder_bytes": 1 << 30}, "a decoder of 1024 MiB"),
    ],
)
def test_what_a_device_does_not_take_in(changes: dict[str, object], reason: str) -> None:
    fine = a_tune(blocks=6, shared=6)
    assert plan_reception(fine).tiles == 6
    with pytest.raises(ProtocolError, match=reason):
        plan_reception(dataclasses.replace(fine, **changes))


def test_what_is_lost_is_known_and_the_rest_is_kept() -> None:
    reception = a_reception()  # 2 rows of 8 tiles
    store = SymbolStore(reception)
    store.take(symbols(0, 3))
    assert (store.passed, store.whole) == (3, False)
    numbers, kept, following = store.batch(0, 2)
    assert numbers.tolist() == [0, 1]
    assert (kept == 1).all()
    assert following == 2
    store.take(symbols(5, 2))  # 3 and 4 are lost
    numbers, kept, following = store.batch(2, 100)
    assert numbers.tolist() == [2, 5, 6]
    assert kept[:, 0, 0].tolist() == [1, 6, 6]
    assert following == 7
    store.end(12)
    assert store.passed == 12
    assert store.batch(7, 100)[0].size == 0
    store.end(16)
    assert store.whole
    assert store.lost == 11


def test_blocks_of_the_other_picture_are_let_pass() -> None:
    reception = a_reception(blocks=20, shared=16)
    store = SymbolStore(reception)
    store.take(symbols(14, 6))
    assert store.whole
    assert store.batch(0, 100)[0].tolist() == [14, 15]
    assert store.lost == 14


@pytest.mark.parametrize("message", [symbols(3, 2), symbols(16, 1), symbols(10, 7), symbols(6, 1, uses=9)])
def test_blocks_that_do_not_belong_are_refused(message: Symbols) -> None:
    store = SymbolStore(a_reception())
    store.take(symbols(0, 6))
    with pytest.raises(ProtocolError, match="block"):
        store.take(message)
    assert store.passed == 6


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 5)), max_size=10), st.integers(0, 2**31 - 1))
def test_a_store_survives_any_order(messages: list[tuple[int, int]], sent: int) -> None:
    reception = a_reception()
    store = SymbolStore(reception)
    came = 0
    for first, count in messages:
        try:
            store.take(Symbols(broadcast=9, first=first, symbols=np.full((count, USES, 2), np.inf, np.float32)))
        except ProtocolError:
            continue
        came += count
    store.end(sent)
    assert 0 <= store.passed <= reception.tune.blocks
    assert store.lost == reception.tiles - came

"""Tiles of pictures of any size: nothing is lost, no seam is seen, one band is held."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.broadcast.codec.tiling import OVERLAP, SIDE, Blender, Grid, _windows, cut
from wdmoe.errors import ConfigError

SIDES = st.integers(1, 150)


def picture_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blended(grid: Grid, tiles: dict[int, np.ndarray]) -> np.ndarray:
    blender = Blender(grid)
    pieces = [blender.add(number, tile.astype(np.float32)) for number, tile in sorted(tiles.items())]
    return np.concatenate([*pieces, blender.finish()])


def all_tiles(picture: np.ndarray, grid: Grid) -> dict[int, np.ndarray]:
    return dict(enumerate(cut(picture, grid, 0, grid.tiles)))


@given(SIDES, SIDES)
def test_there_and_back_nothing_changes(height: int, width: int) -> None:
    picture, grid = picture_of(height, width), Grid(height, width)
    assert np.array_equal(blended(grid, all_tiles(picture, grid)), picture)


@given(st.integers(1, 4000))
def test_windows_sum_to_one_and_tiles_stay_inside(side: int) -> None:
    grid, windows = Grid(side, 1), _windows(side)
    total = np.zeros(max(side, SIDE))
    for start, window in zip(grid.rows, windows, strict=True):
        total[start : start + SIDE] += window
    np.testing.assert_allclose(total[:side], 1, atol=1e-6)
    assert windows.min() > 0
    assert grid.rows[-1] + SIDE == max(side, SIDE)
    assert np.all(np.diff(grid.rows) <= SIDE - OVERLAP)


@given(SIDES, SIDES, st.integers(0, 255))
def test_a_constant_picture_stays_constant(height: int, width: int, level: int) -> None:
    grid = Grid(height, width)
    picture = np.full((height, width, 3), level, np.uint8)
    assert np.array_equal(blended(grid, all_tiles(picture, grid)), picture)


def test_tiles_that_differ_leave_no_edge() -> None:
    """Tiles of two levels in turn, the worst that a decoder could do: the step is spread over the overlap."""
    grid = Grid(SIDE, 10 * SIDE)
    tiles = {number: np.full((SIDE, SIDE, 3), 100 + 80 * (number % 2)) for number in range(grid.tiles)}
    steps = np.abs(np.diff(blended(grid, tiles).astype(int), axis=1))
    assert steps.max() <= 80 / OVERLAP + 1


@given(st.integers(33, 120), st.integers(33, 120), st.data())
def test_a_tile_that_is_missing_hurts_only_its_own_place(height: int, width: int, data: st.DataObject) -> None:
    picture, grid = picture_of(height, width), Grid(height, width)
    tiles = all_tiles(picture, grid)
    lost = data.draw(st.integers(0, grid.tiles - 1))
    del tiles[lost]
    shown = blended(grid, tiles)
    assert shown.shape == picture.shape
    top, left = grid.rows[lost // grid.columns.size], grid.columns[lost % grid.columns.size]
    hurt = np.zeros((height, width), bool)
    hurt[top : top + SIDE, left : left + SIDE] = True
    assert np.array_equal(shown[~hurt], picture[~hurt])


def test_without_any_tile_all_is_grey() -> None:
    shown = blended(Grid(70, 40), {})
    assert shown.shape == (70, 40, 3)
    assert np.ptp(shown) == 0


def test_rows_come_as_soon_as_they_can_and_only_a_band_is_held() -> None:
    picture, grid = picture_of(1000, 64), Grid(1000, 64)
    blender, rows = Blender(grid), 0
    for number, tile in all_tiles(picture, grid).items():
        rows += len(blender.add(number, tile.astype(np.float32)))
        assert rows == grid.rows[number // grid.columns.size]
    assert rows + len(blender.finish()) == 1000
    assert blender._band.nbytes == SIDE * 64 * 3 * 4


def test_the_largest_picture_is_cut_part_by_part() -> None:
    picture, grid = np.zeros((3000, 4000, 3), np.uint8), Grid(3000, 4000)
    assert grid.tiles == 125 * 167
    assert cut(picture, grid, grid.tiles - 5, grid.tiles).shape == (5, SIDE, SIDE, 3)
    assert Grid(4000, 3000).tiles == grid.tiles


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (4001, 1), (1, 4001), (3001, 3001), (-1, 4)])
def test_sizes_out_of_range(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"at least one pixel|at most 4000x3000"):
        Grid(*size)

"""Crops of photographs in the batches: where they are cut, in which blocks they stand, and files that are none."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wdmoe.broadcast.datasets.crops import Crops, Places, load_wallpapers, sha256_of_pixels
from wdmoe.broadcast.training.batches import BatchSource, Draws
from wdmoe.errors import ConfigError, MissingExtraError

CPU = torch.device("cpu")
SIDE = 16
TOOLS = Path(__file__).parents[2] / "tools" / "data"
RNG = np.random.default_rng(4)
DARK = np.zeros((20, SIDE, SIDE, 3), np.uint8)  # the small pictures are black, photographs are not
PHOTOGRAPHS = [RNG.integers(128, 256, shape, dtype=np.uint8) for shape in ((32, 50, 3), (70, 40, 3))]


def batch_of(crops=Crops(PHOTOGRAPHS, SIDE), rank=0, world=1, **draws):  # noqa: B008
    how = Draws(batch=200, **draws)
    return BatchSource(DARK, np.arange(20) // 10, how, 16, 16, crops).batch(5, rank, world, CPU)


def places(photograph, zoom, down, right):
    return Places(*(np.array([value]) for value in (photograph, zoom, down, right)))


def test_a_crop_is_that_part_of_the_photograph():
    crops = Crops(PHOTOGRAPHS, SIDE)
    first, second = PHOTOGRAPHS
    assert np.array_equal(crops.cut(places(0, 1, 0.0, 0.0))[0], first[:SIDE, :SIDE])
    assert np.array_equal(crops.cut(places(1, 1, 0.9999, 0.9999))[0], second[-SIDE:, -SIDE:])
    wide = second[-2 * SIDE :, : 2 * SIDE].astype(float)
    means = (wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]) / 4
    assert np.array_equal(crops.cut(places(1, 2, 0.9999, 0.0))[0], np.rint(means))


def test_so_many_blocks_have_crops_and_the_others_stay_as_they_were():
    without, some = batch_of(None), batch_of(photographs=0.3)
    cropped = some.pictures.amin(dim=(2, 3, 4)) > 0.4
    assert torch.equal(cropped[:, 0], cropped[:, 1])
    assert 0.2 < cropped[:, 0].float().mean() < 0.4
    assert torch.equal(some.pictures[~cropped], without.pictures[~cropped])
    assert torch.equal(some.noise, without.noise)
    assert torch.equal(some.snr_db, without.snr_db)


def test_the_kinds_of_pairs():
    same = batch_of(photographs=1.0, same_picture=1.0, same_class=0.0).pictures
    assert torch.equal(same[:, 0], same[:, 1])
    other = batch_of(photographs=1.0, same_picture=0.0).pictures
    assert not (other[:, 0] == other[:, 1]).flatten(1).all(dim=1).any()


def test_parts_of_the_processes_make_the_batch_of_one():
    whole = batch_of(photographs=0.5).pictures
    parts = [batch_of(photographs=0.5, rank=rank, world=2).pictures for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Crops([]), "photographs"),
        (lambda: Crops([np.zeros((64, 63, 3), np.uint8)]), "64x64"),
        (lambda: Draws(photographs=1.5), "photographs"),
        (lambda: Draws(photographs=float("nan")), "photographs"),
        (lambda: batch_of(None, photographs=0.1), "give photographs"),
    ],
)
def test_what_makes_no_sense_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_files_that_hold_no_photographs(tmp_path):
    file = tmp_path / "file.npz"
    with pytest.raises(MissingExtraError, match="tools/data/fetch_wallpapers"):
        load_wallpapers(file)
    file.write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match="not an NPZ"):
        load_wallpapers(file)
    np.savez(file, grey=np.zeros((64, 64), np.uint8))
    with pytest.raises(ConfigError, match="RGB"):
        load_wallpapers(file)
    np.savez(file, b=PHOTOGRAPHS[1], a=PHOTOGRAPHS[0])
    found = load_wallpapers(file)
    assert list(found) == ["a", "b"]
    assert sha256_of_pixels(found) != sha256_of_pixels({**found, "a": PHOTOGRAPHS[1]})


def test_the_tool_names_the_package_that_is_missing(tmp_path):
    command = [sys.executable, TOOLS / "fetch_wallpapers", "--debs", tmp_path, "--out", tmp_path / "out.npz"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert re.search(r"^error: .* holds 0 files lomiri-wallpapers-16\.04_\*\.deb; one is needed$", found.stderr, re.M)


def test_the_list_of_photographs_is_one():
    lines = (TOOLS / "wallpapers.sha256").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 48
    assert all(re.fullmatch(r"[0-9a-f]{64}  [a-z0-9.-]+/usr/share/\S+\.(jpg|png)", line) for line in lines)

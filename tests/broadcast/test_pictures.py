"""Which pictures are trained on, chosen by and reported on, and who is paired with whom."""

import numpy as np
import pytest

from wdmoe.broadcast.datasets.pictures import CLASSES, PAIR_KINDS, Pictures, load_pictures, pair_up, split_pictures
from wdmoe.errors import ConfigError, MissingExtraError

LABELS = np.repeat(np.arange(len(CLASSES)), 1000)  # the order in which the package has them


@pytest.fixture(scope="module")
def split():
    return split_pictures(LABELS)


def test_the_division_is_the_recorded_one_and_stratified(split):
    for part, each in ((split.train, 850), (split.choose, 50), (split.test, 100)):
        assert np.bincount(LABELS[part]).tolist() == [each] * len(CLASSES)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.choose, split.test])), np.arange(10_000))


def test_other_labels_are_refused():
    with pytest.raises(ConfigError, match="other labels"):
        split_pictures(np.roll(LABELS, 1))
    with pytest.raises(ConfigError, match="1000 pictures of each"):
        split_pictures(LABELS[1:])


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_each_picture_is_wanted_once_by_each_user(split, kind):
    pairs = pair_up(kind, split.test, LABELS)
    for user in (0, 1):
        assert np.array_equal(np.sort(pairs[:, user]), split.test)
    same_class = LABELS[pairs[:, 0]] == LABELS[pairs[:, 1]]
    assert np.all(same_class == (kind != "different class"))
    assert np.all((pairs[:, 0] == pairs[:, 1]) == (kind == "same picture"))
    assert np.array_equal(pairs, pair_up(kind, split.test[::-1], LABELS)) or kind == "same picture"


def test_different_classes_meet_all_others(split):
    pairs = pair_up("different class", split.test, LABELS)
    met = {tuple(each) for each in LABELS[pairs]}
    assert len(met) == len(CLASSES) * (len(CLASSES) - 1)


def test_pairs_that_cannot_be_made(split):
    with pytest.raises(ConfigError, match="same number"):
        pair_up("same class", split.test[:-1], LABELS)
    with pytest.raises(ConfigError, match="kind of pairs"):
        pair_up("other", split.test, LABELS)


def test_files_that_are_not_the_pictures(tmp_path):
    with pytest.raises(MissingExtraError, match="tools/data/fetch_pictures"):
        load_pictures(tmp_path / "none.npz")
    file = tmp_path / "pictures.npz"
    file.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="not an NPZ"):
        load_pictures(file)
    pixels = np.zeros((10_000, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match="SHA-256"):
        Pictures(pixels, LABELS.astype(np.uint8))
    with pytest.raises(ConfigError, match="32x32 RGB"):
        Pictures(pixels[:5], LABELS.astype(np.uint8))

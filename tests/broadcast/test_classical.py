"""Payloads against files taken apart by hand, and fronts by the properties that bits at capacity must have."""

import numpy as np
import pytest

from wdmoe.broadcast.baselines.classical import (
    Ladder,
    build_ladder,
    channel_uses,
    even_shares,
    most_bits,
    same_to_both,
    sweep,
)
from wdmoe.broadcast.baselines.codecs import Avif, HevcIntra, Jpeg2000
from wdmoe.broadcast.quality.metrics import psnr_db
from wdmoe.errors import ConfigError

CODECS = [
    Jpeg2000(rungs=12, levels=(3,)),
    HevcIntra(preset="ultrafast", chroma=("444",)),
    Avif(speed=10, subsampling=("4:4:4",)),
]
SNR_DB = (10.0, 5.0)


@pytest.fixture(scope="module")
def picture():
    """A smooth slope with an edge: something each codec can do well."""
    y, x = np.mgrid[0:32, 0:32]
    levels = np.stack([8 * x, 8 * y, 4 * (x + y)], axis=-1)
    return np.where((x + 2 * y > 50)[..., None], 255 - levels, levels).astype(np.uint8)


@pytest.fixture(scope="module")
def ladders(picture):
    """Two pictures on a ladder made by hand: psnr = 12 + bits / 100."""
    bits = np.arange(0, 2000, 100)
    return {n: Ladder(bits, 12 + bits / 100 + n, 1 - 1 / (1 + bits), np.full(bits.shape, np.nan)) for n in (0, 1)}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_quality_and_payload_rise_along_the_rungs(codec, picture):
    low, high = (codec.encode(picture, 0, rung) for rung in (codec.rungs // 4, codec.rungs - 2))
    assert 0 < codec.payload_bytes(low) < codec.payload_bytes(high) < len(high)
    assert psnr_db(picture, codec.decode(low)) < psnr_db(picture, codec.decode(high))
    assert psnr_db(picture, codec.decode(high)) > 30


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_what_is_not_counted_does_not_depend_on_quality(codec, picture):
    """Else something of the picture would travel for free."""
    files = [codec.encode(picture, 0, rung) for rung in (codec.rungs // 3, codec.rungs - 2)]
    free = [len(file) - codec.payload_bytes(file) for file in files]
    assert max(free) - min(free) <= 2  # a longer payload may have a longer length field


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_broken_files_are_refused(codec, picture):
    file = codec.encode(picture, 0, 3)
    for broken in (b"", b"not a picture", file[:-3], file + b"\0\0\0\x09more"):
        with pytest.raises(ConfigError):
            codec.payload_bytes(broken)


def test_the_body_of_a_codestream_is_what_follows_its_header(picture):
    codec = CODECS[0]
    file = codec.encode(picture, 0, 6)
    assert codec.payload_bytes(file) == len(file) - file.index(b"\xff\x93") - 2 - 2  # SOD, EOC


def test_a_ladder_fits_and_starts_with_nothing(picture):
    ladder = build_ladder(CODECS[0], picture, np.zeros_like(picture), 1771)
    assert ladder.bits[0] == 0
    assert ladder.bits[-1] <= 1771
    assert ladder.psnr_db[0] == psnr_db(picture, np.zeros_like(picture))
    assert len(ladder.bits) > 3
    for budget in (0, 500, 1771):
        rung = ladder.best(budget)
        fits = ladder.bits <= budget
        assert fits[rung]
        assert ladder.psnr_db[rung] == ladder.psnr_db[fits].max()


def test_superposition_serves_both_at_least_as_well(ladders):
    """At the stronger user's rates of time division the weaker one has more bits."""
    turns, layers = (
        sweep(ladders, [[0, 1]], SNR_DB, 512, scheme, even_shares(SNR_DB, scheme, 9))
        for scheme in ("time division", "superposition")
    )
    np.testing.assert_allclose(turns.psnr_db[..., 0], layers.psnr_db[..., 0])
    assert np.all(layers.psnr_db[..., 1] >= turns.psnr_db[..., 1])
    assert np.any(layers.psnr_db[..., 1] > turns.psnr_db[..., 1])


@pytest.mark.parametrize("scheme", ["time division", "superposition"])
def test_a_front_falls_for_one_user_as_it_rises_for_the_other(ladders, scheme):
    for snr_db in (SNR_DB, SNR_DB[::-1]):
        share = even_shares(snr_db, scheme, 7)
        front = sweep(ladders, [[0, 1], [1, 0]], snr_db, 512, scheme, share)
        assert share[0] == 0
        assert share[-1] == pytest.approx(1)
        assert np.all(np.diff(share) > 0)
        assert np.all(np.diff(front.psnr_db[..., 0], axis=0) >= 0)
        assert np.all(np.diff(front.psnr_db[..., 1], axis=0) <= 0)
        assert front.psnr_db.shape == front.ssim.shape == (7, 2, 2)


def test_one_picture_for_both_is_sent_at_the_weaker_capacity(ladders):
    front = same_to_both(ladders, [0], SNR_DB, 512)
    bits = int(512 * np.log2(1 + 10**0.5))
    assert front.psnr_db.ravel().tolist() == [12 + bits // 100] * 2


def test_channel_uses_are_those_of_the_bandwidth_ratio():
    assert [channel_uses(cbr, (32, 32, 3)) for cbr in (1 / 12, 1 / 6, 1 / 3)] == [256, 512, 1024]
    assert most_bits(SNR_DB, 512) == int(512 * np.log2(11))
    for wrong in (0, -1, 1.5, np.nan):
        with pytest.raises(ConfigError, match="cbr"):
            channel_uses(wrong, (32, 32, 3))


def test_unknown_schemes_are_named(ladders):
    with pytest.raises(ConfigError, match="time division"):
        sweep(ladders, [[0, 1]], SNR_DB, 512, "frequency", [0.5])
    with pytest.raises(ConfigError, match="two points"):
        even_shares(SNR_DB, "superposition", 1)

"""What the codec gives is monotone: the shipped weights, or where there are none an untrained codec's linear part."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.made_up_pictures import made_up
from tests.lab.one_thread import one_thread
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings, as_pictures
from wdmoe.broadcast.codec.model_file import load_model
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep, mean_psnr
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.quality_law import LAW_FILE, load_law
from wdmoe.broadcast.study.results import DATA, JOINT_FILE

__all__ = ["one_thread"]
SHIPPED = DATA / JOINT_FILE
SLACK_DB = 0.1  # of a mean over few pictures: noise is not the same at other powers
PAIRS = np.stack([np.arange(12), np.roll(np.arange(12), 5)], axis=1)


@pytest.fixture(scope="module")
def codec():
    if SHIPPED.exists():
        return load_model(SHIPPED)
    torch.manual_seed(3)
    return BroadcastCodec(ModelSettings(width=16, heads=2, encoder_depth=1, decoder_depth=1, condition=8)).eval()


@pytest.fixture(scope="module")
def pixels():
    return made_up(12)


@settings(max_examples=3, deadline=None)
@given(first=st.floats(0, 20), second=st.floats(0, 20), kept=st.sampled_from([4, 8, 16]))
def test_alpha_gives_to_one_user_and_takes_from_the_other(codec, pixels, first, second, kept):
    radio = Radio(snr_db=(first, second))
    means = mean_psnr(alpha_sweep(codec, pixels, PAIRS, np.linspace(0, 1, 6), radio, kept))
    for before, after in itertools.pairwise(means):
        assert after[0] >= before[0] - SLACK_DB
        assert after[1] <= before[1] + SLACK_DB
    assert means[-1, 0] > means[0, 0] + 1
    assert means[0, 1] > means[-1, 1] + 1


@settings(max_examples=3, deadline=None)
@given(alpha=st.floats(0.2, 0.8), other=st.floats(0, 20), user=st.sampled_from([0, 1]))
def test_a_better_channel_gives_a_better_picture(codec, pixels, alpha, other, user):
    own = []
    for snr in (0.0, 5.0, 10.0, 15.0, 20.0):
        snr_db = (snr, other) if user == 0 else (other, snr)
        own.append(mean_psnr(alpha_sweep(codec, pixels, PAIRS, (alpha,), Radio(snr_db=snr_db), 8))[0, user])
    assert all(b >= a - SLACK_DB for a, b in itertools.pairwise(own))
    assert own[-1] > own[0] + 0.3


@torch.no_grad()
@settings(max_examples=5, deadline=None)
@given(alpha=st.floats(0, 1), kept=st.integers(1, 16), first=st.floats(-5, 25), second=st.floats(-5, 25))
def test_symbols_of_pictures_have_unit_power(codec, pixels, alpha, kept, first, second):
    symbols = codec.encode(
        as_pictures(pixels[PAIRS[:4]]),
        torch.tensor([(first, second)] * 4),
        torch.full((4,), alpha),
        torch.full((4,), kept),
    )
    power = symbols[:, :, :kept].square().sum(-1).mean(dim=(1, 2))
    torch.testing.assert_close(power, torch.ones(4), rtol=1e-4, atol=1e-4)


def test_the_law_is_that_of_the_shipped_codec():
    if not LAW_FILE.exists():
        assert not SHIPPED.exists(), "the shipped codec has no quality law: tools/study/fit_quality_law"
        return
    law = load_law(LAW_FILE)
    assert law.weights_sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert law.error.rms_db < 1

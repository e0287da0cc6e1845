"""What holds for the codec whatever it has learned, and its channel against the wireless model's definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.one_thread import one_thread
from wdmoe.broadcast.codec.channel import awgn, draw_unit, rayleigh
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.training.losses import LOSSES, region
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import broadcast_awgn

__all__ = ["one_thread"]
SMALL = ModelSettings(width=16, heads=2, encoder_depth=1, decoder_depth=1, condition=8, slots=16)
SIXTEEN = replace(SMALL, side=16)
DRAWS = 20_000


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(3)
    made = BroadcastCodec(SMALL).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "modulate" in name or "head.2" in name:  # start at zero, as if there was nothing to learn
                weight.normal_(0, 0.1)
    return made


def inputs(blocks=2, side=32, seed=0, alpha=0.5, kept=8, snr_db=(10.0, 5.0)):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(blocks, 2, 3, side, side, generator=generator)
    return pictures, torch.tensor([snr_db] * blocks), torch.full((blocks,), alpha), torch.full((blocks,), kept)


@torch.no_grad()
@settings(max_examples=6, deadline=None)
@given(alpha=st.floats(0, 1), kept=st.integers(1, 16), first=st.floats(-5, 30), second=st.floats(-5, 30))
def test_symbols_have_unit_power_and_only_where_they_are_sent(codec, alpha, kept, first, second):
    symbols = codec.encode(*inputs(alpha=alpha, kept=kept, snr_db=(first, second)))
    assert symbols.shape == (2, 64, 16, 2)
    assert torch.all(symbols[:, :, kept:] == 0)
    power = symbols[:, :, :kept].square().sum(-1).mean(dim=(1, 2))
    torch.testing.assert_close(power, torch.ones(2))
    sent = torch.view_as_complex(symbols[:, :, :kept].contiguous()).flatten(1).numpy()
    broadcast_awgn(np.random.default_rng(0), sent, [first, second])  # refuses any other power


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "wanted"), [(1.0, 0), (0.0, 1)])
def test_at_the_ends_of_alpha_the_other_picture_leaves_no_trace(codec, alpha, wanted):
    pictures, *told = inputs(alpha=alpha)
    changed = pictures.clone()
    changed[:, 1 - wanted] = 1 - changed[:, 1 - wanted]
    assert torch.equal(codec.encode(pictures, *told), codec.encode(changed, *told))
    changed[:, wanted] = 1 - changed[:, wanted]
    assert not torch.allclose(codec.encode(pictures, *told), codec.encode(changed, *told))


@torch.no_grad()
def test_both_snrs_and_alpha_reach_the_symbols_and_its_own_the_decoder(codec):
    plain = codec.encode(*inputs())
    for other in (inputs(snr_db=(12.0, 5.0)), inputs(snr_db=(10.0, 7.0)), inputs(alpha=0.6)):
        assert not torch.allclose(codec.encode(*other), plain, atol=1e-4)
    told = {"share": torch.ones(2) / 2, "kept": torch.full((2,), 8)}
    shown = codec.decode(plain, torch.tensor([10.0, 10.0]), user=torch.tensor([0, 0]), **told)
    assert shown.shape == (2, 3, 32, 32)
    for snr_db, user in ((4.0, 0), (10.0, 1)):
        other = codec.decode(plain, torch.tensor([snr_db] * 2), user=torch.tensor([user] * 2), **told)
        assert not torch.allclose(other, shown, atol=1e-4)


@torch.no_grad()
def test_a_block_does_not_depend_on_its_neighbours_in_the_batch(codec):
    pictures, snr_db, alpha, kept = inputs(blocks=3)
    kept = torch.tensor([4, 8, 16])
    together = codec.encode(pictures, snr_db, alpha, kept)
    for i in range(3):
        alone = codec.encode(pictures[i : i + 1], snr_db[i : i + 1], alpha[i : i + 1], kept[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    received = together[:, None].expand(-1, 2, -1, -1, -1)
    shown = codec.decode_both(received, snr_db, alpha, kept)
    second = codec.decode(together, snr_db[:, 1], 1 - alpha, kept, torch.ones(3))
    torch.testing.assert_close(shown[:, 1], second)


def test_the_same_seed_makes_the_same_codec():
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(BroadcastCodec(SIXTEEN))
    with torch.no_grad():
        first, second = (each.encode(*inputs(side=16)) for each in made)
    assert torch.equal(first, second)
    assert first.shape == (2, 16, 16, 2)  # other sizes of pictures have other numbers of tokens


def test_gradients_reach_every_weight():
    torch.manual_seed(1)
    codec = BroadcastCodec(SIXTEEN)
    pictures, snr_db, alpha, kept = inputs(side=16, kept=16)
    symbols = codec.encode(pictures, snr_db, alpha, kept)
    heard = awgn(symbols, snr_db, draw_unit(torch.Generator().manual_seed(1), 2, 2, 16, 16))
    shown = codec.decode_both(heard.symbols, heard.snr_db, alpha, kept)
    region((shown - pictures).square().mean(dim=(2, 3, 4)), alpha).backward()
    still = [name for name, weight in codec.named_parameters() if weight.grad is None]
    assert still == []


def test_the_default_is_about_a_million_weights():
    count = sum(weight.numel() for weight in BroadcastCodec(ModelSettings()).parameters())
    assert 0.8e6 < count < 1.5e6
    assert [ModelSettings().kept(cbr) for cbr in (1 / 12, 1 / 6, 1 / 3)] == [4, 8, 16]


def test_noise_has_half_its_power_in_each_part():
    symbols = torch.ones(DRAWS // 100, 100, 1, 2) * 0.5**0.5
    noise = draw_unit(torch.Generator().manual_seed(1), DRAWS // 100, 2, 100, 1)
    heard = awgn(symbols, torch.tensor([[10.0, 0.0]] * (DRAWS // 100)), noise)
    off = heard.symbols - symbols[:, None]
    for user, power in enumerate((0.1, 1.0)):
        np.testing.assert_allclose(off[:, user].square().mean(dim=(0, 1, 2)), [power / 2] * 2, rtol=8 / DRAWS**0.5)


@pytest.mark.parametrize("csi_error", [0.0, 0.2])
def test_what_a_receiver_makes_of_fading_has_the_error_its_snr_says(csi_error):
    """Without bias, the error of a symbol of power 1 has power 1 / SNR."""
    generator = torch.Generator().manual_seed(2)
    blocks = 200
    symbols = draw_unit(generator, blocks, 100, 1)
    snr_db = torch.tensor([[10.0, 0.0]] * blocks)
    known, error = (draw_unit(generator, blocks, 2) for _ in range(2))
    heard = rayleigh(symbols, snr_db, draw_unit(generator, blocks, 2, 100, 1), known, error, csi_error)
    missed = (heard.symbols - symbols[:, None]).square().sum(-1).mean(dim=(2, 3))
    told = 10 ** (heard.snr_db / 10)
    np.testing.assert_allclose((missed * told).mean(0), [1, 1], rtol=0.1)


def test_slots_that_were_not_sent_are_silent_at_the_receiver():
    symbols = torch.ones(1, 4, 3, 2)
    symbols[:, :, 2:] = 0
    heard = awgn(symbols, torch.tensor([[0.0, 0.0]]), draw_unit(torch.Generator().manual_seed(1), 1, 2, 4, 3))
    assert torch.all(heard.symbols[:, :, :, 2:] == 0)
    assert torch.all(heard.symbols[:, :, :, :2] != 1)


@pytest.mark.parametrize("name", ["weighted", "region"])
def test_at_the_ends_of_alpha_the_other_error_does_not_count(name):
    errors, others = torch.tensor([[0.01, 0.2]]), torch.tensor([[0.01, 0.4]])
    loss = LOSSES[name]
    assert loss(errors, torch.ones(1)) == pytest.approx(float(loss(others, torch.ones(1))))
    assert loss(errors, torch.zeros(1)) < loss(others, torch.zeros(1))


def test_the_region_loss_lies_between_the_weighted_mean_and_the_worse_user():
    error, alpha = torch.tensor([[0.1, 0.001]]), torch.tensor([0.5])  # -10 and -30 dB
    assert region(error, alpha, 1e-3) == pytest.approx(-20, abs=0.1)
    assert region(error, alpha, 10.0) == pytest.approx(-10, abs=0.1)
    assert -20 < region(error, alpha) < -10
    assert region(error[:, :1].expand(1, 2), alpha) == pytest.approx(-10)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ModelSettings(width=15), "width"),
        (lambda: ModelSettings(slots=0), "slots"),
        (lambda: ModelSettings().kept(0.5), "cbr"),
        (lambda: ModelSettings().kept(float("nan")), "cbr"),
        (lambda: BroadcastCodec(SMALL).encode(*inputs(side=30)), r"\(block, 2, 3, 32, 32\)"),
        (lambda: ModelSettings(side=30), "side"),
        (lambda: BroadcastCodec(SMALL).encode(inputs()[0], *inputs(blocks=1)[1:]), "snr_db"),
        (lambda: awgn(torch.zeros(1, 4, 3, 2), torch.zeros(1, 2), torch.zeros(1, 4, 3, 2)), "noise"),
    ],
)
def test_input_that_makes_no_sense_is_named(call, named):
    with pytest.raises(ConfigError, match=named):
        call()

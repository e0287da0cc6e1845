"""Classical codecs on fading channels: SNRs against those of the learned codec's receivers, rates by closed forms."""

import numpy as np
import pytest
import torch
from scipy.special import exp1

from wdmoe.broadcast.baselines.classical import SCHEMES, Ladder, even_shares, sweep
from wdmoe.broadcast.baselines.classical_fading import (
    PEAK,
    at_block_rates,
    at_chosen_rates,
    fading_bits,
    same_at_block_rates,
    same_at_chosen_rates,
    snr_beside,
    snr_of_bits,
    snr_to_decode,
)
from wdmoe.broadcast.quality.alpha_sweep import rows_of
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import capacity_bits, effective_snr_db, superposition_bits

SNR_DB, USES = (10.0, 5.0), 512
MANY = 4000
BITS = np.arange(0, 3600, 60)
PSNR = 12 + 24 * (1 - np.exp(-BITS / 900))  # concave, as ladders are
FADING = Radio(snr_db=SNR_DB, csi_error=0.1)
ERRORS = (0.0, 0.05, 0.1, 0.2)


def ladders_of(numbers):
    ladder = Ladder(BITS, PSNR, PSNR / 40, np.full(BITS.shape, np.nan))
    return {int(number): ladder for number in np.unique(numbers)}


@pytest.fixture(scope="module")
def pairs():
    return np.stack([np.arange(MANY), np.roll(np.arange(MANY), 1)], axis=1)


@pytest.mark.parametrize("error", ERRORS)
def test_the_mean_rate_is_the_ergodic_capacity(pairs, error):
    """log2(e) exp(1/g) E1(1/g) for exponential SNRs of mean g; 5 standard deviations."""
    radio = Radio(snr_db=SNR_DB, csi_error=error)
    rates = capacity_bits(radio.effective_snr_db(pairs))
    mean = 10 ** (radio.mean_effective_snr_db() / 10)
    np.testing.assert_allclose(mean, (1 - error) / (10 ** (-np.array(SNR_DB) / 10) + error))
    close = 5 * rates.std(axis=0) / np.sqrt(MANY)
    assert np.all(np.abs(rates.mean(axis=0) - np.exp(1 / mean) * exp1(1 / mean) / np.log(2)) < close)


@pytest.mark.parametrize("error", ERRORS)
def test_snrs_are_what_the_learned_codecs_receivers_are_told(error):
    radio, few = Radio(snr_db=SNR_DB, csi_error=error), np.array([[3, 7], [7, 3], [11, 0]])
    draws = radio.draws(few, 16, 4)  # with the noise of whole blocks
    heard = radio.heard(torch.ones(3, 16, 4, 2) / 2**0.5, rows_of(SNR_DB, 3), draws)
    np.testing.assert_allclose(radio.effective_snr_db(few), heard.snr_db, atol=1e-4)


def test_a_known_steady_gain_is_no_fading_and_error_only_harms(pairs):
    np.testing.assert_allclose(effective_snr_db(SNR_DB, 1.0, 0.0), SNR_DB)
    np.testing.assert_allclose(Radio(snr_db=SNR_DB).effective_snr_db(pairs[:3]), [SNR_DB] * 3)
    falling = np.stack([Radio(snr_db=SNR_DB, csi_error=error).effective_snr_db(pairs[:99]) for error in ERRORS])
    assert np.all(np.diff(falling, axis=0) < 0)
    assert np.isfinite(effective_snr_db(SNR_DB, 0.0, 0.0)).all()
    assert np.all(effective_snr_db(SNR_DB, 0.0, 1.0) < -900)
    for power, error in ((-1, 0), (np.nan, 0), (1, -0.1), (1, 1.1)):
        with pytest.raises(ConfigError, match=r"known_power|csi_error"):
            effective_snr_db(SNR_DB, power, error)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("snr_db", [SNR_DB, SNR_DB[::-1]])
def test_without_fading_block_rates_are_those_of_steady_channels(pairs, scheme, snr_db):
    few, ladders = pairs[:4], ladders_of(pairs[:5])
    steady = sweep(ladders, few, snr_db, USES, scheme, even_shares(snr_db, scheme, 9))
    told = at_block_rates(ladders, few[:2], Radio(snr_db=snr_db), USES, scheme, 9)
    np.testing.assert_array_equal(told.psnr_db, steady.psnr_db[:, :2])


def test_block_rates_give_both_at_least_what_other_links_do(pairs):
    few, ladders = pairs[:200], ladders_of(pairs)
    turns, layers = (at_block_rates(ladders, few, FADING, USES, scheme, 7) for scheme in SCHEMES)
    assert np.all(layers.psnr_db >= turns.psnr_db)
    assert np.any(layers.psnr_db > turns.psnr_db)
    chosen = at_chosen_rates(ladders, few, FADING, USES, "time division", 7)
    assert np.all(turns.psnr_db >= chosen.psnr_db)
    assert turns.psnr_db.mean() > chosen.psnr_db.mean() + 1
    once, risked = (link(ladders, few[:, 0], FADING, USES) for link in (same_at_block_rates, same_at_chosen_rates))
    assert once.psnr_db.shape == risked.psnr_db.shape == (1, 200, 2)
    assert once.psnr_db[..., 0].tolist() == once.psnr_db[..., 1].tolist()


def test_a_chosen_rate_is_the_best_one_and_lost_as_often_as_outage_says(pairs):
    """Against every rate tried on all blocks: none does better on average, but for chance."""
    ladders, share = ladders_of(pairs), 1.0
    shown = at_chosen_rates(ladders, pairs, FADING, USES, "time division", 2).psnr_db[-1, :, 0]
    assert len(np.unique(shown)) == 2  # one rung for all, as all have one ladder, or none
    snr = 10 ** (FADING.effective_snr_db(pairs)[:, 0] / 10)
    needs = snr_of_bits(BITS, USES * share)
    tried = np.where(snr[:, None] >= needs, PSNR, PSNR[0])
    assert shown.mean() >= tried.mean(axis=0).max() - 0.1
    rung = int(np.flatnonzero(shown.max() == PSNR)[0])
    lost = -np.expm1(-needs[rung] / (0.9 / (0.1 + 0.1)))
    assert 0.05 < lost < 0.6
    assert np.mean(shown == PSNR[0]) == pytest.approx(lost, abs=5 * np.sqrt(lost / MANY))


def test_layers_are_decoded_at_once_or_one_after_the_other():
    """Thresholds against the rates that superposition has at these SNRs."""
    power = np.linspace(0.05, 0.95, 7)
    for snr_db in (SNR_DB, (5.0, 5.0)):
        rates = superposition_bits(snr_db, power)  # the first user is the stronger one
        own, other = (snr_of_bits(rates[:, user] * USES, USES) for user in (0, 1))
        snr = 10 ** (np.array(snr_db) / 10)
        np.testing.assert_allclose(snr_beside(other, 1 - power, power), snr[1])
        np.testing.assert_allclose(snr_to_decode(own, other, power, 1 - power), snr[0])
    assert snr_beside(np.array([0.0, 1.0, np.inf]), 0.0, 1.0).tolist() == [0, np.inf, np.inf]
    assert snr_beside(np.array([0.0, 3.0, np.inf]), 1.0, 0.0).tolist() == [0, 3, np.inf]
    assert snr_of_bits([0, 0, 5, 10, 9e9], [0, 2, 0, 5, 1]).tolist() == [0, 0, np.inf, 3, np.inf]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ends_of_a_front_serve_one_user_and_exchanging_users_exchanges_them(pairs, scheme):
    few, ladders = pairs[:300], ladders_of(pairs)
    front = at_chosen_rates(ladders, few, FADING, USES, scheme, 5)
    assert np.all(front.psnr_db[0, :, 0] == PSNR[0])
    assert np.all(front.psnr_db[-1, :, 1] == PSNR[0])
    means = front.psnr_db.mean(axis=1)
    assert means[-1, 0] > means[0, 1] > PSNR[0] + 3  # 10 dB and 5 dB, alone
    assert means[2].min() > PSNR[0] + 1
    other = Radio(snr_db=SNR_DB[::-1], csi_error=0.1)
    turned = at_chosen_rates(ladders, pairs[:600], other, USES, scheme, 5)  # other draws: alike on average only
    plain = at_chosen_rates(ladders, pairs[:600], FADING, USES, scheme, 5)
    np.testing.assert_allclose(turned.psnr_db.mean(1)[::-1, ::-1], plain.psnr_db.mean(1), atol=1.2)
    np.testing.assert_allclose(turned.share, 1 - plain.share[::-1])


def test_ladders_reach_nearly_every_block(pairs):
    most = fading_bits(Radio(snr_db=SNR_DB, csi_error=0.0), USES)
    assert most == int(USES * np.log2(1 + 10 * PEAK)) == 3542
    assert fading_bits(FADING, USES) < most
    rates = USES * capacity_bits(Radio(snr_db=SNR_DB, csi_error=0.0).effective_snr_db(pairs))
    assert np.mean(rates > most) < 1e-3

"""The linear part of the codec: principal components, what goes where, pilots; against what theory says of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.one_thread import one_thread
from wdmoe.broadcast.codec.channel import awgn, draw_unit
from wdmoe.broadcast.codec.layout import PILOTS, Layout, from_symbols, to_symbols
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.principal import Principal, assumed_principal, divisions, fit_principal
from wdmoe.errors import ConfigError

__all__ = ["one_thread"]
SIZES = ModelSettings(side=16, width=16, heads=2, encoder_depth=1, decoder_depth=1, condition=8)
COMPONENTS = 2 * SIZES.tokens * SIZES.slots
PIXELS = np.random.default_rng(4).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
BLOCKS = 3
PICTURES_WITHIN_DB = 0.35  # a few hundred pictures against an expectation


@pytest.fixture(scope="module")
def layout() -> Layout:
    made = Layout(SIZES.tokens, SIZES.slots, 8)
    made.take(assumed_principal(16, COMPONENTS))
    return made


def test_components_are_orthonormal_and_fall() -> None:
    for principal in (fit_principal(PIXELS, 50), assumed_principal(16, COMPONENTS)):
        count = principal.spread.size
        np.testing.assert_allclose(principal.basis.T @ principal.basis, np.eye(count), atol=2e-5)
        assert np.all(np.diff(principal.spread) <= 0)
        assert np.all(principal.spread > 0)


def test_components_are_those_of_the_pictures_and_their_mirror_images() -> None:
    principal = fit_principal(PIXELS, 768)
    flat = np.moveaxis(PIXELS, -1, 1) / 255
    both = np.concatenate([flat, flat[..., ::-1]]).reshape(80, -1)
    spread = np.std((both - both.mean(axis=0)) @ principal.basis, axis=0)
    np.testing.assert_allclose(spread[:60], principal.spread[:60], rtol=1e-3)
    np.testing.assert_allclose(both.mean(axis=0), principal.mean, atol=1e-6)


@given(kept=st.integers(1, 16))
@settings(max_examples=8)
def test_divisions_rise_with_alpha_and_treat_the_users_alike(kept: int) -> None:
    for part in divisions(assumed_principal(16, COMPONENTS).spread, 2 * SIZES.tokens * kept - PILOTS):
        assert part[0] == 0
        assert part[-1] == 1
        assert np.all(np.diff(part) >= 0)
        np.testing.assert_allclose(part + part[::-1], 1)


@given(alpha=st.lists(st.floats(0, 1), min_size=BLOCKS, max_size=BLOCKS), kept=st.integers(1, 16))
@settings(max_examples=20)
def test_every_component_is_found_where_it_was_put(layout: Layout, alpha: list[float], kept: int) -> None:
    ratio, rate = torch.tensor(alpha), torch.full((BLOCKS,), kept)
    dims = layout.dimensions(ratio, rate)
    components = torch.randn(BLOCKS, 2, COMPONENTS, generator=torch.Generator().manual_seed(0))
    values = layout.place(dims, components)
    assert torch.all(values[:, 2 * SIZES.tokens * kept - PILOTS :] == 0)
    for user in (0, 1):
        sent = torch.arange(COMPONENTS) < dims.mine[:, user, None]
        found = layout.find(dims, values, torch.full((BLOCKS,), user))
        assert torch.equal(found, components[:, user] * sent)
    assert torch.equal(dims.mine.sum(1), dims.shared)
    power = layout.powers(dims, torch.stack([ratio, 1 - ratio], 1), rate)
    used = (dims.mine > 0) * dims.power
    torch.testing.assert_close(power.sum(-1), (dims.shared / 2)[:, None] * used, rtol=1e-4, atol=1e-4)


def test_symbols_and_dimensions_are_the_same_numbers() -> None:
    values = torch.randn(2, COMPONENTS)
    symbols = to_symbols(values, SIZES.tokens)
    assert symbols.shape == (2, SIZES.tokens, SIZES.slots, 2)
    assert torch.equal(from_symbols(symbols), values)
    first = to_symbols(values * (torch.arange(COMPONENTS) < 2 * SIZES.tokens * 3), SIZES.tokens)
    assert torch.all(first[:, :, 3:] == 0)  # a rate's slots are its first dimensions


def test_pilots_tell_scale_and_sameness(layout: Layout) -> None:
    rate = torch.full((BLOCKS,), 8)
    dims = layout.dimensions(torch.full((BLOCKS,), 0.5), rate)
    level = torch.tensor([0.5, 1.0, 1.5])[:, None]
    values = level * torch.randn(BLOCKS, COMPONENTS) * (torch.arange(COMPONENTS) < dims.shared[:, None])
    same = torch.tensor([True, False, True])
    sent = layout.with_pilots(dims, values, same)
    log_scale, told = layout.pilots(dims, sent, torch.full((BLOCKS,), 1e-6))
    assert torch.equal(told, same)
    torch.testing.assert_close(sent[:, 0] / values[:, 0], torch.exp(log_scale), rtol=1e-4, atol=1e-4)


def gaussian(principal: Principal, blocks: int) -> torch.Tensor:
    """Pictures (block, 2, 3, 16, 16) whose components are independent and Gaussian."""
    drawn = torch.randn(blocks, 2, principal.spread.size, generator=torch.Generator().manual_seed(5))
    flat = drawn * torch.from_numpy(principal.spread) @ torch.from_numpy(principal.basis).T
    return (flat + torch.from_numpy(principal.mean)).view(blocks, 2, 3, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("snr_db", [5.0, 15.0])
def test_untrained_it_is_the_linear_code_of_theory(snr_db: float) -> None:
    """Alone in the block, the error is `tail + sum l s / (p + s)`, p in the proportion of the standard deviations."""
    blocks, kept = 200, 8
    codec = BroadcastCodec(SIZES)
    principal = assumed_principal(16, COMPONENTS)
    pictures = gaussian(principal, blocks)
    snrs, alpha, rate = torch.full((blocks, 2), snr_db), torch.ones(blocks), torch.full((blocks,), kept)
    noise = draw_unit(torch.Generator().manual_seed(6), blocks, 2, SIZES.tokens, SIZES.slots)
    heard = awgn(codec.encode(pictures, snrs, alpha, rate), snrs, noise)
    shown = codec.decode(heard.symbols[:, 0], snrs[:, 0], alpha, rate, torch.zeros(blocks))
    found = float((shown - pictures[:, 0]).square().sum(dim=(1, 2, 3)).mean())
    sent = 2 * SIZES.tokens * kept - PILOTS
    spread = principal.spread.astype(np.float64)
    power, sigma = sent / 2 * spread[:sent] / spread[:sent].sum(), 10 ** (-snr_db / 10) / 2
    wanted = (spread[:sent] ** 2 * sigma / (power + sigma)).sum() + (spread[sent:] ** 2).sum()
    assert abs(10 * np.log10(found / wanted)) < PICTURES_WITHIN_DB


@torch.no_grad()
def test_exchanging_the_users_exchanges_what_they_get() -> None:
    codec = BroadcastCodec(SIZES)
    pictures = gaussian(assumed_principal(16, COMPONENTS), 4)
    snrs, alpha, rate = torch.tensor([[12.0, 4.0]] * 4), torch.full((4,), 0.7), torch.full((4,), 8)
    one = codec.decode_both(
        codec.encode(pictures, snrs, alpha, rate)[:, None].expand(-1, 2, -1, -1, -1), snrs, alpha, rate
    )
    swapped = codec.encode(pictures.flip(1), snrs.flip(1), 1 - alpha, rate)
    other = codec.decode_both(swapped[:, None].expand(-1, 2, -1, -1, -1), snrs.flip(1), 1 - alpha, rate)
    torch.testing.assert_close(one, other.flip(1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_who_wants_the_same_picture_shares_the_whole_block(alpha: float) -> None:
    codec = BroadcastCodec(SIZES)
    pictures = gaussian(assumed_principal(16, COMPONENTS), 2)[:, :1].expand(-1, 2, -1, -1, -1)
    snrs, rate = torch.tensor([[12.0, 12.0]] * 2), torch.full((2,), 8)
    alone = codec.encode(pictures, snrs, torch.ones(2), rate)
    shared = codec.encode(pictures, snrs, torch.full((2,), alpha), rate)
    assert torch.equal(shared, alone)
    shown = codec.decode_both(shared[:, None].expand(-1, 2, -1, -1, -1), snrs, torch.full((2,), alpha), rate)
    assert torch.equal(shown[:, 0], shown[:, 1])


def test_pictures_that_cannot_be_fitted_are_named() -> None:
    for pixels, count in ((PIXELS[:1], 5), (PIXELS, 0), (PIXELS, 769)):
        with pytest.raises(ConfigError, match="components"):
            fit_principal(pixels, count)

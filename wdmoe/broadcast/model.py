"""The codec: two pictures to one block of symbols, and back to one picture at each user.

    pictures -> encoder (the same for both, both SNRs) -> fusion (similarity, alpha, both SNRs) -> symbols of power 1
    symbols as heard -> decoder (the same for both, told whose it is, its own SNR) -> picture

From the paper's abstract [P]: a Transformer backbone, both users' channels known to encoder and fusion, each decoder
adapting to its own, fusion by similarity with a ratio alpha and without a split of time, power or band. All sizes and
formulas are ours [D]. Modulation by layer-norm scale, shift and gate is that of Peebles and Xie, ICCV 2023.

A picture of 32x32 is 64 tokens of 4x4 pixels; each token has 16 complex symbols, of which a rate keeps the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from wdmoe.errors import ConfigError

USERS = 2
_LEAST_POWER = 1e-8
_MOST_LOGIT = 4.0  # of the fusion: what similarity may shift against alpha, either way


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Sizes. The defaults are for a CPU: about a million weights."""

    width: int = 96
    heads: int = 4
    encoder_depth: int = 3
    fusion_depth: int = 1
    decoder_depth: int = 4
    patch: int = 4  # side of a token, pixels
    slots: int = 16  # complex symbols of a token at the highest rate: 16 of 48 values are a CBR of 1/3
    condition: int = 64  # width of what modulates
    widening: int = 3  # of a block's hidden layer

    def __post_init__(self) -> None:
        for name in ("width", "heads", "encoder_depth", "fusion_depth", "decoder_depth", "slots", "condition"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 2:
            raise ConfigError(f"width must be even and a multiple of heads, got {self.width} and {self.heads}")
        if self.patch < 1 or self.widening < 1:
            raise ConfigError(f"patch and widening must be at least 1, got {self.patch} and {self.widening}")

    def kept(self, cbr: float) -> int:
        """Symbols of a token at a bandwidth ratio (complex uses over height x width x 3); ConfigError if none fits."""
        exact = cbr * 3 * self.patch**2
        kept = round(exact) if math.isfinite(exact) else 0
        if not 1 <= kept <= self.slots or abs(kept - exact) > 1e-3:
            raise ConfigError(f"cbr must be a multiple of 1/{3 * self.patch**2} up to {self.slots} of them, got {cbr}")
        return kept


class BroadcastCodec(nn.Module):
    """Encoder, fusion and decoder. It has no randomness: the channel stands between `encode` and `decode`."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.fusion = Fusion(settings)
        self.decoder = Decoder(settings)

    def encode(self, pictures: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> Tensor:
        """One block of symbols for both pictures.

        Args:
            pictures: (block, 2, 3, side, side), 0 to 1, the side a multiple of the patch.
            snr_db: (block, 2) of both users.
            alpha: (block,) 0 to 1: how much of the block is the first user's.
            kept: (block,) symbols of a token that are sent, 1 to `slots`.
        Returns:
            (block, token, slot, 2): mean power 1 over the slots that are sent, zero in the others.
        Raises:
            ConfigError: a shape is another one.
        """
        self._check(pictures, snr_db, alpha, kept)
        rate = kept / self.settings.slots
        both = torch.stack([_scaled(snr_db[:, 0]), _scaled(snr_db[:, 1]), rate], dim=1)
        features = self.encoder(pictures.flatten(0, 1), both.repeat_interleave(USERS, dim=0))
        features = features.view(-1, USERS, *features.shape[1:])
        symbols = self.fusion(features[:, 0], features[:, 1], both, alpha)
        return unit_power(symbols, kept)

    def decode(self, heard: Tensor, snr_db: Tensor, share: Tensor, kept: Tensor, user: Tensor) -> Tensor:
        """One user's picture.

        Args:
            heard: (block, token, slot, 2), equalised; zero where nothing was sent.
            snr_db: (block,) the user's own.
            share: (block,) alpha for the first user, 1 - alpha for the second; sent along with the block.
            kept: (block,) as in `encode`.
            user: (block,) 0 or 1.
        Returns:
            (block, 3, side, side), about 0 to 1; not clipped.
        """
        told = torch.stack([_scaled(snr_db), share, kept / self.settings.slots, user * 2.0 - 1.0], dim=1)
        pictures: Tensor = self.decoder(heard, told)
        return pictures

    def decode_both(self, heard: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> Tensor:
        """Both users' pictures (block, 2, 3, side, side) from (block, 2, token, slot, 2) and their SNRs (block, 2)."""
        share = torch.stack([alpha, 1 - alpha], dim=1).flatten()
        user = torch.arange(USERS, device=heard.device).repeat(heard.shape[0])
        own = kept.repeat_interleave(USERS, dim=0)
        shown = self.decode(heard.flatten(0, 1), snr_db.flatten(), share, own, user)
        return shown.view(-1, USERS, *shown.shape[1:])

    def _check(self, pictures: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> None:
        block, patch = pictures.shape[0], self.settings.patch
        shape = tuple(pictures.shape)
        if len(shape) != 5 or shape[1:3] != (USERS, 3) or shape[3] != shape[4] or not shape[3] or shape[3] % patch:
            raise ConfigError(f"pictures must be (block, 2, 3, side, side), side a multiple of {patch}; got {shape}")
        if snr_db.shape != (block, USERS) or alpha.shape != (block,) or kept.shape != (block,):
            raise ConfigError(
                f"need snr_db ({block}, 2), alpha ({block},) and kept ({block},), got "
                f"{tuple(snr_db.shape)}, {tuple(alpha.shape)} and {tuple(kept.shape)}"
            )


class Encoder(nn.Module):
    """A picture to tokens, told both SNRs and the rate."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, patch = settings.width, settings.patch
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, padding=1), nn.GELU(), nn.Conv2d(width // 2, width, patch, stride=patch)
        )
        self.told = _Told(3, settings)
        self.blocks = _blocks(settings, settings.encoder_depth)

    def forward(self, pictures: Tensor, told: Tensor) -> Tensor:
        """(picture, 3, side, side) and (picture, 3) to (picture, token, width)."""
        tokens: Tensor = self.stem(pictures - 0.5).flatten(2).transpose(1, 2)
        condition = self.told(told)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return tokens


class Fusion(nn.Module):
    """Two pictures' tokens to one block of symbols.

    Every channel of every token is shared between the users. Alpha says how, and what the network sees in similarity
    and SNRs shifts it:

        share_1 = alpha e^l / (alpha e^l + (1 - alpha) e^-l),  l bounded and without alpha in it

    So no share of the first user ever falls as alpha rises, and at alpha 1 (0) the symbols do not depend on the second
    (first) picture at all, whatever was learned.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.meaning = nn.Linear(width, settings.condition, bias=False)  # in which similarity is measured
        self.told = _Told(3, settings)
        self.shift = nn.Sequential(
            nn.Linear(2 + settings.condition, settings.condition), nn.SiLU(), nn.Linear(settings.condition, width)
        )
        self.values = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(USERS))
        self.joint = _Told(4, settings)
        self.blocks = _blocks(settings, settings.fusion_depth)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * settings.slots))

    def forward(self, first: Tensor, second: Tensor, told: Tensor, alpha: Tensor) -> Tensor:
        """(block, token, width) twice, (block, 3) SNRs and rate, (block,) alpha to (block, token, slot, 2)."""
        share = self.share(first, second, told, alpha)
        tokens = share * self.values[0](first) + (1 - share) * self.values[1](second)
        condition = self.joint(torch.cat([told, alpha[:, None]], dim=1))
        for block in self.blocks:
            tokens = block(tokens, condition)
        symbols: Tensor = self.out(tokens).unflatten(-1, (-1, 2))
        return symbols

    def share(self, first: Tensor, second: Tensor, told: Tensor, alpha: Tensor) -> Tensor:
        """The first user's share of each channel of each token, (block, token, width) 0 to 1."""
        likeness = functional.cosine_similarity(self.meaning(first), self.meaning(second), dim=-1)[..., None]
        condition = self.told(told)[:, None].expand(-1, first.shape[1], -1)
        logit = _MOST_LOGIT * torch.tanh(
            self.shift(torch.cat([likeness, likeness.square(), condition], dim=-1)).float()
        )
        ratio = alpha.float()[:, None, None]
        mine, others = ratio * torch.exp(logit), (1 - ratio) * torch.exp(-logit)
        return mine / (mine + others)


class Decoder(nn.Module):
    """Symbols as heard to one user's picture, told its SNR, its share, the rate and whose it is."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, patch = settings.width, settings.patch
        self.stem = nn.Linear(2 * settings.slots, width)
        self.told = _Told(4, settings)
        self.blocks = _blocks(settings, settings.decoder_depth)
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Linear(width, 16 * patch**2)
        self.head = nn.Sequential(nn.PixelShuffle(patch), nn.GELU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, heard: Tensor, told: Tensor) -> Tensor:
        """(block, token, slot, 2) and (block, 4) to (block, 3, side, side)."""
        tokens, condition = self.stem(heard.flatten(2)), self.told(told)
        for block in self.blocks:
            tokens = block(tokens, condition)
        side = math.isqrt(tokens.shape[1])
        grid = self.spread(self.norm(tokens)).transpose(1, 2).reshape(-1, self.spread.out_features, side, side)
        pictures: Tensor = self.head(grid) + 0.5
        return pictures


class Block(nn.Module):
    """Neighbours, attention over all tokens, hidden layer; attention and layer modulated by what the block is told."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)  # also tells a token where it is
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.layer = nn.Sequential(
            nn.Linear(width, settings.widening * width), nn.GELU(), nn.Linear(settings.widening * width, width)
        )
        self.modulate = nn.Linear(settings.condition, 6 * width)
        nn.init.zeros_(self.modulate.weight)  # starts as a plain block: no shift, scale and gate 1
        nn.init.zeros_(self.modulate.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(block, token, width) and (block, condition) to (block, token, width); tokens are a square grid."""
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).reshape(-1, tokens.shape[2], side, side)
        tokens = tokens + self.near(grid).flatten(2).transpose(1, 2)
        shift, scale, gate, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(6, dim=-1)
        tokens = tokens + (1 + gate) * self._attended(self.norms[0](tokens) * (1 + scale) + shift)
        changed: Tensor = tokens + (1 + gate2) * self.layer(self.norms[1](tokens) * (1 + scale2) + shift2)
        return changed

    def _attended(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.attend(tokens).chunk(3, dim=-1)
        )
        merged = functional.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.merge(merged.transpose(1, 2).flatten(2))
        return attended


class _Told(nn.Sequential):
    """A few numbers to the vector that modulates."""

    def __init__(self, numbers: int, settings: ModelSettings) -> None:
        wide = settings.condition
        super().__init__(nn.Linear(numbers, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU())


def unit_power(symbols: Tensor, kept: Tensor) -> Tensor:
    """Silence the slots beyond `kept` (block,), and scale each block to mean power 1 over the others.

    Args:
        symbols: (block, token, slot, 2).
    """
    _, tokens, slots, _ = symbols.shape
    sent = (torch.arange(slots, device=symbols.device) < kept[:, None])[:, None, :, None]
    masked = symbols.float() * sent
    power = masked.square().sum(dim=(1, 2, 3), keepdim=True) / (tokens * kept)[:, None, None, None]
    return masked / torch.sqrt(power.clamp_min(_LEAST_POWER))


def _scaled(snr_db: Tensor) -> Tensor:
    return (snr_db - 10) / 10


def _blocks(settings: ModelSettings, depth: int) -> nn.ModuleList:
    return nn.ModuleList(Block(settings) for _ in range(depth))

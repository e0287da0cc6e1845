"""The codec: two pictures to one block of symbols, and back to one picture at each user.

    pictures -> encoder -> fusion -> pictures made ready for the channel      networks, told both SNRs, rate and share
             -> principal components -> their dimensions and powers -> symbols of power 1             linear, pilots
    symbols as heard -> components of the user's own picture -> picture, as far as linear     told its own SNR
             -> decoder -> picture                                             a network, told SNR, share, rate, scale

From the paper's abstract [P]: a Transformer backbone, both users' channels known to encoder and fusion, each decoder
adapting to its own, fusion by similarity with a ratio alpha. All sizes and formulas are ours [D]: between the
networks stands the best linear code (`principal`, `layout`), so an untrained codec is that code, and what is learned
is the rest. Both users are treated alike: exchanging them and alpha for 1 - alpha exchanges what they get. Modulation
by layer-norm scale, shift and gate is that of Peebles and Xie, ICCV 2023.

A picture is `side` x `side`, 32x32 unless told, in tokens of 4x4 pixels; a block has 16 complex symbols for each token,
of which a rate keeps the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.layout import Layout, from_symbols, to_symbols, zeroed
from wdmoe.broadcast.codec.principal import Principal, assumed_principal
from wdmoe.errors import ConfigError

USERS = 2
_LEAST_POWER = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Sizes. The defaults are for a CPU: about a million weights, and the principal components."""

    side: int = 32  # of a picture, pixels
    width: int = 96
    heads: int = 4
    encoder_depth: int = 2
    fusion_depth: int = 1
    decoder_depth: int = 5
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
        if self.side < self.patch or self.side % self.patch or 2 * self.slots > 3 * self.patch**2:
            raise ConfigError(
                f"side must be a multiple of the patch and slots at most {3 * self.patch**2 // 2}, got {self.side}, "
                f"{self.patch} and {self.slots}"
            )

    @property
    def tokens(self) -> int:
        """Of a picture."""
        return (self.side // self.patch) ** 2

    def kept(self, cbr: float) -> int:
        """Symbols of a token at a bandwidth ratio (complex uses over height x width x 3); ConfigError if none fits."""
        exact = cbr * 3 * self.patch**2
        kept = round(exact) if math.isfinite(exact) else 0
        if not 1 <= kept <= self.slots or abs(kept - exact) > 1e-3:
            raise ConfigError(f"cbr must be a multiple of 1/{3 * self.patch**2} up to {self.slots} of them, got {cbr}")
        return kept


class BroadcastCodec(nn.Module):
    """Encoder, fusion and decoder. It has no randomness: the channel stands between `encode` and `decode`."""

    mean: Tensor
    basis: Tensor
    spread: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.layout = Layout(settings.tokens, settings.slots, settings.condition)
        self.encoder = Encoder(settings)
        self.fusion = Fusion(settings)
        self.decoder = Decoder(settings)
        components = 2 * settings.tokens * settings.slots
        assumed = assumed_principal(settings.side, components)
        for name in ("mean", "basis", "spread"):
            self.register_buffer(name, torch.empty(getattr(assumed, name).shape))
        self.take(assumed)
        self.register_load_state_dict_post_hook(_retake)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def take(self, principal: Principal) -> None:
        """Work with these components, of pictures like those to be sent."""
        for name in ("mean", "basis", "spread"):
            getattr(self, name).copy_(torch.from_numpy(getattr(principal, name)))
        self.basis.copy_(self.basis.half())  # as it is stored: half the file, and its rounding is 90 dB down
        self.layout.take(principal)

    def encode(self, pictures: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> Tensor:
        """One block of symbols for both pictures.

        Args:
            pictures: (block, 2, 3, side, side), 0 to 1.
            snr_db: (block, 2) of both users.
            alpha: (block,) 0 to 1: how much of the block is the first user's. Not looked at where both pictures are the
                same: then all of the block is one picture's, and both users are told so.
            kept: (block,) symbols of a token that are sent, 1 to `slots`.
        Returns:
            (block, token, slot, 2): mean power 1 over the slots that are sent, zero in the others.
        Raises:
            ConfigError: a shape is another one.
        """
        self._check(pictures, snr_db, alpha, kept)
        same = (pictures[:, 0] == pictures[:, 1]).flatten(1).all(dim=1)
        alpha = torch.where(same, torch.ones_like(alpha), alpha)
        share = torch.stack([alpha, 1 - alpha], dim=1)
        ready = self._ready(pictures, snr_db, share, kept / self.settings.slots)
        components = ((ready.flatten(2) - self.mean) @ self.basis) / self.spread
        dims = self.layout.dimensions(alpha, kept)
        amplitudes = torch.sqrt(self.layout.powers(dims, share, kept).clamp_min(_LEAST_POWER))
        values = self.layout.with_pilots(dims, self.layout.place(dims, components * amplitudes), same)
        return unit_power(to_symbols(values, self.settings.tokens), kept)

    def decode(self, heard: Tensor, snr_db: Tensor, share: Tensor, kept: Tensor, user: Tensor) -> Tensor:
        """One user's picture.

        Args:
            heard: (block, token, slot, 2), equalised without bias: what was sent, plus noise.
            snr_db: (block,) the user's own.
            share: (block,) alpha for the first user, 1 - alpha for the second; sent along with the block.
            kept: (block,) as in `encode`.
            user: (block,) 0 or 1.
        Returns:
            (block, 3, side, side), about 0 to 1; not clipped.
        """
        kept = kept.long()  # a graph of the decoder takes numbers of one kind
        values, noise = from_symbols(heard), 10 ** (-snr_db / 10) / 2
        every = self.layout.dimensions(torch.ones_like(share), kept)
        log_scale, same = self.layout.pilots(every, values, noise)
        share = torch.where(same, torch.ones_like(share), share)
        who = torch.where(same, torch.zeros_like(share), user.to(share.dtype)).long()
        linear = self._linear(values, noise, log_scale, share, kept, who)
        told = torch.stack([_scaled(snr_db), share, kept / self.settings.slots, log_scale], dim=1)
        pictures: Tensor = linear + self.decoder(linear, told)
        return pictures

    def decode_both(self, heard: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> Tensor:
        """Both users' pictures (block, 2, 3, side, side) from (block, 2, token, slot, 2) and their SNRs (block, 2)."""
        share = torch.stack([alpha, 1 - alpha], dim=1).flatten()
        user = torch.arange(USERS, device=heard.device).repeat(heard.shape[0])
        own = kept.repeat_interleave(USERS, dim=0)
        shown = self.decode(heard.flatten(0, 1), snr_db.flatten(), share, own, user)
        return shown.view(-1, USERS, *shown.shape[1:])

    def _ready(self, pictures: Tensor, snr_db: Tensor, share: Tensor, rate: Tensor) -> Tensor:
        """Pictures (block, 2, 3, side, side) with what the networks change of them before they are sent."""
        snr, both = _scaled(snr_db), rate[:, None].expand(-1, USERS)
        told = torch.stack([snr, snr.flip(1), both, share], dim=2).flatten(0, 1)  # for each picture: own and other SNR
        features = self.encoder(pictures.flatten(0, 1), told).unflatten(0, (-1, USERS))
        change = self.fusion(features.flatten(0, 1), features.flip(1).flatten(0, 1), told)
        ready: Tensor = pictures + change.view_as(pictures)
        return ready

    def _linear(
        self, values: Tensor, noise: Tensor, log_scale: Tensor, share: Tensor, kept: Tensor, user: Tensor
    ) -> Tensor:
        """The linear estimate of least error of a user's picture, (block, 3, side, side)."""
        alpha = torch.where(user == 0, share, 1 - share)
        dims = self.layout.dimensions(alpha, kept)
        both = torch.stack([alpha, 1 - alpha], dim=1)
        power = self.layout.powers(dims, both, kept).gather(1, user[:, None, None].expand(-1, 1, self.spread.numel()))
        own = self.layout.find(dims, values, user) * torch.exp(-log_scale)[:, None]
        unsure = (noise * torch.exp(-2 * log_scale))[:, None]
        components = own * torch.sqrt(power[:, 0].clamp_min(_LEAST_POWER)) / (power[:, 0] + unsure) * self.spread
        side = self.settings.side
        pictures: Tensor = (components @ self.basis.T + self.mean).view(-1, 3, side, side)
        return pictures

    def _check(self, pictures: Tensor, snr_db: Tensor, alpha: Tensor, kept: Tensor) -> None:
        block, side = pictures.shape[0], self.settings.side
        shape = tuple(pictures.shape)
        if shape != (block, USERS, 3, side, side):
            raise ConfigError(f"pictures must be (block, 2, 3, {side}, {side}), got {shape}")
        if snr_db.shape != (block, USERS) or alpha.shape != (block,) or kept.shape != (block,):
            raise ConfigError(
                f"need snr_db ({block}, 2), alpha ({block},) and kept ({block},), got "
                f"{tuple(snr_db.shape)}, {tuple(alpha.shape)} and {tuple(kept.shape)}"
            )


class Encoder(nn.Module):
    """A picture to tokens, told both SNRs, rate and share."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.stem = _stem(settings)
        self.told = _Told(4, settings)
        self.blocks = _blocks(settings, settings.encoder_depth)

    def forward(self, pictures: Tensor, told: Tensor) -> Tensor:
        """(picture, 3, side, side) and (picture, 4) to (picture, token, width)."""
        tokens: Tensor = self.stem(pictures - 0.5).flatten(2).transpose(1, 2)
        condition = self.told(told)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return tokens


class Fusion(nn.Module):
    """What to change of a picture before it is sent, in the light of the other one.

    How much of the other picture's tokens comes in is decided by similarity and SNRs, times what is the other's of the
    block: at a share of 1 there is no trace of it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.meaning = nn.Linear(width, settings.condition, bias=False)  # in which similarity is measured
        self.told = _Told(4, settings)
        self.weigh = nn.Sequential(
            nn.Linear(2 + settings.condition, settings.condition), nn.SiLU(), nn.Linear(settings.condition, width)
        )
        self.values = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.blocks = _blocks(settings, settings.fusion_depth)
        self.out = _Picture(settings)

    def forward(self, own: Tensor, other: Tensor, told: Tensor) -> Tensor:
        """(picture, token, width) twice, (picture, 4) own and other SNR, rate, share to (picture, 3, side, side)."""
        condition = self.told(told)
        tokens = own + self.weight(own, other, condition, told[:, 3]) * self.values(other)
        for block in self.blocks:
            tokens = block(tokens, condition)
        pictures: Tensor = self.out(tokens)
        return pictures

    def weight(self, own: Tensor, other: Tensor, condition: Tensor, share: Tensor) -> Tensor:
        """(picture, token, width), within -1 to 1: how much of the other picture's tokens comes in."""
        similarity = functional.cosine_similarity(self.meaning(own), self.meaning(other), dim=-1)[..., None]
        known = condition[:, None].expand(-1, own.shape[1], -1)
        weight = torch.tanh(self.weigh(torch.cat([similarity, similarity.square(), known], dim=-1)))
        return weight * (1 - share)[:, None, None]


class Decoder(nn.Module):
    """What the linear estimate of a picture lacks, told the user's SNR, share, rate, and the block's scale."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.stem = _stem(settings)
        self.told = _Told(4, settings)
        self.blocks = _blocks(settings, settings.decoder_depth)
        self.out = _Picture(settings)

    def forward(self, linear: Tensor, told: Tensor) -> Tensor:
        """(block, 3, side, side) and (block, 4) to (block, 3, side, side)."""
        tokens, condition = self.stem(linear - 0.5).flatten(2).transpose(1, 2), self.told(told)
        for block in self.blocks:
            tokens = block(tokens, condition)
        pictures: Tensor = self.out(tokens)
        return pictures


def _retake(codec: BroadcastCodec, _keys: object) -> None:
    """The components came with the weights: divide by them."""
    codec.layout.take(Principal(*(getattr(codec, name).cpu().numpy() for name in ("mean", "basis", "spread"))))


def _stem(settings: ModelSettings) -> nn.Sequential:
    width, patch = settings.width, settings.patch
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, padding=1), nn.GELU(), nn.Conv2d(width // 2, width, patch, stride=patch)
    )


class _Picture(nn.Module):
    """Tokens to a picture (.., 3, side, side); starts as nothing."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, patch = settings.width, settings.patch
        self.norm = nn.LayerNorm(width)
        self.spread = nn.Linear(width, 16 * patch**2)
        self.head = nn.Sequential(nn.PixelShuffle(patch), nn.GELU(), zeroed(nn.Conv2d(16, 3, 3, padding=1)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(picture, token, width) to (picture, 3, side, side)."""
        side = math.isqrt(tokens.shape[1])
        grid = self.spread(self.norm(tokens)).transpose(1, 2).reshape(-1, self.spread.out_features, side, side)
        pictures: Tensor = self.head(grid)
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


def as_pictures(pixels: npt.NDArray[np.uint8], flips: npt.NDArray[np.bool_] | None = None) -> Tensor:
    """(..., side, side, 3) uint8 to (..., 3, side, side) float32, 0 to 1; mirrored where (...,) `flips` says so."""
    if flips is not None:
        pixels = np.where(flips[..., None, None, None], pixels[..., ::-1, :], pixels)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3))).float() / 255


def as_pixels(pictures: Tensor) -> Pixels:
    """(..., 3, side, side), about 0 to 1, to (..., side, side, 3) uint8."""
    levels = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return np.asarray(levels.cpu().numpy())


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

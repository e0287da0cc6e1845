"""Which real dimension of a block carries which component of whose picture, with what power; and the two pilots.

A block has `2 tokens kept` real dimensions. The last `PILOTS` of them tell the receivers what they cannot know: how
much the block was scaled to have unit power, and whether both users want the same picture. Of the others, `N`, even
ones are the first user's and odd ones the second's, most spread components first, until one user's part is used up;
what is left then, from the end, takes the other's further components:

    component i of user u is in dimension 2 i + u, or 2 (N - 1 - i) + 1 - u from i = N / 2 on, if i < m_u; m_0 + m_1 = N
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from wdmoe.broadcast.codec.principal import ALPHAS, Principal, divisions

Layer = TypeVar("Layer", bound=nn.Module)

PILOTS = 4  # real dimensions: two for each of the two pilots
_PILOT_SCALE = 1.5  # amplitude of the scale's pilot, for one standard deviation of its logarithm
_PILOT_SAME = 3.0  # amplitude of the other one where the pictures are the same; 0 where they are not
_LOG_SCALE_SPREAD = 0.4  # of the logarithm of a block's scale, over blocks of pictures
_MOST_LOG_SCALE = 1.2
_LEAST_POWER = 1e-8
_RIPPLES = 12  # cosines over the logarithm of the component's number, by which powers are learned


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Where things lie in blocks of symbols; all (block, ...)."""

    shared: Tensor  # (block,) N
    mine: Tensor  # (block, 2) m_0 and m_1
    power: Tensor  # (block, 2) part of the power


class Layout(nn.Module):
    """Components to dimensions and back. Learns how far powers stray from the linear optimum."""

    index: Tensor
    ripples: Tensor
    spread: Tensor
    dims_part: Tensor
    power_part: Tensor

    def __init__(self, tokens: int, slots: int, condition: int) -> None:
        super().__init__()
        self.tokens, self.slots = tokens, slots
        count = 2 * tokens * slots
        last = zeroed(nn.Linear(condition, _RIPPLES))
        self.stray = nn.Sequential(nn.Linear(2, condition), nn.SiLU(), last)
        place = torch.log1p(torch.arange(count)) / math.log1p(count)
        waves = torch.cos(math.pi * place[None] * torch.arange(1, _RIPPLES + 1)[:, None])
        self.register_buffer("index", torch.arange(count), persistent=False)
        self.register_buffer("ripples", waves, persistent=False)
        self.register_buffer("spread", torch.ones(count), persistent=False)
        self.register_buffer("dims_part", torch.zeros(slots, ALPHAS), persistent=False)
        self.register_buffer("power_part", torch.zeros(slots, ALPHAS), persistent=False)

    @torch.no_grad()
    def take(self, principal: Principal) -> None:
        """Divide by the spread of these components."""
        tables = [divisions(principal.spread, 2 * self.tokens * kept - PILOTS) for kept in range(1, self.slots + 1)]
        self.dims_part.copy_(torch.from_numpy(np.stack([dims for dims, _ in tables])))
        self.power_part.copy_(torch.from_numpy(np.stack([power for _, power in tables])))
        self.spread.copy_(torch.from_numpy(principal.spread))

    def dimensions(self, alpha: Tensor, kept: Tensor) -> Dimensions:
        """How blocks (block,) of these ratios and rates are divided."""
        shared = 2 * self.tokens * kept - PILOTS
        row = kept - 1
        first = torch.round(_at(self.dims_part[row], alpha) * shared).long()
        power = _at(self.power_part[row], alpha)
        return Dimensions(shared, torch.stack([first, shared - first], dim=1), torch.stack([power, 1 - power], dim=1))

    def powers(self, dims: Dimensions, share: Tensor, kept: Tensor) -> Tensor:
        """(block, user, component) power of each component, 0 where it is not sent; the sum over a block is N / 2."""
        told = torch.stack([share, (kept / self.slots)[:, None].expand_as(share)], dim=-1)
        wanted = self.spread * torch.exp(self.stray(told).float() @ self.ripples)
        sent = self.index < dims.mine[..., None]
        wanted = wanted * sent
        total = (dims.shared / 2)[:, None] * dims.power
        return wanted * (total / wanted.sum(dim=-1).clamp_min(1e-20))[..., None]

    def place(self, dims: Dimensions, components: Tensor) -> Tensor:
        """(block, user, component) to (block, dimension) real values, 0 from N on."""
        rank, user = self.index // 2, self.index % 2
        own = rank < dims.mine.gather(1, user.expand(len(dims.mine), -1))
        whose = torch.where(own, user, 1 - user)
        which = torch.where(own, rank, dims.shared[:, None] - 1 - rank).clamp(0, self.index.numel() - 1)
        flat = components.flatten(1).gather(1, whose * self.index.numel() + which)
        return flat * (self.index < dims.shared[:, None])

    def find(self, dims: Dimensions, values: Tensor, user: Tensor) -> Tensor:
        """(block, dimension) and (block,) users to their (block, component), 0 where not sent."""
        shared, who = dims.shared[:, None], user[:, None]
        early = self.index < shared // 2
        where = torch.where(early, 2 * self.index + who, 2 * (shared - 1 - self.index) + 1 - who)
        mine = dims.mine.gather(1, who)
        return values.gather(1, where.clamp(0, self.index.numel() - 1)) * (self.index < mine)

    def with_pilots(self, dims: Dimensions, values: Tensor, same: Tensor) -> Tensor:
        """Scale blocks (block, dimension) and add the pilots."""
        shared = dims.shared[:, None]
        level = values.square().sum(dim=1, keepdim=True) / (shared / 2)
        log_scale = (-0.5 * torch.log(level.clamp_min(_LEAST_POWER))).clamp(-_MOST_LOG_SCALE, _MOST_LOG_SCALE)
        scale_pilot = log_scale * (_PILOT_SCALE / _LOG_SCALE_SPREAD)
        same_pilot = same.float()[:, None] * _PILOT_SAME
        offset = self.index - shared
        pilots = torch.where(offset < PILOTS // 2, scale_pilot, same_pilot)
        return values * torch.exp(log_scale) + pilots * ((offset >= 0) & (offset < PILOTS))

    def pilots(self, dims: Dimensions, values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(block,) each: logarithm of the scale, and whether both users want the same picture.

        Args:
            values: (block, dimension) as heard.
            noise: (block,) power of a dimension's noise.
        """
        at = dims.shared[:, None] + torch.arange(PILOTS, device=values.device)
        scale_pilot, same_pilot = values.gather(1, at).view(-1, 2, PILOTS // 2).mean(dim=2).unbind(1)
        trust = _PILOT_SCALE**2 / (_PILOT_SCALE**2 + noise / 2)
        log_scale = scale_pilot * trust * (_LOG_SCALE_SPREAD / _PILOT_SCALE)
        return log_scale.clamp(-_MOST_LOG_SCALE, _MOST_LOG_SCALE), same_pilot > _PILOT_SAME / 2


def zeroed(layer: Layer) -> Layer:
    """The same layer, whose output is nothing until it is trained."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


def to_symbols(values: Tensor, tokens: int) -> Tensor:
    """(block, dimension) to (block, token, slot, 2): a rate's first slots are the first dimensions."""
    return values.view(len(values), -1, 2, tokens).permute(0, 3, 1, 2)


def from_symbols(symbols: Tensor) -> Tensor:
    """The reverse."""
    return symbols.permute(0, 2, 3, 1).flatten(1)


def _at(table: Tensor, alpha: Tensor) -> Tensor:
    """(block, ALPHAS) at (block,) alphas, linear in between."""
    place = alpha.float() * (ALPHAS - 1)
    below = place.floor().clamp(0, ALPHAS - 2)
    index = below.long()[:, None]
    low, high = table.gather(1, index)[:, 0], table.gather(1, index + 1)[:, 0]
    return low + (high - low) * (place - below)

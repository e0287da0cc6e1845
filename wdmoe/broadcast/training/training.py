"""The training loop of the codec: loss, schedule, averaged weights, and a file to go on from after an interruption.

Several processes (`torchrun`) each take a part of every batch; how many does not matter to the result, but for the
order of sums.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from wdmoe.broadcast.codec.model import BroadcastCodec
from wdmoe.broadcast.training.batches import Batch, BatchSource
from wdmoe.broadcast.training.losses import LOSSES
from wdmoe.errors import ConfigError

Row = dict[str, float]  # of the learning curve: by column, `step` always
Progress = Callable[[str, float], None]

_CLIP_NORM = 1.0
_BETAS = (0.9, 0.98)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the codec is trained. All of it decides the result, but `save_every`."""

    steps: int = 20_000
    learning_rate: float = 1e-3
    warm_up: float = 0.02  # of the steps, linear; then a cosine to a hundredth of the rate
    weight_decay: float = 0.01
    loss: str = "region"
    average: float = 0.999  # of the averaged weights that are kept at each step; these are what is shipped
    save_every: int = 500  # steps; also between points of the learning curve

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1:
            raise ConfigError(f"steps and save_every must be at least 1, got {self.steps} and {self.save_every}")
        if not 0 < self.learning_rate < math.inf:  # also refuses NaN
            raise ConfigError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not (0 <= self.warm_up < 1 and 0 <= self.average < 1 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                "warm_up and average must be at least 0 and below 1, weight_decay at least 0, got "
                f"{self.warm_up}, {self.average} and {self.weight_decay}"
            )
        if self.loss not in LOSSES:
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}; got {self.loss!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        warm = math.ceil(self.warm_up * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        place = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.01 + 0.495 * (1 + math.cos(math.pi * place)))


@dataclass(frozen=True, slots=True)
class Team:
    """Which of how many processes this one is."""

    rank: int = 0
    world: int = 1


class Trainer:
    """Trains `codec` in place. `step`, `curve` and `averaged` go on where a restored file left off."""

    def __init__(self, codec: BroadcastCodec, source: BatchSource, training: Training, team: Team) -> None:
        self.step = 0
        self.curve: list[Row] = []
        self.averaged = BroadcastCodec(codec.settings).to(next(codec.parameters()).device).requires_grad_(False)
        self.averaged.load_state_dict(codec.state_dict())
        self._codec, self._source, self._training, self._team = codec, source, training, team
        self._step_of = _both_ways(codec, training.loss, team)
        self._optimizer = torch.optim.AdamW(_groups(codec, training.weight_decay), training.learning_rate, _BETAS)
        self._device = next(codec.parameters()).device

    def run(self, file: Path, fingerprint: str, measure: Callable[[BroadcastCodec], Row], progress: Progress) -> None:
        """Take the steps that are left.

        Args:
            file: to go on from; written now and then, and at the end.
            fingerprint: of the settings and data; stands in the file.
            measure: columns of the learning curve besides step, loss and rate, of the averaged weights.
            progress: told what and how far.
        Raises:
            ConfigError: the loss is not finite (the learning rate is too high), or the file cannot be written.
        """
        how = self._training
        recent: list[float] = []
        while self.step < how.steps:
            recent.append(self._take_step())
            self.step += 1
            if self.step % how.save_every == 0 or self.step == how.steps:
                loss = sum(recent) / len(recent)
                if not math.isfinite(loss):
                    raise ConfigError(f"the loss is {loss} at step {self.step}; give a smaller learning rate")
                recent = []
                row = {"step": float(self.step), "loss": loss, "rate": how.rate(self.step - 1)}
                if self._team.rank == 0:
                    self.curve.append({**row, **measure(self.averaged)})
                    self._save(file, fingerprint)
            progress(f"train, loss {recent[-1] if recent else loss:.4f}", self.step / how.steps)

    def restore(self, file: Path, fingerprint: str) -> None:
        """Go on from `file` if it is there.

        Raises:
            ConfigError: the file is of another run, or damaged.
        """
        if not file.exists():
            return
        try:
            with safe_open(file, framework="pt") as state:
                marks = json.loads(state.metadata()["run"])
                if marks["fingerprint"] != fingerprint:
                    raise ConfigError(f"{file} is of a run with other settings or pictures; delete it to restart")
                self._load(state.get_tensor)
            self.step, self.curve = int(marks["step"]), list(marks["curve"])
        except OSError as error:  # says nothing about the file
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} cannot be read; delete it to start anew") from error

    @torch.no_grad()
    def _load(self, tensor: Callable[[str], Tensor]) -> None:
        for name, weight in self._codec.named_parameters():
            weight.copy_(tensor(f"weight {name}"))
            moments = {part: tensor(f"{part} {name}").to(self._device) for part in _MOMENTS}
            self._optimizer.state[weight] = {"step": tensor(f"step {name}"), **moments}  # AdamW wants this on the CPU
        for name, mean in self.averaged.named_parameters():
            mean.copy_(tensor(f"average {name}"))

    def _save(self, file: Path, fingerprint: str) -> None:
        marks = {"fingerprint": fingerprint, "step": self.step, "curve": self.curve}
        tensors: dict[str, Tensor] = {f"average {name}": mean for name, mean in self.averaged.named_parameters()}
        for name, weight in self._codec.named_parameters():
            tensors[f"weight {name}"] = weight.detach()
            tensors |= {f"{part} {name}": value for part, value in self._optimizer.state[weight].items()}
        part = file.with_name(f"{file.name}.part")
        try:
            save_file(tensors, part, {"run": json.dumps(marks)})
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {file}: {error}") from error

    def _take_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.rate(self.step)
        batch = self._source.batch(self.step, self._team.rank, self._team.world, self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = self._step_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self._codec.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average()
        return _mean_over(loss.detach(), self._team)

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self._training.average, (1 + self.step) / (10 + self.step))  # the first weights are soon forgotten
        for mean, weight in zip(self.averaged.parameters(), self._codec.parameters(), strict=True):
            mean.lerp_(weight, 1 - keep)


class _BothWays(nn.Module):
    """Encode, channel, decode and loss as one module: several processes average the gradients of all of it."""

    def __init__(self, codec: BroadcastCodec, loss: str) -> None:
        super().__init__()
        self.codec = codec
        self._loss = LOSSES[loss]

    def forward(self, batch: Batch) -> Tensor:
        symbols = self.codec.encode(batch.pictures, batch.snr_db, batch.alpha, batch.kept)
        heard = batch.heard(symbols)
        shown = self.codec.decode_both(heard.symbols, heard.snr_db, batch.alpha, batch.kept)
        return self._loss((shown.float() - batch.pictures).square().mean(dim=(2, 3, 4)), batch.alpha)


def _both_ways(codec: BroadcastCodec, loss: str, team: Team) -> nn.Module:
    whole = _BothWays(codec, loss)
    return nn.parallel.DistributedDataParallel(whole) if team.world > 1 else whole


def _groups(codec: nn.Module, weight_decay: float) -> Iterator[dict[str, object]]:
    """Matrices decay, vectors do not."""
    for matrices in (True, False):
        weights = [weight for weight in codec.parameters() if (weight.ndim > 1) == matrices]
        yield {"params": weights, "weight_decay": weight_decay if matrices else 0.0}


def _mean_over(loss: Tensor, team: Team) -> float:
    if team.world > 1:
        distributed.all_reduce(loss)
        loss = loss / team.world
    return float(loss)


def fingerprint_of(training: Training, *others: object) -> str:
    """What a file to go on from must agree on: everything that decides the result."""
    deciding = {name: value for name, value in asdict(training).items() if name != "save_every"}
    return json.dumps([deciding, *(repr(other) for other in others)], sort_keys=True)

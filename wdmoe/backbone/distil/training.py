"""The training loop of distillation: schedule, batches, and a file to go on from after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from wdmoe.backbone.distil.loss import divergence, stream_error
from wdmoe.backbone.distil.student import Cut, FastLlama
from wdmoe.backbone.split.dense import Weights
from wdmoe.errors import ConfigError

_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)
_LOG_EVERY = 10  # steps between values of the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the split model is trained."""

    steps: int = 1000  # 0: the cut and what of the closed-form correction fits
    batch: int = 2  # windows a step; each is computed by a thread of its own
    window: int = 512  # tokens
    learning_rate: float = 1e-3
    warm_up: int = 40  # steps, linear
    decay: float = 0.3  # fraction of the steps in which the rate falls to nothing, at the end
    stream_weight: float = 0.3  # of the error of hidden states, beside the divergence; falls to 0
    stream_steps: int = 300  # until it is 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps must be at least 0, got {self.steps}")
        for name in ("batch", "stream_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window < 8:
            raise ConfigError(f"window must be at least 8 tokens, got {self.window}")
        if not 0 < self.learning_rate < math.inf:  # also refuses NaN
            raise ConfigError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be from 0 to 1, got {self.decay}")
        if not 0 <= self.stream_weight < math.inf or self.warm_up < 0:
            raise ConfigError("stream_weight and warm_up must be at least 0")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0, as a fraction of `learning_rate`: up, level, and down at the end.

        Level and not a cosine, so that a run may be made longer or shorter before it begins to fall.
        """
        if step < self.warm_up:
            return (step + 1) / (self.warm_up + 1)
        falling = max(1.0, self.decay * self.steps)
        return min(1.0, max(0.02, (self.steps - step) / falling))

    def stream_share(self, step: int) -> float:
        """Weight of the hidden states' error in a step."""
        return self.stream_weight * max(0.0, 1 - step / self.stream_steps)


@dataclass(slots=True)
class Trainee:
    """What a run changes, and all that it needs to go on."""

    weights: Weights  # as `trainable` names them
    first: Weights  # Adam's first moment of each
    second: Weights
    step: int = 0
    seconds: float = 0.0  # of training

    @classmethod
    def fresh(cls, weights: Weights) -> Trainee:
        """At the beginning."""
        first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
        return cls(weights, first, second)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step found, per token: divergence in nats and hidden states' error; NaN where they were not looked at."""

    divergence: float
    stream: float
    tokens_per_s: float


class Trainer:
    """Takes steps with a trainee. The same windows and settings give the same weights, interrupted or not."""

    def __init__(self, model: FastLlama, cut: Cut, windows: torch.Tensor, training: Training, trainee: Trainee) -> None:
        """`windows`: (windows, length) int64."""
        self._model, self._cut, self._windows, self._training = model, cut, windows, training
        self.trainee = trainee
        names = list(trainee.weights)
        self._optimizer = torch.optim.AdamW(
            [trainee.weights[name] for name in names], lr=training.learning_rate, betas=_BETAS, weight_decay=0.0
        )
        for name in names:
            self._optimizer.state[trainee.weights[name]] = {
                "step": torch.tensor(float(trainee.step)),
                "exp_avg": trainee.first[name],
                "exp_avg_sq": trainee.second[name],
            }

    def take_step(self) -> StepReport:
        """One step; the trainee moves.

        Raises:
            ConfigError: the gradient is not finite (the learning rate is too high).
        """
        began, trainee, how = time.monotonic(), self.trainee, self._training
        ids = self._windows[self._chosen()]
        value = trainee.step % _LOG_EVERY == 0
        with _one_thread_each(), ThreadPoolExecutor(how.batch) as pool:
            parts = list(pool.map(lambda window: self._read(window[None], ids.numel(), value), ids))
        for name, weight in trainee.weights.items():  # in one order, so that sums are the same every time
            weight.grad = torch.stack([gradients[name].float() for gradients, *_ in parts]).sum(0)
        norm = float(torch.nn.utils.clip_grad_norm_(trainee.weights.values(), _CLIP_NORM))
        if not math.isfinite(norm):
            raise ConfigError(f"the gradient is {norm} at step {trainee.step + 1}; give a smaller learning rate")
        for group in self._optimizer.param_groups:
            group["lr"] = how.learning_rate * how.rate(trainee.step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        trainee.step += 1
        spent = time.monotonic() - began
        trainee.seconds += spent
        share = 1 / ids.numel()
        return StepReport(share * sum(p[1] for p in parts), share * sum(p[2] for p in parts), ids.numel() / spent)

    def _read(self, ids: torch.Tensor, tokens: int, value: bool) -> tuple[Weights, float, float]:
        """Gradients of one window's part of the loss, its divergence and its hidden states' error."""
        share = self._training.stream_share(self.trainee.step)
        with torch.no_grad():
            wanted = self._model.read(ids, {}, None, keep=share > 0)
        changes = working_copies(self._model, self.trainee.weights)
        for copy in changes.values():
            copy.requires_grad_(True)
        given = self._model.read(ids, changes, self._cut, keep=share > 0)
        nats, slope = divergence(
            given.hidden.detach().flatten(0, 1), wanted.hidden.flatten(0, 1), self._model.head, value=value
        )
        roots, slopes, error = [given.hidden], [(slope / tokens).view_as(given.hidden)], 0.0
        if share > 0:
            stream = stream_error(given.streams, wanted.streams)
            roots.append(share / tokens * stream)
            slopes.append(torch.ones(()))
            error = float(stream.detach())
        torch.autograd.backward(roots, slopes)
        return {name: _gradient(copy) for name, copy in changes.items()}, nats, error

    def _chosen(self) -> list[int]:
        """Windows of this step: all of them in random order, then all in another order."""
        count, how = len(self._windows), self._training
        places = range(self.trainee.step * how.batch, (self.trainee.step + 1) * how.batch)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def _order(self, epoch: int) -> list[int]:
        chooser = torch.Generator().manual_seed((self._training.seed + epoch) % (1 << 63))
        order: list[int] = torch.randperm(len(self._windows), generator=chooser).tolist()
        return order


def working_copies(model: FastLlama, weights: Weights) -> Weights:
    """What a model reads with: factors in its dtype, the rest in float32."""
    factors = (".a", ".b")
    return {
        name: w.detach().to(model.head.dtype if name.endswith(factors) else w.dtype, copy=True)
        for name, w in weights.items()
    }


def _gradient(copy: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(copy) if copy.grad is None else copy.grad


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch on one thread, as windows are shared out instead: threads meet once a step and not in every product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

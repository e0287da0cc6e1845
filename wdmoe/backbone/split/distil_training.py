"""The training loop of distillation: loss, schedule, batches, and a file to go on from after an interruption."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

from wdmoe.backbone.split.settings import Progress
from wdmoe.errors import BundleError, ConfigError

_TOKENS_AT_ONCE = 2048  # bounds the memory of the logits; a larger batch is summed up
_CLIP_NORM = 1.0
_BETAS = (0.9, 0.95)
_PARTS = {
    "router": ("block_sparse_moe.router",),
    "experts": ("block_sparse_moe.router", "block_sparse_moe.experts"),
    "all": ("block_sparse_moe.router", "block_sparse_moe.experts", "shared_mlp"),
}
TRAINABLE = tuple(_PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the split model is trained. All of it decides the result, but `save_every`."""

    train: str = "all"  # "router", "experts" (and router), "all" (and shared part)
    steps: int = 500
    batch: int = 2  # windows a step
    window: int = 256
    learning_rate: float = 3e-4  # routers': times the gate temperature, as their weights are
    warm_up: float = 0.1  # of the steps, linear; then a cosine to a tenth of the rate
    save_every: int = 100  # steps
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in _PARTS:
            raise ConfigError(f"train must be one of {', '.join(_PARTS)}, got {self.train!r}")
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window < 8:
            raise ConfigError(f"window must be at least 8 tokens, got {self.window}")
        if not 0 < self.learning_rate < math.inf:  # also refuses NaN
            raise ConfigError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.warm_up < 1:
            raise ConfigError(f"warm_up must be at least 0 and below 1, got {self.warm_up}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    @property
    def parts(self) -> tuple[str, ...]:
        """What a trained parameter has in its name."""
        return _PARTS[self.train]

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0, as a fraction of `learning_rate`."""
        warm = math.ceil(self.warm_up * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Trainer:
    """Trains `student` in place. `step`, `losses` and `before` go on where a restored file left off."""

    def __init__(self, teacher: Any, student: Any, windows: torch.Tensor, training: Training) -> None:
        """Both models on one device; `windows`: (windows, length) int64."""
        self.step = 0
        self.losses: list[float] = []  # nats per token, of each step
        self.before: float | None = None  # perplexity before the first step; the caller's to set
        self._teacher, self._student, self._windows, self._training = teacher, student.eval(), windows, training
        student.requires_grad_(False)
        self._trained = {
            name: weight for name, weight in student.named_parameters() if any(part in name for part in training.parts)
        }
        for weight in self._trained.values():
            weight.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._groups(), betas=_BETAS, weight_decay=0.01)
        self._fingerprint: list[str] = []

    def run(self, resume_file: Path, progress: Progress) -> None:
        """Take the steps that are left, saving now and then.

        Raises:
            ConfigError: the loss is not finite (the learning rate is too high).
            BundleError: `resume_file` cannot be written.
        """
        how = self._training
        while self.step < how.steps:
            loss = self._take_step()
            if not math.isfinite(loss):
                raise ConfigError(f"the loss is {loss} at step {self.step + 1}; give a smaller learning rate")
            self.losses.append(loss)
            self.step += 1
            if self.step % how.save_every == 0 and self.step < how.steps:
                self._save(resume_file)
            progress(f"train, loss {loss:.3f}", self.step / how.steps)

    def restore(self, file: Path, fingerprint: list[str]) -> None:
        """Go on from `file` if it is there.

        Args:
            fingerprint: names the models and the text.
        Raises:
            ConfigError: the file is of another run, or damaged.
        """
        training = {name: value for name, value in asdict(self._training).items() if name != "save_every"}
        self._fingerprint = [*fingerprint, repr(training)]
        if not file.exists():
            return
        try:
            with safe_open(file, framework="pt") as state:
                marks = json.loads(state.metadata()["run"])
                if marks["fingerprint"] != self._fingerprint:
                    raise ConfigError(f"{file} is of a run on other models, text or settings; delete it to restart")
                self._load(state.get_tensor)
            self.step, self.losses, self.before = marks["step"], marks["losses"], marks["before"]
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} cannot be read; delete it to start anew") from error

    @torch.no_grad()
    def _load(self, tensor: Callable[[str], torch.Tensor]) -> None:
        for name, weight in self._trained.items():
            weight.copy_(tensor(f"weight {name}"))
            self._optimizer.state[weight] = {
                "step": tensor(f"step {name}"),  # AdamW wants this one on the CPU
                **{part: tensor(f"{part} {name}").to(weight.device) for part in ("exp_avg", "exp_avg_sq")},
            }

    def _save(self, file: Path) -> None:
        marks = {"fingerprint": self._fingerprint, "step": self.step, "losses": self.losses, "before": self.before}
        tensors = {f"weight {name}": weight.detach() for name, weight in self._trained.items()}
        for name, weight in self._trained.items():
            tensors.update({f"{part} {name}": value for part, value in self._optimizer.state[weight].items()})
        part = file.with_name(f"{file.name}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"run": json.dumps(marks)})
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise BundleError(f"cannot write {file}: {error}") from error

    def _take_step(self) -> float:
        how = self._training
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * how.rate(self.step)
        ids = self._windows[self._chosen()]
        loss = 0.0
        at_once = max(1, _TOKENS_AT_ONCE // how.window)
        for start in range(0, len(ids), at_once):
            part = ids[start : start + at_once].to(self._student.device)
            share = self._divergence(part) / ids.numel()
            share.backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _divergence(self, ids: torch.Tensor) -> torch.Tensor:
        """Sum over tokens of KL(dense || split) of the next token, in nats."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            with torch.no_grad():
                wanted = self._teacher(input_ids=ids, use_cache=False).logits
            given = self._student(input_ids=ids, use_cache=False).logits
        wanted, given = (x.flatten(0, 1).float().log_softmax(1) for x in (wanted, given))
        return functional.kl_div(given, wanted, reduction="sum", log_target=True)

    def _chosen(self) -> list[int]:
        """Windows of this step: all of them in random order, then all in another order."""
        count, how = len(self._windows), self._training
        places = range(self.step * how.batch, (self.step + 1) * how.batch)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def _order(self, epoch: int) -> list[int]:
        chooser = torch.Generator().manual_seed((self._training.seed + epoch) % (1 << 63))
        order: list[int] = torch.randperm(len(self._windows), generator=chooser).tolist()
        return order

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Routers apart: their weights are small by the gate temperature, and so must their steps be."""
        marks = getattr(self._student.config, "wdmoe", None) or {}
        scale = float(marks.get("gate_temperature", 1.0))
        for routers, factor in ((True, scale), (False, 1.0)):
            weights = [weight for name, weight in self._trained.items() if (".router." in name) == routers]
            if weights:
                yield {"params": weights, "full_rate": self._training.learning_rate * factor}

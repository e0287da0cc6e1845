"""Gate traces: which experts a model's gates asked for, token by token, to be replayed without the model.

A trace is one `.npz` file of plain arrays (never pickled objects):

    version     ()                         1
    model       ()                         name, text
    temperature ()                         float64 what the scores are divided by before a policy ranks by them
    layers      (layers,)                  int32   decoder layer indices, ascending
    position    (tokens,)                  int32   place of the token in its sequence; 0 begins a new one
    gate        (layers, tokens, experts)  float16 the router's scores (before any softmax)
    experts     (layers, tokens, top_k)    int16   what the gate chose, -1 where it left a slot empty
    weights     (layers, tokens, top_k)    float16 what the model multiplies with, 0 where empty
    similarity  (layers, tokens)           float16 cosine of the token's hidden state to that of the token before it in
                                           the same sequence, 0 at position 0; left out where it was not recorded
    expert_similarity (layers, experts, experts) float16 cosine of expert i's and j's outputs over the tokens routed to
                                           i, weighted by squared gate weight; left out where it was not recorded.
                                           j times the best scalar in i's place leaves an error of sqrt(1 - cosine^2)

Files of version 1 from before `expert_similarity` was known differ in nothing else.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.errors import ConfigError

VERSION = 1
MAX_BYTES = 2 << 30  # of all arrays, unpacked: a small file may claim to be huge
_DTYPES: dict[str, Any] = {
    "layers": np.int32,
    "position": np.int32,
    "gate": np.float16,
    "experts": np.int16,
    "weights": np.float16,
    "similarity": np.float16,
    "expert_similarity": np.float16,
}
_OPTIONAL = {"similarity", "expert_similarity"}
_REQUIRED = {"version", "model", "temperature", *_DTYPES} - _OPTIONAL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateTrace:
    """A recorded trace; shapes as in the module's table. Arrays must not be written to."""

    model: str
    temperature: float = 1.0
    layers: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    gate: npt.NDArray[np.float16]
    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16]
    similarity: npt.NDArray[np.float16] | None = None
    expert_similarity: npt.NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ConfigError(f"gate trace: {problem}")

    @property
    def tokens(self) -> int:
        """How many tokens were recorded."""
        return len(self.position)

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer."""
        return int(self.gate.shape[2])

    def probabilities(self) -> npt.NDArray[np.float64]:
        """(layers, tokens, experts) softmax of the scores over the temperature: what selection policies rank by."""
        scores = self.gate.astype(np.float64) / self.temperature
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        shares: npt.NDArray[np.float64] = scores / scores.sum(axis=2, keepdims=True)
        return shares

    def activation_frequency(self) -> npt.NDArray[np.float64]:
        """(layers, experts) share of the tokens that ask for each expert; each row sums to the mean top-k."""
        counts = np.zeros((len(self.layers), self.expert_count))
        for row, chosen in zip(counts, self.experts, strict=True):
            row += np.bincount(chosen[chosen >= 0].astype(np.int64), minlength=self.expert_count)
        return counts / max(self.tokens, 1)

    def save(self, file: Path) -> None:
        """Write the trace; an existing file is replaced only by a whole one.

        Raises:
            ConfigError: the file cannot be written.
        """
        arrays = {name: getattr(self, name) for name in _DTYPES if getattr(self, name) is not None}
        partial = file.with_name(f".{file.name}.part")
        try:
            with partial.open("wb") as stream:
                np.savez_compressed(stream, **self._scalars(), **arrays)
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConfigError(f"gate trace {file} cannot be written: {error}") from error

    @staticmethod
    def load(file: Path) -> GateTrace:
        """Read a trace that anybody may have made.

        Raises:
            ConfigError: it cannot be read, or is no sound trace.
        """
        try:
            arrays = _read(file)
            version = int(arrays.pop("version"))
            if version != VERSION:
                raise ConfigError(f"version {version} is not known; this program reads {VERSION}")
            temperature = float(arrays.pop("temperature"))
            return GateTrace(model=str(arrays.pop("model")), temperature=temperature, **arrays)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, ConfigError) as error:
            raise ConfigError(f"gate trace {file} cannot be used: {error}".splitlines()[0]) from error

    def _scalars(self) -> dict[str, Any]:
        return {
            "version": np.int32(VERSION),
            "model": np.str_(self.model),
            "temperature": np.float64(self.temperature),
        }

    def _problem(self) -> str:
        """What contradicts the table; empty where nothing does."""
        if not 0 < self.temperature < np.inf:
            return f"temperature must be positive and finite, got {self.temperature}"
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array is not None and array.dtype != dtype:
                return f"{name} must be {np.dtype(dtype).name}, got {array.dtype}"
        if self.gate.ndim != 3 or self.experts.ndim != 3 or 0 in self.gate.shape or 0 in self.experts.shape:
            return f"gate {self.gate.shape} and experts {self.experts.shape} must have three dimensions, none empty"
        layers, tokens, experts = self.gate.shape
        expected = {
            "layers": (layers,),
            "position": (tokens,),
            "experts": (layers, tokens, self.experts.shape[2]),
            "weights": (layers, tokens, self.experts.shape[2]),
            "similarity": (layers, tokens),
            "expert_similarity": (layers, experts, experts),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                return f"{name} must have shape {shape}, got {array.shape}"
        if not (np.isfinite(self.gate).all() and np.isfinite(self.weights).all()):
            return "gate and weights must be finite"
        for name in sorted(_OPTIONAL):
            cosine = getattr(self, name)
            if cosine is not None and not (np.abs(cosine) <= 1.001).all():  # also refuses NaN; float16 rounds
                return f"{name} must be from -1 to 1"
        if self.experts.min() < -1 or self.experts.max() >= experts:
            return f"experts must be from -1 to {experts - 1}"
        if (np.diff(self.layers) <= 0).any() or self.layers[0] < 0 or self.position.min() < 0:
            return "layers must ascend, and neither layers nor positions be negative"
        return ""


def _read(file: Path) -> dict[str, Any]:
    """All arrays of the file by name, refused before they are unpacked where they are too large."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        names = {entry.filename.removesuffix(".npy") for entry in archive.infolist()}
    if size > MAX_BYTES:
        raise ConfigError(f"it unpacks to {size} bytes, at most {MAX_BYTES} are read")
    if missing := _REQUIRED - names:
        raise ConfigError(f"it lacks {', '.join(sorted(missing))}")
    if unknown := names - _REQUIRED - _OPTIONAL:
        raise ConfigError(f"it holds {sorted(unknown)[0]!r}, which no trace has")
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in names}

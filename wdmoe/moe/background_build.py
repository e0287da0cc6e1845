"""Serve at once, fast later: an expert runs where it opens quickly while its engine is being built."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.errors import ExpertError
from wdmoe.transport.codec.messages import Activations

log = logging.getLogger(__name__)

TRIAL_TOKENS = 4
TOLERANCE = 0.05  # of the output's norm, between the engine and the quick way; half precision stays below 0.01


class Model(Protocol):
    """As `wdmoe.moe.expert.ExpertModel`."""

    @property
    def hidden(self) -> int:
        """Width of a token."""
        ...

    def run(self, tokens: Activations) -> Float32Array:
        """Apply the expert."""
        ...


OpenQuickly: TypeAlias = Callable[[bytes], Model]
Build: TypeAlias = Callable[[bytes, str, int], Model]  # file, its SHA-256 in hex, width; may take minutes


class SwappedModel:
    """An expert whose engine changes under it, between two runs."""

    def __init__(self, model: Model) -> None:
        self.hidden = model.hidden
        self._model = model

    def run(self, tokens: Activations) -> Float32Array:
        """As `wdmoe.moe.expert.ExpertModel.run`."""
        return self._model.run(tokens)

    def swap(self, model: Model) -> None:
        """Use `model` from the next run on."""
        self._model = model


class _Order(NamedTuple):
    target: weakref.ref[SwappedModel]  # an expert that is unloaded meanwhile needs no engine
    file: bytes
    sha256: str


class BackgroundBuild:
    """Opens experts quickly; one thread builds the engine of each, tries it, and swaps it in.

    An engine that fails, or computes something else than the quick way does, is never used.
    """

    def __init__(self, quick: OpenQuickly, build: Build) -> None:
        self._quick = quick
        self._build = build
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._closed = False
        # A build can't be interrupted and takes minutes: as a daemon it doesn't hold up the end of the program.
        self._thread = threading.Thread(target=self._work, name="wdmoe-build", daemon=True)
        self._thread.start()

    def open(self, file: bytes, sha256: str) -> SwappedModel:
        """Open an expert the quick way, at once. Thread-safe. Raises ExpertError."""
        model = SwappedModel(self._quick(file))
        self._orders.put(_Order(weakref.ref(model), file, sha256))
        return model

    def close(self) -> None:
        """Build nothing more. Doesn't wait for the build that is under way."""
        self._closed = True
        self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None and not self._closed:
            target = order.target()
            if target is None:
                continue
            try:
                engine = self._build(order.file, order.sha256, target.hidden)
                _try(engine, self._quick(order.file))
            except ExpertError as error:
                log.warning("no engine for expert file %s: %s", order.sha256[:16], error)
            else:
                target.swap(engine)
                log.debug("engine of expert file %s is in use", order.sha256[:16])


def _try(engine: Model, reference: Model) -> None:
    """Refuse an engine that isn't the same function. Also gets its slow first run over with."""
    tokens = np.random.default_rng(0).standard_normal((TRIAL_TOKENS, reference.hidden)).astype(np.float32)
    wanted, got = reference.run(tokens), engine.run(tokens)
    error = float(np.linalg.norm(got - wanted)) if got.shape == wanted.shape else np.inf
    if not error <= TOLERANCE * float(np.linalg.norm(wanted)):  # also refuses NaN
        raise ExpertError(f"its output is off by {error:g}")

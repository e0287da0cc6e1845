"""How likely held-out text is to the model while it is served by the rules of the moment: what they cost in quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wdmoe.backbone.runtime.engine import Engine
from wdmoe.backbone.text_windows import SHIPPED_HELD_OUT, read_documents, token_windows
from wdmoe.errors import ConfigError
from wdmoe.receipt import Ledger

LONGEST_S = 600.0  # for one window


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One window of text."""

    nats: float  # negative log-likelihood, summed over `tokens`
    tokens: int  # all of the window but the first, which nothing predicts
    dropped_weight: float  # as in a receipt


def read_window(engine: Engine, number: int, length: int) -> Reading:
    """Read one window of the shipped held-out text in one pass. Blocking.

    Args:
        engine: answers by the rules in question.
        number: which window, from 0.
        length: its tokens, at least 2.
    Raises:
        ConfigError: the text has no such window.
        ExpertsUnavailableError: from a layer that has no expert left.
    """

    def work(station: Any, ledger: Ledger) -> Reading:
        documents = read_documents((), SHIPPED_HELD_OUT)
        windows = token_windows(documents, station.tokenizer, length, number + 1)
        if len(windows) <= number:
            raise ConfigError(f"the held-out text has {len(windows)} windows of {length} tokens, not {number + 1}")
        nats = station.nats(windows[number:].astype(np.int32), ledger)
        return Reading(nats=float(nats.sum(dtype=float)), tokens=nats.size, dropped_weight=ledger.mean_dropped)

    return engine.call(work).result(LONGEST_S)

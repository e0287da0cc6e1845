"""Perplexity of a language model over fixed windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from wdmoe.errors import ConfigError

_TOKENS_AT_ONCE = 2048  # bounds the memory of the logits


def perplexity(model: Any, tokenizer: Any, text: str, window: int = 512, max_tokens: int = 8192) -> float:
    """Perplexity of `text`, cut into windows that start without context.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        window: tokens per window; what does not fill the last one is left out.
        max_tokens: tokens used at most, from the beginning.
    Raises:
        ConfigError: the text does not fill one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    count = len(ids) // window
    if count == 0:
        raise ConfigError(f"the text is too short: {len(ids)} tokens, at least {window} are needed")
    return window_perplexity(model, torch.tensor(ids[: count * window]).view(count, window))


def window_perplexity(model: Any, windows: torch.Tensor, progress: Callable[[float], None] = lambda _: None) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        windows: (windows, length) int64 token ids.
        progress: told the fraction done.
    """
    nats = 0.0
    batch = max(1, _TOKENS_AT_ONCE // windows.shape[1])
    for start in range(0, len(windows), batch):
        nats += float(window_nats(model, windows[start : start + batch]).sum())
        progress(min(1.0, (start + batch) / len(windows)))
    return math.exp(nats / (windows.numel() - len(windows)))


@torch.no_grad()
def window_nats(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """(windows, length - 1) float32: negative log-likelihood of every token but the first of each window.

    Args:
        windows: (windows, length) int64 token ids.
    """
    ids = windows.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

"""One request on the model thread: transformers' own `generate`, with an event for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from wdmoe.backbone.runtime.detokenizer import TextStream
from wdmoe.backbone.runtime.experts_seam import CURRENT_CLIENT, CURRENT_LEDGER
from wdmoe.backbone.runtime.sampling import processors
from wdmoe.errors import CancelledRequestError
from wdmoe.receipt import Ledger
from wdmoe.records import Finished, Sampling, TextDelta, Waiting

Event: TypeAlias = TextDelta | Waiting | Finished | Exception


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request that was admitted. `emit` is thread-safe; the last event is a `Finished` or the exception why not."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    ledger: Ledger
    emit: Callable[[Event], None]
    cancelled: bool = field(default=False)

    def cancel(self) -> None:
        """Ask it to end after the current forward pass. Thread-safe."""
        self.cancelled = True

    def tell_waiting(self, longest_s: float) -> None:
        """See `wdmoe.layer_call.Client`."""
        self.emit(Waiting(text=f"waiting for experts that were lost, {max(longest_s, 0.0):.0f} s at most"))


def generate(model: Any, tokenizer: Any, job: Job, prefill_chunk: int) -> Finished:
    """Run a job to its end, in the greenlet of the request.

    Raises:
        CancelledRequestError: `job.cancelled` was set; noticed after the current forward pass, or while it waits.
        ExpertsUnavailableError: from a layer that has no expert left.
    """
    CURRENT_LEDGER.set(job.ledger)
    CURRENT_CLIENT.set(job)
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([job.prompt_ids], dtype=torch.long, device=device)
    tell = _TellEachToken(job, TextStream(tokenizer, job.sampling.stop))
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_config(model, job, prefill_chunk),
        logits_processor=processors(job.sampling, device),
        stopping_criteria=StoppingCriteriaList([tell]),
    )
    if job.cancelled:
        raise CancelledRequestError("the client went away")
    ended = tell.text.stopped or int(output[0, -1]) in _eos_ids(model, job.sampling)
    rest = tell.text.flush()
    if rest:
        job.emit(TextDelta(text=rest, token_id=-1))
    return Finished(reason="stop" if ended else "length", receipt=job.ledger.close())


def _config(model: Any, job: Job, prefill_chunk: int) -> GenerationConfig:
    eos = _eos_ids(model, job.sampling)
    long = len(job.prompt_ids) > prefill_chunk
    return GenerationConfig(
        max_new_tokens=job.sampling.max_tokens,
        do_sample=False,  # sampling is a logits processor here, see sampling.py
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        use_cache=True,
        prefill_chunk_size=prefill_chunk if long else None,  # a long prompt must not hold up other requests
    )


def _eos_ids(model: Any, sampling: Sampling) -> list[int]:
    eos = model.generation_config.eos_token_id
    if sampling.ignore_eos or eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


class _TellEachToken(StoppingCriteria):  # type: ignore[misc]
    """Emits every new token, and ends generation on a stop sequence or when the client went away.

    A stopping criterion rather than a streamer: it sees the token first, so no step is computed in vain.
    """

    def __init__(self, job: Job, text: TextStream) -> None:
        self.text = text
        self._job = job

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """(batch, tokens so far) -> (batch,) bool."""
        ledger = self._job.ledger
        if not ledger.completion_tokens:
            ledger.first_token_s = time.monotonic() - ledger.started_s
        ledger.completion_tokens += 1
        token_id = int(input_ids[0, -1])
        text = self.text.feed(token_id)
        devices, layers = ledger.close_step()
        self._job.emit(
            TextDelta(text=text, token_id=token_id, devices=devices, layers=layers, dropped_weight=ledger.mean_dropped)
        )
        done = self._job.cancelled or self.text.stopped
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)

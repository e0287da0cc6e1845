"""One request on the model thread: transformers' own `generate`, with an event for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from wdmoe.backbone.runtime.detokenizer import TextStream
from wdmoe.backbone.runtime.experts_seam import CURRENT_CLIENT, CURRENT_LEDGER
from wdmoe.backbone.runtime.sampling import processors
from wdmoe.errors import CancelledRequestError
from wdmoe.receipt import Ledger
from wdmoe.records import AnswerEvent, Finished, Sampling, TextDelta, Waiting

Event: TypeAlias = AnswerEvent | Exception


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request that was admitted. `emit` is thread-safe; the last event is a `Finished` or the exception why not."""

    prompt_ids: tuple[int, ...]
    begun: tuple[int, ...] = ()  # the answer so far
    sampling: Sampling
    ledger: Ledger
    emit: Callable[[Event], None]

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ledger.cancelled

    def cancel(self) -> None:
        """Ask it to end after the layer that is computed now. Thread-safe."""
        self.ledger.cancelled = True

    def tell_waiting(self, longest_s: float) -> None:
        """See `wdmoe.layer_call.Client`."""
        self.emit(Waiting(text=f"waiting for experts that were lost, {max(longest_s, 0.0):.0f} s at most"))


def generate(model: Any, tokenizer: Any, job: Job, prefill_chunk: int) -> Finished:
    """Run a job to its end, in the greenlet of the request.

    Raises:
        CancelledRequestError: `job.cancel` was called; noticed at the next layer, or while it waits.
        ExpertsUnavailableError: from a layer that has no expert left.
    """
    CURRENT_LEDGER.set(job.ledger)
    CURRENT_CLIENT.set(job)
    text = TextStream(tokenizer, job.sampling.stop)
    for token_id in job.begun:  # told already, but for what was held back
        text.feed(token_id)
    eos = _eos_ids(model, job.sampling)
    last = job.begun[-1] if job.begun else -1
    if not text.stopped and last not in eos and len(job.begun) < job.sampling.max_tokens:
        no_token = model.get_input_embeddings().weight.shape[0]
        last = _generate(model, job, _config(job, eos or [no_token], prefill_chunk), text)
    ended = text.stopped or last in eos
    rest = text.flush()
    if rest:
        job.emit(TextDelta(text=rest, token_id=-1))
    return Finished(reason="stop" if ended else "length", receipt=job.ledger.close())


def _generate(model: Any, job: Job, config: GenerationConfig, text: TextStream) -> int:
    """Make and tell all tokens that are left, at least one. Returns the last one."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([job.prompt_ids + job.begun], dtype=torch.long, device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=processors(job.sampling, device, drawn=len(job.begun)),
        stopping_criteria=StoppingCriteriaList([_TellEachToken(job, text)]),
    )
    if job.cancelled:
        raise CancelledRequestError("the client went away")
    return int(output[0, -1])


def _config(job: Job, eos: list[int], prefill_chunk: int) -> GenerationConfig:
    """`eos` has at least one token: for none transformers would take the model's own."""
    long = len(job.prompt_ids) + len(job.begun) > prefill_chunk
    return GenerationConfig(
        max_new_tokens=job.sampling.max_tokens - len(job.begun),
        do_sample=False,  # sampling is a logits processor here, see sampling.py
        eos_token_id=eos,
        pad_token_id=0,  # nothing is padded here
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
        delta = TextDelta(
            text=text,
            token_id=token_id,
            devices=devices,
            layers=layers,
            dropped_weight=ledger.mean_dropped,
            lost_weight=ledger.mean_lost,
        )
        self._job.emit(delta)
        done = self._job.cancelled or self.text.stopped
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)

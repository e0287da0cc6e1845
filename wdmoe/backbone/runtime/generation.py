"""One request on the model thread: transformers' own `generate`, with an event for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from wdmoe.backbone.runtime.choosing import Chooser
from wdmoe.backbone.runtime.experts_seam import CURRENT_CLIENT, CURRENT_LEDGER
from wdmoe.backbone.runtime.job import Job, Telling, end_tokens
from wdmoe.errors import CancelledRequestError
from wdmoe.records import Finished


def generate(model: Any, tokenizer: Any, job: Job, prefill_chunk: int) -> Finished:
    """Run a job to its end, in the greenlet of the request.

    Raises:
        CancelledRequestError: `job.cancel` was called; noticed at the next layer, or while it waits.
        ExpertsUnavailableError: from a layer that has no expert left.
    """
    CURRENT_LEDGER.set(job.ledger)
    CURRENT_CLIENT.set(job)
    eos = end_tokens(model.generation_config.eos_token_id)
    telling = Telling(job, tokenizer, eos)
    if not telling.over:
        no_token = model.get_input_embeddings().weight.shape[0]
        ends = list(eos) if eos and not job.sampling.ignore_eos else [no_token]
        _generate(model, job, _config(job, ends, prefill_chunk), telling)
    return telling.finish()


def _generate(model: Any, job: Job, config: GenerationConfig, telling: Telling) -> None:
    """Make and tell all tokens that are left, at least one."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([job.prompt_ids + job.begun], dtype=torch.long, device=device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Choose(job)]),
        stopping_criteria=StoppingCriteriaList([_TellEachToken(job, telling)]),
    )
    if job.cancelled:
        raise CancelledRequestError("the client went away")


def _config(job: Job, eos: list[int], prefill_chunk: int) -> GenerationConfig:
    """`eos` has at least one token: for none transformers would take the model's own."""
    long = len(job.prompt_ids) + len(job.begun) > prefill_chunk
    return GenerationConfig(
        max_new_tokens=job.sampling.max_tokens - len(job.begun),
        do_sample=False,  # sampling is a logits processor here
        eos_token_id=eos,
        pad_token_id=0,  # nothing is padded here
        use_cache=True,
        prefill_chunk_size=prefill_chunk if long else None,  # a long prompt must not hold up other requests
    )


class _Choose(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that `Chooser` chooses: a seed means the same in both engines, whatever runs beside it.

    transformers samples from torch's global generator, which concurrent requests would share.
    """

    def __init__(self, job: Job) -> None:
        self._chooser = Chooser(job.sampling)
        self._prompt_tokens = len(job.prompt_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(1, tokens so far), (1, vocabulary) -> (1, vocabulary)."""
        token = self._chooser.choose(scores[0].float().cpu().numpy(), input_ids.shape[1] - self._prompt_tokens)
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only


class _TellEachToken(StoppingCriteria):  # type: ignore[misc]
    """Emits every new token, and ends generation on a stop sequence or when the client went away.

    A stopping criterion rather than a streamer: it sees the token first, so no step is computed in vain.
    """

    def __init__(self, job: Job, telling: Telling) -> None:
        self._job = job
        self._telling = telling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """(batch, tokens so far) -> (batch,) bool."""
        self._telling.tell(int(input_ids[0, -1]))
        done = self._job.cancelled or self._telling.ended
        return torch.full((input_ids.shape[0],), done, device=input_ids.device)

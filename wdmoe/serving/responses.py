"""What clients receive: OpenAI's answers and stream chunks, each answer with the receipt as `wdmoe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from wdmoe.receipt import Receipt, StageSeconds
from wdmoe.records import TextDelta
from wdmoe.serving.requests import Job

ANSWERING = ("ok", "degraded")  # states in which requests are answered
STOPPING = "stopping"
STATES = (*ANSWERING, "waiting", "restarting")


def whole_answer(job: Job, texts: Sequence[str], reasons: Sequence[str], receipt: Receipt) -> dict[str, Any]:
    """The body of an answer that is sent at once."""
    choices = [
        {"index": index, **_text(job, text), "logprobs": None, "finish_reason": reason}
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    kind = "chat.completion" if job.chat else "text_completion"
    return {**_head(job, kind), "choices": choices, "usage": usage(receipt), "wdmoe": asdict(receipt)}


def chunk(
    job: Job,
    index: int,
    text: str,
    *,
    first: bool = False,
    reason: str | None = None,
    receipt: Receipt | None = None,
    token: TextDelta | None = None,
) -> dict[str, Any]:
    """One event of a stream. `wdmoe` says who worked on its token; in the last one it is the receipt."""
    if job.chat:
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    else:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    body = {**_head(job, _chunk_kind(job)), "choices": [choice]}
    if job.include_usage:
        body["usage"] = None  # as OpenAI does: filled in the chunk after the last
    if receipt is not None:
        body["wdmoe"] = asdict(receipt)
    elif token is not None and token.token_id >= 0:
        body["wdmoe"] = _token(token)
    return body


def usage_chunk(job: Job, receipt: Receipt) -> dict[str, Any]:
    """The chunk that `stream_options.include_usage` adds at the end."""
    body = {**_head(job, _chunk_kind(job)), "choices": [], "usage": usage(receipt)}
    return {**body, "wdmoe": asdict(receipt)}


def usage(receipt: Receipt) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": receipt.completion_tokens,
        "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
    }


def merge_receipts(receipts: Sequence[Receipt]) -> Receipt:
    """One receipt for the choices of one answer. They ran side by side: amounts add, times do not."""
    if len(receipts) == 1:
        return receipts[0]
    tokens = [receipt.prompt_tokens + receipt.completion_tokens for receipt in receipts]
    return Receipt(
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
        reused_tokens=sum(receipt.reused_tokens for receipt in receipts),
        policy=receipts[0].policy,
        degraded=any(receipt.degraded for receipt in receipts),
        degraded_tokens=sum(receipt.degraded_tokens for receipt in receipts),
        dropped_weight=_mean([receipt.dropped_weight for receipt in receipts], tokens),
        lost_weight=_mean([receipt.lost_weight for receipt in receipts], tokens),
        retries=sum(receipt.retries for receipt in receipts),
        suspect=any(receipt.suspect for receipt in receipts),
        suspect_answers=sum(receipt.suspect_answers for receipt in receipts),
        hedges=sum(receipt.hedges for receipt in receipts),
        waited_s=max(receipt.waited_s for receipt in receipts),
        bytes_down=sum(receipt.bytes_down for receipt in receipts),
        bytes_up=sum(receipt.bytes_up for receipt in receipts),
        first_token_s=max(receipt.first_token_s for receipt in receipts),
        elapsed_s=max(receipt.elapsed_s for receipt in receipts),
        stages=sum((receipt.stages for receipt in receipts), StageSeconds()),
    )


def _token(token: TextDelta) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "devices": list(token.devices),
        "layers": list(token.layers),
        "dropped_weight": token.dropped_weight,
    }


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(sum(weights), 1)


def _text(job: Job, text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if job.chat else {"text": text}


def _chunk_kind(job: Job) -> str:
    return "chat.completion.chunk" if job.chat else "text_completion"


def _head(job: Job, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if job.chat else "cmpl"
    return {"id": f"{prefix}-{job.request_id}", "object": kind, "created": job.created, "model": job.model}


def device_count(status: Mapping[str, object]) -> int:
    """Devices that take part."""
    devices = status.get("devices")
    return len(devices) if isinstance(devices, (list, tuple)) else 0


def health(status: Mapping[str, object]) -> dict[str, object]:
    """The body of /health.

    The engine states what it knows under these names; all are optional, and more may follow:

    - `state`: "ok", "degraded" (an expert has no device), "waiting" (no expert has one) or "restarting" (the process
      of the model ended and another one begins);
    - `devices_quarantined`: how many of them gave wrong answers and are not asked any more;
    - `devices`: a list of objects, one for each device that takes part (`name` among their fields).
    """
    devices = device_count(status)
    state = status.get("state")
    if state not in STATES:
        state = "ok" if devices else "waiting"
    barred = status.get("devices_quarantined")
    return {"status": state, "devices": devices, **({"quarantined": barred} if barred else {})}

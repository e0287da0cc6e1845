"""From a request to prompt token ids."""

from __future__ import annotations

from wdmoe.backbone.text.tokenizer import TextTokenizer
from wdmoe.errors import RequestError
from wdmoe.records import GenerationRequest


def encode_prompt(tokenizer: TextTokenizer, request: GenerationRequest, context_tokens: int) -> tuple[int, ...]:
    """Tokenize and check a request.

    Args:
        tokenizer: of the model.
        request: exactly one of prompt and messages.
        context_tokens: longest prompt plus answer.
    Returns:
        Prompt token ids, at least one.
    Raises:
        RequestError: empty, unknown ids, no chat template, or longer than the context.
    """
    ids = _ids(tokenizer, request)
    if not ids:
        raise RequestError("the prompt is empty; give at least one token")
    wanted = len(ids) + request.sampling.max_tokens
    if wanted > context_tokens:
        raise RequestError(
            f"prompt ({len(ids)} tokens) and max_tokens ({request.sampling.max_tokens}) together exceed "
            f"the model's context of {context_tokens} tokens"
        )
    return ids


def _ids(tokenizer: TextTokenizer, request: GenerationRequest) -> tuple[int, ...]:
    if request.messages is not None:
        return _chat_ids(tokenizer, request)
    if isinstance(request.prompt, str):
        return tuple(tokenizer(request.prompt)["input_ids"])
    ids = tuple(request.prompt or ())
    for token_id in ids:
        if not 0 <= token_id < len(tokenizer):
            raise RequestError(f"token id {token_id} is not in the vocabulary of {len(tokenizer)}")
    return ids


def _chat_ids(tokenizer: TextTokenizer, request: GenerationRequest) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template; use /v1/completions with a prompt")
    messages = [dict(message) for message in request.messages or ()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

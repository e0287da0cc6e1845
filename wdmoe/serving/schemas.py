"""What clients send: the part of OpenAI's requests that is served here.

A known field that asks for something that is not served is refused, so that nobody mistakes silence for
support; unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from wdmoe.serving.errors import Problem

# Field -> the values that ask for nothing. Anything else is refused by name.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "n": (None, 1),
    "presence_penalty": (None, 0),
}
_UNSUPPORTED_CHAT: dict[str, tuple[object, ...]] = {
    **_UNSUPPORTED,
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
_UNSUPPORTED_TEXT: dict[str, tuple[object, ...]] = {
    **_UNSUPPORTED,
    "echo": (None, False),
    "logprobs": (None,),
    "suffix": (None, ""),
}


def _refuse_unsupported(data: object, table: dict[str, tuple[object, ...]]) -> None:
    if not isinstance(data, dict):
        return  # pydantic says what is wrong
    for name, harmless in table.items():
        if data.get(name) not in harmless:
            choices = " or ".join(repr(value) for value in harmless if value is not None) or "left out"
            message = f"{name} is not supported here: it must be {choices}"
            raise Problem(400, message, param=name, code="unsupported_parameter")


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair, which no tokenizer takes. UnicodeEncodeError is a ValueError.
    text.encode()
    return text


_Text: TypeAlias = Annotated[str, AfterValidator(_encodable)]


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class _Sampled(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Text | list[_Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None  # not OpenAI's: go on to max_tokens, for measurements

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop sequences, none of them empty."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or not all(stops):
            raise Problem(400, "stop: give up to 4 sequences, none of them empty", param="stop")
        return stops


class CompletionRequest(_Sampled):
    """Body of POST /v1/completions."""

    prompt: _Text | list[_Text] | list[int] | list[list[int]]

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        _refuse_unsupported(data, _UNSUPPORTED_TEXT)
        return data

    def prompts(self, at_most: int) -> list[str | tuple[int, ...]]:
        """One entry for each answer that is asked for.

        Raises:
            Problem: 400, none or too many.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [tuple(token for token in prompt if isinstance(token, int))]
        if not 1 <= len(prompt) <= at_most:
            message = f"prompt: give a text, token ids, or a list of 1 to {at_most} of them, got {len(prompt)}"
            raise Problem(400, message, param="prompt")
        return [entry if isinstance(entry, str) else tuple(entry) for entry in prompt if not isinstance(entry, int)]


class ContentPart(BaseModel):
    """A piece of a message. Only text is served."""

    model_config = ConfigDict(strict=True)

    type: str
    text: _Text = ""


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[ContentPart]

    def plain(self) -> dict[str, str]:
        """Role and text as a chat template takes them."""
        role = "system" if self.role == "developer" else self.role  # the newer name of the same thing
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        for part in self.content:
            if part.type != "text":
                raise Problem(
                    400, f"a message part of type {part.type!r} is not supported: send text", param="messages"
                )
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_Sampled):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        _refuse_unsupported(data, _UNSUPPORTED_CHAT)
        return data

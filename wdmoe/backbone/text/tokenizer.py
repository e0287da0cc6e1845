"""A model's tokenizer from its files, over the tokenizers library: the same ids and texts as transformers'.

What transformers does beyond the file tokenizer.json is small: tokens that only the other files name are added, and
templates render chats. `wdmoe-node export` compares both readings of a checkpoint, so a bundle's files mean the same to
both (`wdmoe.backbone.export.tokenizer_files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from wdmoe.backbone.text.chat_template import render
from wdmoe.errors import BundleError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_Named: TypeAlias = str | AddedToken


class TextTokenizer(Protocol):
    """What wdmoe asks of a tokenizer. `FileTokenizer` has it, and so have transformers' fast tokenizers."""

    @property
    def chat_template(self) -> Any:
        """The template; None or "" where the model has none."""
        ...

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer of the tokenizers library, which decodes."""
        ...

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens too."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, Any]:
        """`input_ids` of a text. `verbose`: say so if the model takes fewer."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any:
        """With `tokenize` False: the conversation as text."""
        ...


@dataclass(frozen=True, slots=True)
class FileTokenizer:
    """Implements `TextTokenizer`. Any thread may use it."""

    backend_tokenizer: Tokenizer
    chat_template: str | None
    special_tokens_map: Mapping[str, str]  # role -> token

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, list[int]]:
        """See `TextTokenizer`. How long a text may be is not this one's business, so nothing is said of it."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any:
        """The conversation as text, or, with `tokenize`, as ids.

        Raises:
            ValueError: there is no template, or no message.
            Exception: whatever the template raises.
        """
        if not self.chat_template:
            raise ValueError("the model has no chat template")
        text = render(
            self.chat_template, conversation, self.special_tokens_map, add_generation_prompt=add_generation_prompt
        )
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text


def load_tokenizer(folder: Path) -> FileTokenizer:
    """The tokenizer of a model's folder.

    Raises:
        BundleError: there is no tokenizer.json, or a file cannot be used.
    """
    try:
        return _load(folder)
    except BundleError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())
        raise BundleError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error


def _load(folder: Path) -> FileTokenizer:
    file = folder / TOKENIZER_NAME
    if not file.is_file():
        raise BundleError(f"the tokenizer in {folder} cannot be loaded: there is no {TOKENIZER_NAME}")
    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    config = _json(folder / CONFIG_NAME)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    tokens = _TokenNames(folder, config, backend)
    backend.add_tokens(list(tokens.missing()))
    return FileTokenizer(backend, _template(folder, config), {role: str(one) for role, one in tokens.named.items()})


class _TokenNames:
    """The tokens that files beside tokenizer.json name. What it adds to the backend is what transformers would add."""

    def __init__(self, folder: Path, config: Mapping[str, Any], backend: Tokenizer) -> None:
        self._known: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        fields = dict(config)
        if not fields.get("extra_special_tokens"):  # as it was called once; transformers asks the config only
            fields["extra_special_tokens"] = fields.get("additional_special_tokens")
        if "added_tokens_decoder" in fields:
            listed = {int(index): _added(token) for index, token in fields["added_tokens_decoder"].items()}
        else:  # written by an older transformers: in files of their own
            fields |= {role: _special(token) for role, token in _json(folder / "special_tokens_map.json").items()}
            listed = self._once_listed(folder, fields) | self._known
        by_text = {token.content: token for token in listed.values()}
        self._listed = [listed[index] for index in sorted(listed)]
        self._extra = [_token(token) for token in _extra(fields)]
        self.named: dict[str, _Named] = {
            role: by_text.get(str(token), token) for role, token in _roles(fields) if str(token)
        }

    def missing(self) -> Iterator[AddedToken]:
        """What the backend does not have yet, in the order of transformers."""
        as_they_are = {repr(token) for token in self._known.values()}
        listed = [token for token in self._listed if repr(token) not in as_they_are]
        have = {token.content for token in self._known.values()} | {token.content for token in listed}
        special = {str(token) for token in self.named.values()}
        for token in listed:
            if token.content in special:
                token.special = True
            yield token
        for one in (*self.named.values(), *self._extra):
            if str(one) not in have:
                have.add(str(one))
                yield AddedToken(one, special=True) if isinstance(one, str) else one

    @staticmethod
    def _once_listed(folder: Path, fields: Mapping[str, Any]) -> dict[int, AddedToken]:
        special = {str(token) for _, token in _roles(fields)} | {str(_token(token)) for token in _extra(fields)}
        return {
            index: AddedToken(text, normalized=text not in special, special=text in special)
            for text, index in _json(folder / "added_tokens.json").items()
        }


def _roles(fields: Mapping[str, Any]) -> Iterator[tuple[str, _Named]]:
    """Named tokens: the usual roles, and those of a model's own, as "image_token"."""
    yield from ((role, _token(fields[role])) for role in _ROLES if fields.get(role) is not None)
    for role, token in fields.items():
        if role not in _ROLES and role.endswith("_token") and isinstance(token, str):
            yield role, token
    extra = fields.get("extra_special_tokens")
    if isinstance(extra, dict):
        yield from ((role, _token(token)) for role, token in extra.items())


def _extra(fields: Mapping[str, Any]) -> list[Any]:
    extra = fields.get("extra_special_tokens")
    return extra if isinstance(extra, list) else []


def _token(value: Any) -> _Named:
    if isinstance(value, AddedToken):
        return value
    return _added(value) if isinstance(value, dict) else str(value)


def _added(fields: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{name: field for name, field in fields.items() if name != "__type"})


def _special(value: Any) -> Any:
    if isinstance(value, dict) and "content" in value:
        return AddedToken(**{**value, "special": True})
    return value


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default one of the model's chat templates; a file goes before an entry of the config."""
    file = folder / TEMPLATE_NAME
    if file.is_file():
        return file.read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}
    if isinstance(found, dict):
        found = found.get("default")
    return None if found is None else str(found)


def _json(file: Path) -> dict[str, Any]:
    """The content of a file; nothing where there is no file."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return content


def nothing_added() -> TemplateProcessing:
    """What transformers enters where a tokenizer adds nothing to a text."""
    return TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def tokenizer_files(tokenizer: FileTokenizer, context_tokens: int) -> dict[str, bytes]:
    """The files of a tokenizer, as transformers would write them.

    Args:
        context_tokens: longest text that the model takes.
    """
    config = {
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "tokenizer_class": "TokenizersBackend",
        **tokenizer.special_tokens_map,
    }
    files = {
        TOKENIZER_NAME: tokenizer.backend_tokenizer.to_str(pretty=True),
        CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
    }
    if tokenizer.chat_template is not None:
        files[TEMPLATE_NAME] = tokenizer.chat_template
    return {name: text.encode() for name, text in files.items()}

"""Chat templates, rendered as transformers renders them: same sandbox, filters and names. No transformers.

A template is a program of the model's author. The sandbox keeps it from everything but its own text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_KEPT_TEMPLATES = 8


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], *, add_generation_prompt: bool
) -> str:
    """A conversation as text.

    Args:
        template: in Jinja.
        messages: of plain types, at least one; fields that are None are left out.
        special: tokens by their role, as in {"bos_token": "<s>"}.
        add_generation_prompt: end with the beginning of an answer.
    Raises:
        ValueError: there is no message.
        Exception: whatever the template raises.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return _compiled(template).render(
        messages=given, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special
    )


@lru_cache(_KEPT_TEMPLATES)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training. Here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

    def parse(self, parser: Parser) -> nodes.Node:
        """A block with a scope of its own, as transformers has it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _enclosed(self, context: nodes.EvalContext, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """Stands for `dict`, whose attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name of ours: `namespace(self=1)` is allowed
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_private(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} in a namespace: it begins with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)

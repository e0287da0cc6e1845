"""The names under which clients may ask for the one model that is served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wdmoe.serving.errors import Problem


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The model's own name, which every answer states, and other names that clients may use for it."""

    own: str
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: str, aliases: Iterable[str]) -> ModelNames:
        """Each name once, the model's own first."""
        distinct = dict.fromkeys(alias for alias in aliases if alias and alias != own)
        return cls(own, tuple(distinct))

    def check(self, asked: str | None) -> None:
        """Accept a request for this model. A request that names no model means it too.

        Raises:
            Problem: 404, with the names that are served.
        """
        if asked is not None and asked not in (self.own, *self.aliases):
            served = ", ".join(repr(name) for name in (self.own, *self.aliases))
            message = f"the model {asked!r} is not served here; this server has {served}"
            raise Problem(404, message, param="model", code="model_not_found")

    def describe(self, name: str, created_unix: int) -> dict[str, object]:
        """OpenAI's model object. `root` is the model that an alias stands for, as other servers put it."""
        return {"id": name, "object": "model", "created": created_unix, "owned_by": "wdmoe", "root": self.own}

"""From the keys of a checkpoint on disk to the parameters of transformers' modules, a few tensors at a time.

transformers knows for every family how disk and module differ (its conversion mapping: renamed keys, experts
stacked into one tensor, gate and up joined). Its own loader applies that to a whole model; this one groups
the keys by the parameter they end in, so that an export holds one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from wdmoe.errors import BundleError

ReadTensor = Callable[[str], torch.Tensor]


@dataclass(slots=True)
class Group:
    """Keys on disk that become one parameter (rarely: several) together."""

    target: str  # the first parameter
    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list)  # key on disk, pattern that it matched
    converter: WeightConverter | None = None


class Conversion:
    """How one checkpoint becomes one model's parameters.

    Args:
        model: any transformers model, usually on the meta device.
        keys: of the checkpoint.
    """

    def __init__(self, model: Any, keys: list[str]) -> None:
        self._model = model
        self._state: dict[str, torch.Tensor] = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: entry for entry in self._converters for p in entry.source_patterns}
        self.groups: dict[str, Group] = {}
        self.unused: list[str] = []  # keys that the model has no parameter for
        for key in sorted(keys, key=dot_natural_key):  # experts in the order of their numbers
            self._add(key)

    def _add(self, key: str) -> None:
        target, pattern = self._rename(key)
        if target not in self._state:
            self.unused.append(key)
            return
        group = self.groups.get(target)
        if group is None:
            template = None if pattern is None else self._by_pattern[pattern]
            group = self.groups[target] = Group(target, _targets(target, template), [], template)
        group.sources.append((key, pattern or key))

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The parameter a key belongs to, in the same order of attempts as transformers' loader."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and key in self._state:
            target, pattern = rename_source_key(key, [], [], prefix, self._state)
        return target, pattern

    def missing(self) -> list[str]:
        """Parameters and buffers that no key gives, not even through a weight they are tied to."""
        given = {target for group in self.groups.values() for target in group.targets}
        for target, source in self._model.all_tied_weights_keys.items():
            if target in given or source in given:
                given |= {target, source}
        return sorted(self._state.keys() - given)

    def convert(self, group: Group, read: ReadTensor) -> dict[str, torch.Tensor]:
        """Read a group's tensors and give its parameters, in the dtype they have on disk.

        Raises:
            BundleError: the tensors do not fit together or not into the model.
        """
        try:
            with torch.no_grad():
                values = self._convert(group, read)
        except BundleError:
            raise
        except Exception as error:  # transformers' operations raise whatever torch does
            raise BundleError(f"cannot convert {group.sources[0][0]!r} to {group.target!r}: {error}") from error
        for name, value in values.items():
            if name not in self._state or value.shape != self._state[name].shape:
                wanted = tuple(self._state[name].shape) if name in self._state else "no such parameter"
                raise BundleError(
                    f"{name!r} has shape {tuple(value.shape)} in the checkpoint; config.json wants {wanted}"
                )
        return values

    def _convert(self, group: Group, read: ReadTensor) -> dict[str, torch.Tensor]:
        if group.converter is None:
            return {group.target: read(group.sources[0][0])}
        converter = deepcopy(group.converter)
        for key, pattern in group.sources:
            converter.add_tensor(group.target, key, pattern, _later(read, key))
        plain = converter.convert(group.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in plain.items()}


def _later(read: ReadTensor, key: str) -> Callable[[], torch.Tensor]:
    return lambda: read(key)


def _targets(target: str, converter: WeightConverter | None) -> tuple[str, ...]:
    if converter is None:
        return (target,)
    first, *others = converter.target_patterns
    return (target, *(target.replace(first, other) for other in others))

"""A graph bound to memory, so that a run makes and binds nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from wdmoe.backbone.graphs.sessions import Session, Value, as_value

Binding = Any  # onnxruntime.IOBinding


class Bound:
    """A session with memory for its ends."""

    def __init__(self, session: Session, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        self._session = session
        self._binding: Binding = session.io_binding()
        for name, array in inputs.items():
            self.input(name, as_value(array))

    def input(self, name: str, value: Value) -> None:
        """Memory to read."""
        self._binding.bind_ortvalue_input(name, value)

    def output(self, name: str, array: npt.NDArray[Any]) -> None:
        """Memory to write."""
        self._binding.bind_ortvalue_output(name, as_value(array))

    def run(self) -> None:
        """Compute."""
        self._session.run_with_iobinding(self._binding)

"""The shared expert, computed while the others are away.

Several families add the output of a shared expert, which stays at the base station, after that of the routed ones. By
then the base station has waited for the devices. So it computes the shared expert as soon as the orders are out, and
hands the result over when the model asks for it. Same operation on the same tensor: the answer does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch

NAMES = ("shared_mlp", "shared_experts", "shared_expert")

# (module, input, output) computed ahead. Every greenlet, so every request, has a context of its own.
_AHEAD: ContextVar[tuple[torch.nn.Module, torch.Tensor, torch.Tensor] | None] = ContextVar("wdmoe_ahead", default=None)


@dataclass(slots=True, eq=False)
class SharedExpert:
    """The shared expert of one MoE block, wrapped. `ahead` gives what to compute while the devices work."""

    module: torch.nn.Module
    compute: Callable[[torch.Tensor], torch.Tensor]  # the module's own forward
    useful: bool = True  # whether this family asks for it after the experts, with the block's own input
    block_input: torch.Tensor | None = None  # between the block's beginning and its experts

    def ahead(self) -> Callable[[], object] | None:
        """Called by the experts: what to do while they are away, None where it would be in vain."""
        block_input, self.block_input = self.block_input, None
        if not self.useful or block_input is None:
            return None
        return lambda: _AHEAD.set((self.module, block_input, self.compute(block_input)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Stands in for the module's forward."""
        ahead = _AHEAD.get()
        if ahead is not None and ahead[0] is self.module:
            _AHEAD.set(None)
            if ahead[1] is hidden_states:
                return ahead[2]
            self.useful = False  # asked with another tensor: what was computed ahead is lost each time
        elif self.block_input is not None:
            self.useful = False  # asked before the experts
        return self.compute(hidden_states)


def wrap_shared_expert(model: torch.nn.Module, experts: torch.nn.Module) -> SharedExpert | None:
    """Find the shared expert that goes with an experts module, and wrap it; None where there is none.

    It stands beside the experts in their block, or beside the block in the decoder layer.
    """
    name = next(name for name, module in model.named_modules() if module is experts)
    block = model.get_submodule(name.rpartition(".")[0])
    layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    for parent in (block, layer):
        for wanted in NAMES:
            module = getattr(parent, wanted, None)
            if isinstance(module, torch.nn.Module):
                return _wrap(module, block)
    return None


def _wrap(module: torch.nn.Module, block: torch.nn.Module) -> SharedExpert:
    shared = SharedExpert(module, module.forward)
    module.forward = shared.forward

    def note_input(block: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        shared.block_input = inputs[0] if inputs and isinstance(inputs[0], torch.Tensor) else None

    block.register_forward_pre_hook(note_input)
    return shared

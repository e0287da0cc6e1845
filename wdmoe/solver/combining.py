"""Replies of the devices -> one layer output. Types and contracts stand in `_native.pyi`, the code in C++."""

from wdmoe.solver._native import combine, combine_partials, is_finite

__all__ = ["combine", "combine_partials", "is_finite"]

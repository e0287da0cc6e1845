"""Experts of each token -> work of each device, and back: replies of the devices -> one layer output.

Types and contracts stand in `_native.pyi`, the code in C++.
"""

from wdmoe.solver._native import (
    DeviceWork,
    Groups,
    combine,
    combine_partials,
    group_by_device,
    is_finite,
    odd_row,
    weighted_sum,
)

__all__ = [
    "DeviceWork",
    "Groups",
    "combine",
    "combine_partials",
    "group_by_device",
    "is_finite",
    "odd_row",
    "weighted_sum",
]

"""Experts of each token -> work of each device. Contracts stand in `_native.pyi`, the code in C++."""

from wdmoe.solver._native import DeviceWork, Groups, group_by_device

__all__ = ["DeviceWork", "Groups", "group_by_device"]

"""Arrays in, arrays out: expert selection, bandwidth, grouping and combining for any program that has NumPy.

This face is for programs outside wdmoe; inside, modules import each other directly.
"""

from wdmoe.solver.bandwidth import Allocation, Links, allocate_bandwidth, allocate_bandwidth_many
from wdmoe.solver.bottleneck import shed_bottleneck
from wdmoe.solver.budget import BudgetChoice, select_at_most_dropped, select_within_budget
from wdmoe.solver.combining import DeviceWork, Groups, combine, combine_partials, group_by_device, is_finite
from wdmoe.solver.placement.exact import place_exactly
from wdmoe.solver.placement.greedy import place_greedily
from wdmoe.solver.placement.live import place_experts
from wdmoe.solver.placement.problem import PlacementProblem, Plan
from wdmoe.solver.replicas import choose_copies
from wdmoe.solver.selection import Choice, prune_experts, select_experts
from wdmoe.solver.substitution import replace_far

__all__ = [
    "Allocation",
    "BudgetChoice",
    "Choice",
    "DeviceWork",
    "Groups",
    "Links",
    "PlacementProblem",
    "Plan",
    "allocate_bandwidth",
    "allocate_bandwidth_many",
    "choose_copies",
    "combine",
    "combine_partials",
    "group_by_device",
    "is_finite",
    "place_exactly",
    "place_experts",
    "place_greedily",
    "prune_experts",
    "replace_far",
    "select_at_most_dropped",
    "select_experts",
    "select_within_budget",
    "shed_bottleneck",
]

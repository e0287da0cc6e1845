"""Arrays in, arrays out: expert selection, bandwidth, grouping and combining for any program that has NumPy.

This face is for programs outside wdmoe; inside, modules import each other directly.
"""

from wdmoe.solver.bandwidth import Allocation, Links, allocate_bandwidth, allocate_bandwidth_many
from wdmoe.solver.bottleneck import shed_bottleneck
from wdmoe.solver.budget import BudgetChoice, select_at_most_dropped, select_within_budget
from wdmoe.solver.combining import combine, combine_partials, is_finite
from wdmoe.solver.copies import choose_copies
from wdmoe.solver.grouping import DeviceWork, Groups, group_by_device
from wdmoe.solver.placing.exact import place_exactly
from wdmoe.solver.placing.greedy import place_greedily
from wdmoe.solver.placing.live import place_experts
from wdmoe.solver.placing.plan import PlacementProblem, Plan
from wdmoe.solver.replacing import replace_far
from wdmoe.solver.selection import Choice, prune_experts, select_experts

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

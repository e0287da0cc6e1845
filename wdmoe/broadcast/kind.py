"""How results of the broadcast evaluation say what they are, without importing what they need."""

RESULTS_KIND = "wdmoe broadcast results"
LOSSES_KIND = "wdmoe broadcast losses"

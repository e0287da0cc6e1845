"""How results of a simulation say what they are, without importing what they need."""

RESULTS_KIND = "wdmoe simulation results"

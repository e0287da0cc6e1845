"""`python -m wdmoe`: the same as `wdmoe-node`, for where the script is not on the path."""

from wdmoe.cli.main import main

main()

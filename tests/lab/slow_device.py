"""A real device, but for the time that it sleeps before each answer: how long, a file says, read anew for each.

python -c "from tests.lab.slow_device import main; main()" FILE device --join TOKEN
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from wdmoe.arrays import AnyArray
from wdmoe.moe.expert import ExpertRunner
from wdmoe.transport.codec.messages import Run

COMMAND = [sys.executable, "-c", "from tests.lab.slow_device import main; main()"]  # in the checkout


class Delay:
    """Written by a test, read by its device."""

    def __init__(self, file: Path, seconds: float = 0.0) -> None:
        self.file = file
        self.set(seconds)

    def set(self, seconds: float) -> None:
        draft = self.file.with_suffix(".draft")
        draft.write_text(str(seconds))
        draft.replace(self.file)  # at once: the device may be reading


def main() -> None:
    from wdmoe.cli.main import main as wdmoe_node

    file = Path(sys.argv.pop(1))
    run = ExpertRunner.run

    def slow_run(self: ExpertRunner, message: Run) -> AnyArray:
        time.sleep(float(file.read_text()))
        return run(self, message)

    ExpertRunner.run = slow_run  # type: ignore[method-assign, assignment]
    wdmoe_node()

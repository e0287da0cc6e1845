"""Runs shell blocks of the pages as a reader would: in one folder, base station and devices in terminals of their own.

The commands stay as they stand in the page, except for what `SUBSTITUTES` says.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.docs.pages import ROOT, Block

PATIENCE_S = 240.0
READY = {"bs": "HTTP: ", "device": "joined "}  # what each says once it serves
LONG_RUNNING = re.compile(r"(?:[A-Z_]+=\S+ )*wdmoe-node (bs|device)\b(?!.*--help)")


class Terminal:
    """One command that runs until it is stopped."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], log: Path) -> None:
        self.command, self.log = command, log
        with log.open("wb") as out:
            words = ["bash", "-c", f"exec {command}"]
            self.process = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=out)

    def wait_for(self, said: str) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while said not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise AssertionError(f"{self.command}: no {said!r} in\n{self.log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """As Ctrl-C does. It must end well."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(PATIENCE_S)
        log = self.log.read_text()
        assert code == 0, f"{self.command}: exit code {code}\n{log}"
        assert "Traceback" not in log, log

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


class Reader:
    """Somebody who reads the pages and types what they say, on machines of their own."""

    def __init__(self, folder: Path, control_port: int, http_port: int, default_model: bool = False) -> None:
        self.folder = folder
        self.terminals: list[Terminal] = []
        self.http = f"127.0.0.1:{http_port}"
        self._control = f"tcp://127.0.0.1:{control_port}"
        self._default_model = default_model  # whether `default` is the real one, and not the folder `default`
        self._machines = 0
        self._prepare()

    def _prepare(self) -> None:
        """The command of this checkout on the PATH, and the repository's own files where a page expects them."""
        (self.folder / "bin").mkdir(parents=True)
        command = self.folder / "bin" / "wdmoe-node"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wdmoe "$@"\n')
        command.chmod(0o755)
        for name in ("docs", "tools"):
            (self.folder / name).symlink_to(ROOT / name)

    def substitutes(self) -> list[tuple[str, str]]:
        """Free ports in place of the usual ones, a tiny model in place of the default one, short runs."""
        model = "default" if self._default_model else "./default"
        return [
            (r"\b(?:localhost|127\.0\.0\.1):8080\b", self.http),
            (r"(wdmoe-node bs) default\b", rf"\1 {model} --bind {self._control} --http {self.http}"),
            (r"(wdmoe-node token)(?= >)", rf"\1 create --endpoint {self._control}"),
            (r"(wdmoe-node status)\b", rf"\1 --url http://{self.http}"),
            (r"(wdmoe-node simulate \S+)", r"\1 --draws 1 --workers 1"),
            (r"(wdmoe-node verify .*--draws) \d+", r"\1 1"),
        ]

    def run(self, block: Block) -> str:
        """Type the block's commands one after the other; gives what the short ones printed.

        Raises:
            AssertionError: a command fails, or does not get ready.
        """
        printed = []
        for command in block.commands():
            if command.startswith("pip install"):  # `test_extras_that_pip_installs_exist` looks at these
                command = command.partition("&&")[2].strip() if "wdmoe-node" in command else ""
            for pattern, by in self.substitutes():
                command = re.sub(pattern, by, command)
            if found := LONG_RUNNING.match(command):
                self._start(command, found[1])
            elif command:
                printed.append(self._do(command))
        return "".join(printed)

    def stop(self, count: int = 0) -> None:
        """End the newest terminals down to `count`, newest first, each as Ctrl-C does."""
        while len(self.terminals) > count:
            self.terminals.pop().stop()

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.close()

    def environment(self) -> dict[str, str]:
        state, cache = self.folder / f"machine{self._machines}", self.folder / "cache"
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        mine = {"PATH": path, "XDG_STATE_HOME": str(state), "PYTHONPATH": str(ROOT)}
        mine |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **mine, **({} if self._default_model else {"XDG_CACHE_HOME": str(cache)})}

    def _start(self, command: str, kind: str) -> None:
        """A device is a machine of its own: it has its own key."""
        self._machines = self._machines + 1 if kind == "device" else 0
        log = self.folder / f"{len(self.terminals)}-{kind}.log"
        terminal = Terminal(command, self.folder, self.environment(), log)
        self.terminals.append(terminal)
        terminal.wait_for(READY[kind])
        if kind == "bs" and (found := re.search(r"The join token lies in (\S+)\. ", log.read_text())):
            shutil.copy(found[1], self.folder / "token.txt")

    def _do(self, command: str) -> str:
        self._machines, before = 0, self._machines
        words = ["bash", "-e", "-o", "pipefail", "-c", command]
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        self._machines = before
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

"""The join token that a station keeps ready: in a file that only its owner reads, replaced when it no longer serves."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from wdmoe.errors import ConfigError
from wdmoe.tasks import in_thread
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.join_tokens import parse_token
from wdmoe.transport.security.keys import KeyPair, write_private_text

log = logging.getLogger(__name__)

LIFE_S = 24 * 3600.0
LEAST_LEFT_S = LIFE_S / 10  # with less it is replaced, so that who copies it has time to use it
LOOK_S = 2.0


class JoinTokenFile:
    """One file. What an earlier run left in it is used on while it serves: a restart makes no token void or in vain."""

    def __init__(
        self, path: Path, admission: Admission, keys: KeyPair, endpoints: tuple[str, ...], uses: int | None
    ) -> None:
        """Makes nothing until `renew`. `uses`: devices that may join by one token; None: as many as come."""
        self.path = path
        self._admission = admission
        self._keys = keys
        self._endpoints = endpoints
        self._uses = uses
        self._text = ""
        self._written = False

    def renew(self) -> str:
        """See to it that the file holds a token that serves. Blocking.

        Returns:
            That token.
        Raises:
            ConfigError: the file or the list of tokens cannot be written.
        """
        if not self._serves(self._text):
            left = self._left_behind()
            self._written = self._serves(left)
            self._text = left if self._written else self._fresh()
        if not self._written or not self.path.exists():
            try:
                write_private_text(self.path, f"{self._text}\n")
            except OSError as error:
                raise ConfigError(f"join token file {self.path}: {error.strerror or error}") from error
            self._written = True
        return self._text

    async def keep(self) -> None:
        """Renew it as it becomes necessary, until cancelled. What fails is logged once, and tried again."""
        failed = ""
        while True:
            try:
                await in_thread(self.renew)
                failed = ""
            except ConfigError as error:
                if str(error) != failed:
                    log.warning("%s: new devices need a token of `wdmoe-node token`", error)
                failed = str(error)
            await asyncio.sleep(LOOK_S)

    def _fresh(self) -> str:
        return self._admission.create_token(self._keys, self._endpoints, LIFE_S, self._uses).text()

    def _left_behind(self) -> str:
        """What the file holds; "" where it cannot be read, or others may read it too."""
        try:
            with self.path.open(encoding="ascii") as file:
                return "" if os.fstat(file.fileno()).st_mode & 0o077 else file.read().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _serves(self, text: str) -> bool:
        try:
            token = parse_token(text)
        except ConfigError:
            return False
        if (token.endpoints, token.server_key) != (self._endpoints, self._keys.public):
            return False
        return self._admission.life_left_s(token.enrolment.public) > LEAST_LEFT_S

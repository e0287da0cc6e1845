"""Who a session belongs to: a proven key from the allow list, or, without encryption, whoever says hello."""

from __future__ import annotations

from typing import Protocol

from wdmoe.transport.channel import Envelope
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import fingerprint


class Authentication(Protocol):
    """What the control plane asks about keys."""

    def identify(self, envelope: Envelope, session: int) -> str:
        """The key a session is filed under."""
        ...

    def device_id(self, key: str) -> str:
        """Name of a key for people."""
        ...

    def is_enrolment(self, key: str) -> bool:
        """The key of a join token: it may do nothing but ask for another key to be admitted."""
        ...

    def is_revoked(self, key: str) -> bool:
        """Shut out. That a key is merely not on the list, or the list cannot be read, is not that."""
        ...

    def enrol(self, enrolment_key: str, device_key: str, name: str) -> None:
        """Admit a device's key from now on.

        Raises:
            RefusedError: the token has expired or is used up, or the key is not one.
            ConfigError: the station cannot do it now.
        """
        ...


class CurveAuthentication:
    """CURVE: a session belongs to the key that the handshake proved."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def identify(self, envelope: Envelope, session: int) -> str:
        """See `Authentication`."""
        return envelope.key

    def device_id(self, key: str) -> str:
        """See `Authentication`."""
        return fingerprint(key)

    def is_enrolment(self, key: str) -> bool:
        """See `Authentication`."""
        return self._admission.kind_of(key) == "enrolment"

    def is_revoked(self, key: str) -> bool:
        """See `Authentication`."""
        return self._admission.kind_of(key) == "revoked"

    def enrol(self, enrolment_key: str, device_key: str, name: str) -> None:
        """See `Authentication`."""
        self._admission.enrol(enrolment_key, device_key, name)


class NoAuthentication:
    """No encryption, nothing proven: every session is its own key. For laboratories only."""

    def identify(self, envelope: Envelope, session: int) -> str:
        """See `Authentication`."""
        return f"session-{session:016x}"

    def device_id(self, key: str) -> str:
        """See `Authentication`."""
        return fingerprint(key)  # a Welcome carries nothing else

    def is_enrolment(self, key: str) -> bool:
        """See `Authentication`."""
        return False

    def is_revoked(self, key: str) -> bool:
        """See `Authentication`."""
        return False

    def enrol(self, enrolment_key: str, device_key: str, name: str) -> None:
        """Nothing to do: everybody is in already."""

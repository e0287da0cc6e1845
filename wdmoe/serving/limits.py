"""What one HTTP client may ask for at most."""

from __future__ import annotations

from dataclasses import dataclass

from wdmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """Bounds on the HTTP face. The engine has its own on requests that are computed and queued at once."""

    body_bytes: int = 4 << 20
    connections: int = 256  # open at the same time; more are answered 503 at once
    prompts: int = 32  # in one completion request
    parallel_prompts: int = 4  # of one request, computed at the same time
    chat_tokens: int = 512  # answer length of a chat request that states none
    drain_s: float = 5.0  # how long running answers may go on after the server was told to stop

    def __post_init__(self) -> None:
        for name in ("body_bytes", "connections", "prompts", "parallel_prompts", "chat_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serving.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.drain_s < 3600:
            raise ConfigError(f"serving.drain_s must lie between 0 and 3600, got {self.drain_s}")

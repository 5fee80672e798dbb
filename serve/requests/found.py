"""Found: what was found of a request before it came here, by a router or a gateway."""

from dataclasses import dataclass
from typing import Any

from serve.requests.begun import Begun


@dataclass(frozen=True)
class Routed:
    """What a router chose for a request: `chosen` is the reference of an adapter, or the base's name."""

    router: str
    chosen: str
    confidence: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As the log has it."""
        return {"router": self.router, "routed": self.chosen, "confidence": round(self.confidence, 4),
                "route_reason": self.reason}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a gateway found of a request before it sent it here.

    versions    what its model's name means, None: not known
    routed      what a router chose for it, if one was asked
    is_asking   the gateway asks which adapter the router chooses, to send the request where that one is
    begun       what makes the answer the same on another replica, and how far it has come there
    """

    versions: str | None = None
    routed: Routed | None = None
    is_asking: bool = False
    begun: Begun | None = None


NOTHING = Found()

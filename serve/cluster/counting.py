"""Limits of keys over all gateways, counted by one actor of Ray: none admits what another has admitted already."""

import ray
from ray.exceptions import RayError

from serve.errors import LimitsAway
from serve.limits import Bounds, Counts, Lease, Refusal

NAME, NAMESPACE = "qhub-limits", "qhub"


class Counter:
    """The one that counts. As an actor it takes one call after the other, so none is counted twice."""

    def __init__(self) -> None:
        self._counts = Counts()

    def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        return self._counts.admit(key, bounds)

    def release(self, lease: Lease, ran: bool) -> None:
        """See Limits."""
        self._counts.release(lease, ran=ran)


class ActorLimits:
    """The limits of all gateways of a cluster. When the actor is started again, it begins to count anew."""

    def __init__(self) -> None:
        self._actor = (
            ray.remote(Counter)
            .options(
                name=NAME, namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1, lifetime="detached"
            )
            .remote()
        )

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        try:
            found: Lease | Refusal = await self._actor.admit.remote(key, bounds)
        except RayError:
            raise LimitsAway("who counts the requests of all gateways does not answer: ask again") from None
        return found

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits."""
        self._actor.release.remote(lease, ran)  # nobody waits for it

    async def close(self) -> None:
        """See Limits."""

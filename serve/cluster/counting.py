"""Limits of keys over all gateways, counted by one actor of Ray: none admits what another has admitted already."""

import asyncio
import contextlib
import uuid
from collections import defaultdict
from time import monotonic

import ray
from ray.exceptions import RayError

from serve.errors import LimitsAway
from serve.limits import Bounds, Counts, Lease, Refusal

NAME, NAMESPACE = "qhub-limits", "qhub"
RENEW_SECONDS = 5.0  # between a gateway's signs of life
GONE_SECONDS = 30.0  # without one, after which what it had running counts no more


class Counter:
    """The one that counts. As an actor it takes one call after the other, so none is counted twice.

    A gateway that was killed counts nothing out: what it had running is taken back when it has been silent for long.
    """

    def __init__(self) -> None:
        self._counts = Counts()
        self._seen: dict[str, float] = {}  # gateway -> when it was heard of
        self._out: defaultdict[str, dict[str, Lease]] = defaultdict(dict)  # gateway -> what it has running

    def admit(self, gateway: str, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        self.renew(gateway)
        answer = self._counts.admit(key, bounds)
        if isinstance(answer, Lease):
            self._out[gateway][answer.id] = answer
        return answer

    def release(self, gateway: str, lease: Lease, ran: bool) -> None:
        """See Limits."""
        self._out[gateway].pop(lease.id, None)
        self._counts.release(lease, ran=ran)

    def renew(self, gateway: str) -> None:
        """A gateway lives; take back what those that do not had running."""
        now = monotonic()
        self._seen[gateway] = now
        for gone in [name for name, seen in self._seen.items() if seen < now - GONE_SECONDS]:
            del self._seen[gone]
            for lease in self._out.pop(gone, {}).values():
                self._counts.release(lease, ran=True)


class ActorLimits:
    """The limits of all gateways of a cluster. If the actor is started again, it starts counting from zero."""

    def __init__(self) -> None:
        self._gateway = uuid.uuid4().hex
        self._renewing: asyncio.Task[None] | None = None
        options = {"name": NAME, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
        self._actor = ray.remote(Counter).options(num_cpus=0, max_restarts=-1, **options).remote()

    async def admit(self, key: str, bounds: Bounds) -> Lease | Refusal:
        """See Limits."""
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        try:
            found: Lease | Refusal = await self._actor.admit.remote(self._gateway, key, bounds)
        except RayError:
            raise LimitsAway("the process that counts requests for all gateways does not answer: try again") from None
        return found

    async def release(self, lease: Lease, *, ran: bool) -> None:
        """See Limits."""
        self._actor.release.remote(self._gateway, lease, ran)  # nobody waits for it

    async def close(self) -> None:
        """See Limits."""
        if self._renewing is not None:
            self._renewing.cancel()

    async def _renew(self) -> None:
        while True:
            with contextlib.suppress(RayError):
                await self._actor.renew.remote(self._gateway)
            await asyncio.sleep(RENEW_SECONDS)

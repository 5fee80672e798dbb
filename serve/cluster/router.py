"""The router of Ray Serve that puts requests where `placement` says. Ray asks it in the gateway's process."""

from collections.abc import Mapping
from types import MappingProxyType

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.cluster.call import Call
from serve.cluster.placement import Placement


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Asks replicas in the order of their tiers; Ray skips those that have as many requests as they may."""

    # what `_by_name` and `_placement` are of: it is held, so that no other list can be taken for it
    _candidates: list[RunningReplica] | None = None
    _by_name: Mapping[str, RunningReplica] = MappingProxyType({})
    _placement = Placement(())

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See RequestRouter."""
        if self._candidates is not candidate_replicas or len(self._by_name) != len(candidate_replicas):
            self._candidates = candidate_replicas  # Ray makes another list whenever one comes or goes
            self._by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            if self._by_name.keys() != set(self._placement.names):
                self._placement = Placement(self._by_name)
        call = (
            next((each for each in pending_request.args if isinstance(each, Call)), None) if pending_request else None
        )
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # once all have been asked, wait before the next round
            )
        order = self._placement.tiers(call.affinity, call.avoid) if call is not None else self._placement.tiers(None)
        return [[self._by_name[name] for name in tier] for tier in order]

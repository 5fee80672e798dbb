"""The router of Ray Serve that puts requests where `placement` says. Ray asks it in the gateway's process."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.cluster.call import Call
from serve.cluster.placement import tiers


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Asks replicas in the order of their tiers; Ray skips those that have as many requests as they may."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See RequestRouter."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = (
            next((each for each in pending_request.args if isinstance(each, Call)), None) if pending_request else None
        )
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # once all have been asked, wait before the next round
            )
        order = tiers(call.affinity, by_name, call.avoid) if call is not None else tiers(None, by_name)
        return [[by_name[name] for name in tier] for tier in order]

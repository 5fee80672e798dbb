"""Feedback on answers that were logged."""

from typing import Any

from fastapi import FastAPI, Request

from adapterhub_local.errors import NotFound
from serve.access import Scope, access
from serve.http.front import key_of
from serve.log.log import NO_LOG
from serve.requests.feedback import FeedbackRequest
from serve.requests.metadata import check_metadata
from serve.services import Services


def add_feedback(app: FastAPI, services: Services) -> None:
    """Add /v1/feedback."""

    @app.post("/v1/feedback")
    @access(Scope.INFER, counted=True)
    async def feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
        """Rate or correct an answer that was logged, in the file of the log before this is answered."""
        if services.log is None:
            raise NotFound(NO_LOG)
        check_metadata(body.metadata)
        state = request.scope["state"]
        key = key_of(request)
        owner = key.id if key is not None else None
        given = body.model_dump(include={"id", "choice", "rating", "comment", "metadata"})
        given |= {"correction": body.corrected, "request_id": state["request_id"]}
        await services.log.rate(owner, given)
        return {"id": body.id, "object": "feedback", "choice": body.choice or 0, "rating": body.rating,
                "is_corrected": body.correction is not None}  # fmt: skip

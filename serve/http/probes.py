"""The endpoints whose answers are not text: embeddings, and the scores of given answers."""

from fastapi import FastAPI, Request, Response

from serve.access import Scope, access
from serve.answers.probes import embeddings, scores
from serve.errors import BadParameter
from serve.http.respond import respond_whole
from serve.requests.probes import EmbeddingsRequest, ScoreRequest
from serve.service import Service


def add_probes(app: FastAPI, service: Service) -> None:
    """Add /v1/embeddings and /v1/score."""
    size = service.base.model.get_input_embeddings().weight.shape[1]

    @app.post("/v1/embeddings")
    @access(Scope.INFER, counted=True)
    async def embed(body: EmbeddingsRequest, request: Request) -> Response:
        """Vectors of texts: the base's or an adapter's last hidden states, put together."""
        if body.dimensions not in (None, size):
            message = f"vectors of this base have {size} dimensions, and shorter ones would differ: leave it out"
            raise BadParameter(message, "dimensions")
        return await respond_whole(service, body, request, lambda target, found: embeddings(target, found, body))

    @app.post("/v1/score")
    @access(Scope.INFER, counted=True)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How likely each of some answers is; what stands before them is computed once."""
        return await respond_whole(service, body, request, lambda target, found: scores(target, found, body))

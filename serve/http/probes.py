"""The endpoints whose answers are not text: embeddings, and the scores of given answers."""

from fastapi import FastAPI, Request, Response

from serve.access import Scope, access
from serve.answers.probes import embeddings, scores
from serve.errors import BadParameter
from serve.http.front import key_of
from serve.http.respond import respond_whole
from serve.requests.probes import EmbeddingsRequest, ScoreRequest
from serve.services import Services


def add_probes(app: FastAPI, services: Services) -> None:
    """Add /v1/embeddings and /v1/score."""

    @app.post("/v1/embeddings")
    @access(Scope.INFER, counted=True)
    async def embed(body: EmbeddingsRequest, request: Request) -> Response:
        """Vectors of texts: the base's or an adapter's last hidden states, put together."""
        service = await services.of(body.model, key_of(request))
        size = service.base.model.get_input_embeddings().weight.shape[1]
        if body.dimensions not in (None, size):
            message = f"vectors of this base have {size} dimensions, and shorter ones would differ: leave it out"
            raise BadParameter(message, "dimensions")
        return await respond_whole(service, body, request, lambda target, found: embeddings(target, found, body))

    @app.post("/v1/score")
    @access(Scope.INFER, counted=True)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How likely each of some answers is; what stands before them is computed once."""
        service = await services.of(body.model, key_of(request))
        return await respond_whole(service, body, request, lambda target, found: scores(target, found, body))

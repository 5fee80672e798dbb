"""The endpoints that Anthropic's clients ask, over the same engine."""

from typing import Any

from fastapi import FastAPI, Request, Response

from serve.access import Scope, access
from serve.answers.anthropic import BlockAnswer
from serve.http.front import key_of
from serve.http.translate import answer, read
from serve.requests.anthropic import NAMES, AnthropicRequest, CountRequest
from serve.services import Services


def add_anthropic(app: FastAPI, services: Services) -> None:
    """Add /v1/messages and /v1/messages/count_tokens."""

    @app.post("/v1/messages")
    @access(Scope.INFER, counted=True)
    async def messages(body: AnthropicRequest, request: Request) -> Response:
        """Answer a conversation in Anthropic's way."""
        return await answer(await services.of(body.model, key_of(request)), body.chat, request, BlockAnswer, NAMES)

    @app.post("/v1/messages/count_tokens")
    @access(Scope.INFER, counted=True)
    def count(body: CountRequest, request: Request) -> dict[str, Any]:
        """How many tokens the prompt of such a request has."""
        key = key_of(request)
        return {"input_tokens": services.of_now(body.model, key).count_tokens(read(body.chat), key)}

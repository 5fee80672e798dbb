"""Responses: OpenAI's Responses API over the same engine, with the answers that are stored."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from serve.access import Scope, access
from serve.answers.items import ItemAnswer
from serve.answers.stored import Shelf
from serve.errors import BadParameter
from serve.http.front import key_of
from serve.http.translate import answer, read
from serve.requests.responses import NAMES, ResponsesRequest
from serve.services import Services


def add_responses(app: FastAPI, services: Services) -> None:
    """Add /v1/responses and what is stored below it."""

    @app.post("/v1/responses")
    @access(Scope.INFER, counted=True)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, as OpenAI's Responses API does."""
        service, shelf = await services.of(body.model, key_of(request)), _shelf(services, request)
        conversation = read(lambda: body.conversation(shelf))
        keep = shelf.keeper(body, conversation)
        convert = partial(body.chat, conversation)
        return await answer(service, convert, request, lambda chat: ItemAnswer(chat, body, keep), NAMES)

    @app.get("/v1/responses/{response_id}")
    @access(Scope.INFER)
    def stored(response_id: str, request: Request, stream: bool = False) -> dict[str, Any]:
        """An answer that is stored."""
        if stream:
            raise BadParameter(
                "an answer that is stored is complete, and is not streamed again: leave it out", "stream"
            )
        return _shelf(services, request).find(response_id).response

    @app.delete("/v1/responses/{response_id}")
    @access(Scope.INFER)
    def forget(response_id: str, request: Request) -> dict[str, Any]:
        """Store an answer no longer."""
        _shelf(services, request).forget(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.get("/v1/responses/{response_id}/input_items")
    @access(Scope.INFER)
    def answered(
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """The items that a stored answer answered, a page of them; `after` is the last id of the page before."""
        items = list(_shelf(services, request).find(response_id).answered)
        if order == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise BadParameter(f"'{after[:80]}' is not an item that was answered", "after")
        begin = ids.index(after) + 1 if after is not None else 0
        page = items[begin : begin + limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        has_more = begin + limit < len(items)
        return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more}


def _shelf(services: Services, request: Request) -> Shelf:
    key = key_of(request)
    return services.first.stored.shelf(key.id if key is not None else None)

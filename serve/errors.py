"""The server's own errors, and the one place that maps every error to a status and an OpenAI error body."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_local.errors import Incompatible, InputError, InUse, NotFound, QhubError, RemoteError

MAX_MESSAGE = 4000  # characters: what it quotes of a request can be as long as the request

# what Anthropic calls the errors of a status
ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Busy(QhubError):
    """There is no room for the request now; it may be sent again later."""


class Throttled(Busy):
    """A key's limit is reached; `seconds` later there is room again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class LimitsAway(QhubError):
    """Whoever counts the requests of all servers does not answer, so that a limited key cannot be let in."""


class Unauthorized(InputError):
    """The request has no valid key."""


class Forbidden(InputError):
    """The request's key, or the server's configuration, does not allow this."""


class BadFraming(InputError):
    """A request of which it is not clear where it ends."""


class TooLarge(InputError):
    """The body of a request is larger than the server takes."""


class TimedOut(QhubError):
    """A request took longer than the server allows; `status` says who was slow."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelNotFound(NotFound):
    """The `model` of a request names neither the base nor a version in the registry."""


class ContextTooLong(InputError):
    """Prompt and answer do not fit into the context, or into the KV cache; `param` is where the prompt is."""

    param = "messages"


class BadParameter(InputError):
    """A parameter of a request has a value that cannot be used; `param` is its name."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class DeviceLost(QhubError):
    """The GPU failed in a way that only a new process gets over."""


class AdapterUnloaded(QhubError):
    """The adapter of a running request was taken away by force."""


class NoReplica(QhubError):
    """No replica of a cluster could answer a request, which was sent to several."""


class Elsewhere(QhubError):
    """A router chose an adapter for a request, and the gateway that sent it here asked where that belongs.

    `details` is for that gateway alone: nobody else sends such requests.
    """

    def __init__(self, details: Mapping[str, Any]) -> None:
        super().__init__("the adapter that was chosen for this request is asked for where it is")
        self.details = details


class GenerationFailed(QhubError):
    """The model could not continue a request that was admitted."""


class EngineEnded(GenerationFailed):
    """The engine ended before the answer was complete: another one could go on with it."""


@dataclass(frozen=True)
class ErrorBody:
    """An HTTP status and what OpenAI's clients expect beside it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def to_json(self, path: str = "") -> dict[str, Any]:
        """The body, in the form that clients of this path read: OpenAI's, Anthropic's or Ollama's."""
        message = self.message if len(self.message) <= MAX_MESSAGE else f"{self.message[:MAX_MESSAGE]} ..."
        if path.startswith("/api/"):
            return {"error": message, "param": self.param, "code": self.code}
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": message, "param": self.param}}
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def error_body(error: Exception) -> ErrorBody:
    """The body that a client gets for `error`; of an unexpected error no detail is shown."""
    match error:
        case ModelNotFound():
            return ErrorBody(404, str(error), "invalid_request_error", "model", "model_not_found")
        case ContextTooLong():
            return ErrorBody(400, str(error), "invalid_request_error", error.param, "context_length_exceeded")
        case BadParameter():
            return ErrorBody(400, str(error), "invalid_request_error", error.param, error.code)
        case Incompatible():
            return ErrorBody(400, str(error), "invalid_request_error", "model", "adapter_incompatible")
        case Throttled():
            wait = (("Retry-After", str(max(1, math.ceil(error.seconds)))),)
            return ErrorBody(429, str(error), "rate_limit_error", None, "rate_limit_exceeded", wait)
        case Busy():
            return ErrorBody(429, str(error), "rate_limit_error", None, "engine_overloaded", (("Retry-After", "1"),))
        case LimitsAway():
            return ErrorBody(503, str(error), "server_error", None, "limits_unavailable", (("Retry-After", "1"),))
        case NoReplica():
            return ErrorBody(503, str(error), "server_error", None, "no_replica", (("Retry-After", "1"),))
        case Elsewhere():
            return ErrorBody(421, str(error), "server_error", None, "elsewhere")
        case RemoteError():
            return ErrorBody(503, str(error), "server_error", "model", "remote_unavailable", (("Retry-After", "2"),))
        case AdapterUnloaded():
            return ErrorBody(503, str(error), "server_error", "model", "adapter_unloaded", (("Retry-After", "1"),))
        case Unauthorized():
            challenge = (("WWW-Authenticate", "Bearer"),)
            return ErrorBody(401, str(error), "invalid_request_error", None, "invalid_api_key", challenge)
        case Forbidden():
            return ErrorBody(403, str(error), "permission_error", None, "forbidden")
        case TooLarge():
            return ErrorBody(413, str(error), "invalid_request_error", None, "body_too_large")
        case TimedOut():
            return ErrorBody(error.status, str(error), "timeout_error", None, "timeout")
        case NotFound():
            return ErrorBody(404, str(error), "invalid_request_error", None, "not_found")
        case InUse():
            return ErrorBody(409, str(error), "invalid_request_error")
        case InputError():
            return ErrorBody(400, str(error), "invalid_request_error")
        case QhubError():
            return ErrorBody(500, str(error), "server_error")
    return ErrorBody(500, "the server failed to answer this request; its log says why", "server_error")

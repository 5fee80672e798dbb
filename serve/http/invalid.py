"""Invalid: what is wrong with a request that no endpoint accepts, in words with which its sender can fix it."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import ErrorBody

KIND = "invalid_request_error"
# OpenAI's codes for what pydantic finds
CODES = {
    "missing": "missing_required_parameter",
    "unknown": "unknown_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}
WORDS = {"extra_forbidden": "there is no such parameter: leave it out"}  # where pydantic's are about Python
# Endpoints of OpenAI's that clients try, and what to do instead.
ABSENT = {
    "assistants": "Assistants are not served: use /v1/chat/completions",
    "conversations": "conversations are not stored: POST /v1/responses with previous_response_id, or all as input",
    "feedback": "answers are logged, and rated, by `qhub serve --request-log` alone",
    "responses": "stored answers are at /v1/responses/ID of `qhub serve` alone, and none runs in the background",
    "threads": "Assistants are not served: use /v1/chat/completions",
    "images": "this server generates text only",
    "audio": "this server generates text only",
    "batches": "requests that come together run in one batch anyway: send them to /v1/chat/completions",
    "fine_tuning": "adapters are trained by `qhub train`",
}
MAX_ERRORS = 20  # of which the one that went furthest is reported
# as pydantic names the members of a union
_UNION_TAG = re.compile(r".*\[.*|str|int|float|bool|none|constrained-.*|[A-Z]\w+")


def invalid_body(errors: Sequence[Mapping[str, Any]], content_type: str) -> ErrorBody:
    """The first thing that is wrong with a request's body, and the parameter it is about.

    Where several forms were possible, it is that of the form that went furthest.
    """
    errors = errors[:MAX_ERRORS]
    first = errors[0]
    if first["type"] == "json_invalid":
        return ErrorBody(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", KIND)
    top = first["loc"][:2]
    if top == ("body",) and "json" not in content_type:
        return ErrorBody(400, "a body is read with the header 'Content-Type: application/json' only", KIND)
    if top == ("body",) and first["type"] == "model_attributes_type":
        return ErrorBody(400, "the body is not a JSON object", KIND)
    rivals = [error for error in errors if error["loc"][:2] == top]
    # what is too long was not looked at any further; what is known and not supported is reported as such
    deepest = max(rivals, key=lambda error: (error["type"] in ("too_long", "unsupported"), len(_path(error))))
    same = [error for error in rivals if _path(error) == _path(deepest)]
    path, message = (
        _path(deepest),
        ", or: ".join(dict.fromkeys(WORDS.get(error["type"], error["msg"]) for error in same)),
    )
    param = deepest.get("ctx", {}).get("param") or (path[0] if path else None)
    where = ".".join(path) or param
    code = CODES.get(deepest["type"], "invalid_type" if deepest["type"].endswith("_type") else "invalid_value")
    return ErrorBody(400, f"{where}: {message}" if where else message, KIND, param, code)


def unknown_path(method: str, path: str, known: Sequence[str]) -> ErrorBody:
    """What to say of an address that is none."""
    parts = path.strip("/").split("/")
    near = difflib.get_close_matches(path[:200].rstrip("/"), known, n=1, cutoff=0.75)
    absent = ABSENT.get(parts[1] if parts[0] == "v1" and len(parts) > 1 else parts[0])
    hint = absent or (f"did you mean {near[0]}?" if near else "GET / lists what there is")
    return ErrorBody(404, f"there is no {method} {path[:200]}: {hint}", KIND, None, "unknown_url")


def _path(error: Mapping[str, Any]) -> list[str]:
    """Where in the body an error is, as its sender sees it."""
    return [str(part)[:80] for part in error["loc"][1:] if not (isinstance(part, str) and _UNION_TAG.fullmatch(part))]

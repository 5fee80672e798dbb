"""Rows that are requests to other services, in files of their batches and fine-tuning: each as a row of messages.

What holds a whole conversation is read: the body of a request whose last turn is the assistant's, a request beside the
answer that it got, preferences. What holds half of one is refused by its name. Columns beside are kept, those of a
request as `body.model`, so that they are named as unused.
"""

from collections.abc import Mapping
from typing import Any

from adapterhub_local.data.chat import TOOLS
from adapterhub_local.data.columns import PAIRS
from adapterhub_local.data.gemini import candidate_of, gemini_row, is_gemini
from adapterhub_local.data.json_text import parsed
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.schema import Data

BODIES = ("body", "params", "request")  # OpenAI's, Anthropic's, Gemini's and those of logs
PREFERRED = ("input", "preferred_output", "non_preferred_output")
_ROW_OF_ITS_OWN = frozenset(("messages", "conversations", "instruction", "text", "chosen"))  # what is beside is unused
_CUT = ("length", "content_filter", "max_tokens", "refusal")  # why an answer is not whole
_JOIN = (
    "put the request of the same custom_id (OpenAI's `body`, Anthropic's `params`) into the row of its answer, and "
    "both are read together"
)


def as_messages(row: Any, where: str, data: Data | None = None) -> Any:
    """The row with `messages`, or `prompt`, `chosen` and `rejected`; as it is if it is no request to a service, or the
    recipe says what its columns are. Raises BadData for what holds no whole conversation."""
    if not isinstance(row, Mapping) or (data and data.prompt is not None):
        return row
    if data and data.columns and set(data.columns.values()) & {*PREFERRED, *BODIES, "contents", "response", "result"}:
        return row
    if set(PREFERRED) <= row.keys():
        return _preference(row, where)
    if is_gemini(row):
        return gemini_row(row, where)
    if _ROW_OF_ITS_OWN & row.keys() or any({left, right} <= row.keys() for left, right in PAIRS):
        return row
    name = next((name for name in BODIES if _is_request(parsed(row.get(name)))), None)
    if name is None:
        _check_answer_alone(row, where)
        return row
    body = parsed(row[name])
    answer = _answer(row, where)
    if is_gemini(body):
        beside = {key: value for key, value in row.items() if key not in (name, "response")}
        return gemini_row({**body, **beside}, where, answer)
    messages = _messages(body, row, where)
    if answer is not None:
        messages = [*messages, answer]
    elif not messages or not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
        raise BadData(f"{where}: a request of a batch file, and its answer is in the batch's output file: {_JOIN}")
    rest = {key: value for key, value in row.items() if key not in (name, "response", "result")}
    inner = {f"{name}.{key}": value for key, value in body.items() if key not in ("messages", "system", *TOOLS)}
    tools = {key: body[key] for key in TOOLS if key in body}
    return {**rest, **inner, **tools, "messages": messages}


def _is_request(body: Any) -> bool:
    return isinstance(body, Mapping) and bool({"messages", "contents", "prompt", "input"} & body.keys())


def _messages(body: Mapping[str, Any], row: Mapping[str, Any], where: str) -> list[Any]:
    if "messages" not in body:
        url = row.get("url") or ("/v1/responses" if "input" in body else "/v1/completions")
        raise BadData(
            f"{where}: a request to {str(url)[:60]}: of batch files those with messages (/v1/chat/completions) are "
            "read; write prompt and completion, or messages, of the others"
        )
    messages = parsed(body["messages"])
    if not isinstance(messages, list):
        raise BadData(f"{where}: the messages of the request are not a list")
    system = body.get("system")  # Anthropic's: a text, or parts
    return [{"role": "system", "content": system}, *messages] if system else messages


def _answer(row: Mapping[str, Any], where: str) -> Any:
    """The message that a request got as its answer, None if the row has none. Raises BadData if it failed."""
    response, result = parsed(row.get("response")), parsed(row.get("result"))
    if isinstance(result, Mapping):  # Anthropic's
        if result.get("type", "succeeded") != "succeeded" or not isinstance(result.get("message"), Mapping):
            raise BadData(f"{where}: the request has no answer, it {str(result.get('type'))[:40]}: leave the row out")
        message = result["message"]
        _check_whole(message.get("stop_reason"), where)
        return {"role": "assistant", "content": message.get("content")}
    if row.get("error") and not isinstance(response, Mapping):
        raise BadData(f"{where}: the request failed, and has no answer: leave the row out")
    if not isinstance(response, Mapping):
        return None
    status = response.get("status_code", 200)
    if status != 200 or row.get("error"):
        raise BadData(f"{where}: the request failed (status {status!r:.20}), and has no answer: leave the row out")
    body = parsed(response.get("body", response))
    if isinstance(body, Mapping) and "candidates" in body:
        return candidate_of(body, where)
    return answer_of(body.get("choices") if isinstance(body, Mapping) else None, where)


def answer_of(choices: Any, where: str) -> Any:
    """The message of the one choice of a response. Raises BadData for none, several or a cut one."""
    choices = parsed(choices)
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise BadData(f"{where}: the response holds no choices with a message: leave the row out")
    if len(choices) > 1:
        raise BadData(f"{where}: the request got {len(choices)} choices: give each a row of its own, or keep one")
    _check_whole(choices[0].get("finish_reason"), where)
    return choices[0].get("message")


def _check_whole(reason: Any, where: str) -> None:
    if reason in _CUT:
        raise BadData(
            f"{where}: the answer is not whole (it ended by '{reason}'), and would be learned with an end: leave it out"
        )


def _check_answer_alone(row: Mapping[str, Any], where: str) -> None:
    """Raise BadData for a line of a batch's output, which lacks what was asked."""
    response, result = parsed(row.get("response")), parsed(row.get("result"))
    is_openai = isinstance(response, Mapping) and bool({"body", "status_code", "candidates"} & response.keys())
    is_anthropic = isinstance(result, Mapping) and "custom_id" in row
    if is_openai or is_anthropic or ("custom_id" in row and "response" in row):
        raise BadData(f"{where}: a line of a batch's output, which has the answer without what was asked: {_JOIN}")


def _preference(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """OpenAI's preference fine-tuning: two answers to one request."""
    asked, chosen, rejected = (parsed(row[name]) for name in PREFERRED)
    if not isinstance(asked, Mapping) or "messages" not in asked:
        raise BadData(f'{where}: write {{"input": {{"messages": [...]}}, "preferred_output": [...], ...}}')
    rest = {key: value for key, value in row.items() if key not in PREFERRED}
    inner = {f"input.{key}": value for key, value in asked.items() if key not in ("messages", *TOOLS)}
    tools = {key: asked[key] for key in TOOLS if key in asked}
    return {**rest, **inner, **tools, "prompt": asked["messages"], "chosen": chosen, "rejected": rejected}

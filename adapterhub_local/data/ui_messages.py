"""Messages as the Vercel AI SDK keeps them for its pages (`UIMessage`, of `parts`), as messages of blocks.

As its `convertToModelMessages` does: a message of the assistant holds several steps, each some text, thoughts and
calls, and behind each step stand the results of its calls. What is for the page alone (sources, data) is left out there
and here, since no model sees it. https://ai-sdk.dev/docs/reference/ai-sdk-core/ui-message
"""

from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub_local.data.json_text import parsed
from adapterhub_local.errors import BadData

STEP, OLD_CALL, DYNAMIC = "step-start", "tool-invocation", "dynamic-tool"
FOR_THE_PAGE = ("source", "source-url", "source-document")  # and data-...
CALLED = ("input-available", "approval-requested", "approval-responded", "call")  # states of a call without a result
ANSWERED = ("output-available", "result")
FAILED = "output-error"
KEPT = ("role", "name", "weight")


def spread(message: Any, where: str) -> Iterator[Any]:
    """The messages that one with `parts` stands for; any other as it is. Raises BadData for a part amiss."""
    parts = parsed(message.get("parts")) if isinstance(message, Mapping) else None
    if not isinstance(parts, list) or not parts:
        if isinstance(message, Mapping) and message.get("toolInvocations"):
            raise BadData(f"{where}: a message has toolInvocations without its parts, which say what came first")
        yield message
        return
    if not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts):
        raise BadData(f'{where}: a part of a message is {{"type": "text", "text": ...}}')
    steps: list[list[Mapping[str, Any]]] = [[]]
    for part in parts:
        if part["type"] == STEP:
            steps.append([])
        elif part["type"] not in FOR_THE_PAGE and not part["type"].startswith("data-"):
            steps[-1].append(part)
    if not any(steps):
        raise BadData(f"{where}: a message has no part that a model reads")
    for step in filter(None, steps):
        blocks, results = [], []
        for part in step:
            if not _is_call(part):
                is_old = part["type"] == "reasoning" and "text" not in part
                blocks.append({"type": "reasoning", "text": part.get("reasoning")} if is_old else part)
                continue
            call, result = _read(part, where)
            blocks.append(call)
            results += [result] if result else []
        yield {**{key: message[key] for key in KEPT if key in message}, "content": blocks}
        if results:
            yield {"role": "tool", "content": results}


def _is_call(part: Mapping[str, Any]) -> bool:
    type_ = part["type"]
    return type_ in (DYNAMIC, OLD_CALL) or (type_.startswith("tool-") and "state" in part)


def _read(part: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The block of a call, and that of its result if there is one."""
    old = part.get("toolInvocation") if part["type"] == OLD_CALL else part
    given = old if isinstance(old, Mapping) else {}
    name = given.get("toolName", part["type"].removeprefix("tool-"))
    state, key = given.get("state"), given.get("toolCallId")
    if state not in (*CALLED, *ANSWERED, FAILED) or not isinstance(key, str):
        raise BadData(
            f"{where}: the call of {name!s:.40} in a part has the state '{state!s:.40}': only whole calls are learned"
        )
    arguments = next((given[each] for each in ("input", "args", "rawInput") if given.get(each) is not None), None)
    call = {"type": "tool-call", "toolCallId": key, "toolName": name, "input": arguments}
    if state in CALLED:
        return call, None
    result = {"type": "tool-result", "toolCallId": key, "toolName": name, "isError": state == FAILED}
    place = "errorText" if state == FAILED else "output" if "output" in given else "result"
    if place in given:
        output = given[place]
        # as a whole, or what has a key `value` or is a list would be read as the form of a block
        result["output"] = {"type": "text" if isinstance(output, str) else "json", "value": output}
    return call, result

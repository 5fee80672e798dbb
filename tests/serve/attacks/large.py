"""Bodies of 4 MB of every kind: each value that is large in a way of its own, at each place of each endpoint's body."""

from collections.abc import Iterator

from tests.serve.attacks.bodies import Attack

SIZE = 4_100_000  # bytes of a body, just below what it may have


def repeated(unit: str, open_: str = "[", close: str = "]", most: int = SIZE) -> str:
    """A list of as many times `unit` as a body may hold, or `most`."""
    count = min(most, (SIZE - 1000) // (len(unit) + 1))
    return open_ + ",".join([unit] * count) + close


def keyed(value: str, most: int = SIZE) -> str:
    """An object with as many keys as a body may hold, or `most`, no two of them alike."""
    count = min(most, (SIZE - 1000) // (len(value) + 9))
    return "{" + ",".join(f'"{number:x}":{value}' for number in range(count)) + "}"


MOST = 190_000  # lists or objects: with keys some of these values are more than a body may have
# what -> the JSON text of a value
VALUES: dict[str, str] = {
    "a text": '"' + "a" * (SIZE - 1000) + '"',
    "escapes": '"' + "\\u00e9" * (SIZE // 6 - 200) + '"',
    "digits": "9" * (SIZE - 1000),
    "whole numbers": repeated("5"),
    "long numbers": repeated("9" * 4000),
    "fractions": repeated("1e5"),
    "empty texts": repeated('""'),
    "words": repeated('"a"'),
    "nulls": repeated("null"),
    "lists": repeated("[]", most=MOST),
    "objects": repeated('{"a":1,"b":2,"c":3}', most=MOST),
    "keys": keyed("1"),
    "keys of texts": keyed('"a"'),
    "keys of objects": keyed("{}", most=MOST),
    "parts": repeated('{"type":"text","text":"x"}', most=MOST),
    "messages": repeated('{"role":"user","content":"x"}', most=MOST),
    "messages of parts": repeated('{"role":"user","content":[' + ",".join(['{"type":"text","text":""}'] * 37) + "]}"),
    "calls": repeated('{"id":"a","function":{"name":"f","arguments":""}}', most=MOST // 2),
    "tools": repeated('{"type":"function","function":{"name":"f"}}', most=MOST // 2),
    "terms": repeated('{"ref":"alpha"}', most=MOST),
    "one nested list": "[" * 900 + "]" * 900,
    "nested lists": repeated("[" * 90 + "]" * 90, most=MOST // 90),
    "nested objects": repeated('{"a":' * 90 + "1" + "}" * 90, most=MOST // 90),
}


def body(*fields: str) -> str:
    """A body of these fields beside the model, in which %s is where the value goes."""
    return "{" + ",".join(['"model":"alpha"', *fields]) + "}"


MOST_TOKENS, MESSAGES = '"max_tokens":1', '"messages":[{"role":"user","content":"x"}]'
CHAT = [MOST_TOKENS, MESSAGES]
CALL = '{"id":"a","function":{"name":"f","arguments":%s}}'
USE = '{"type":"tool_use","id":"a","name":"f","input":%s}'
RESULT = '{"type":"tool_result","tool_use_id":"a","content":%s}'
SCHEMA = '{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":%s}}}'
FUNCTION = '{"type":"function","function":{"name":"f","parameters":{"properties":%s}}}'
FIELDS = ("tools", "tool_choice", "stop", "stop_token_ids", "logit_bias", "metadata", "adapters", "seed",
          "chat_template_kwargs", "stream_options", "structured_outputs", "user", "unknown")  # fmt: skip
# path -> what stands around the value, at each place
PLACES: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": (
        body(MOST_TOKENS, '"messages":%s'),
        body(MOST_TOKENS, '"messages":[{"role":"user","content":%s}]'),
        body(MOST_TOKENS, '"messages":[{"role":"user","content":"x","annotations":%s}]'),
        body(MOST_TOKENS, '"messages":[{"role":"assistant","content":null,"tool_calls":%s}]'),
        body(MOST_TOKENS, f'"messages":[{{"role":"assistant","tool_calls":[{CALL}]}}]'),
        *(body(*CHAT, f'"{field}":%s') for field in FIELDS),
        body(*CHAT, f'"tools":[{FUNCTION}]'),
        body(*CHAT, f'"response_format":{SCHEMA}'),
        body(*CHAT, '"structured_outputs":{"choice":%s}'),
    ),
    "/v1/completions": (
        body(MOST_TOKENS, '"prompt":%s'),
        body(MOST_TOKENS, '"prompt":[%s]'),
        body(MOST_TOKENS, '"prompt":%s', '"n":9'),
    ),
    "/v1/responses": (
        body('"input":%s'),
        body('"input":[{"role":"user","content":%s}]'),
        body('"input":[{"type":"reasoning","id":"a","summary":%s}]'),
        body('"input":"x"', '"instructions":%s'),
        body('"input":"x"', '"tools":%s'),
        body('"input":"x"', '"metadata":%s'),
    ),
    "/v1/messages": (
        body(MOST_TOKENS, '"messages":%s'),
        body(MOST_TOKENS, '"messages":[{"role":"user","content":%s}]'),
        body(MOST_TOKENS, f'"messages":[{{"role":"assistant","content":[{USE}]}}]'),
        body(MOST_TOKENS, f'"messages":[{{"role":"user","content":[{RESULT}]}}]'),
        body(*CHAT, '"system":%s'),
        body(*CHAT, '"tools":[{"name":"f","input_schema":%s}]'),
        body(*CHAT, '"stop_sequences":%s'),
        body(*CHAT, '"metadata":%s'),
    ),
    "/v1/messages/count_tokens": (body('"messages":[{"role":"user","content":%s}]'),),
    "/api/chat": (
        body('"stream":false', '"messages":%s'),
        *(body('"stream":false', MESSAGES, f'"{field}":%s') for field in ("options", "format", "tools")),
    ),
    "/api/generate": (body('"stream":false', '"prompt":%s'), body('"prompt":"x"', '"context":%s')),
    "/api/show": ('{"model":%s}', body('"x":%s')),
    "/v1/embeddings": (body('"input":%s'), body('"input":[%s]')),
    "/v1/score": (body('"prompt":"x"', '"choices":%s'), body('"prompt":%s', '"choices":["a"]')),
    "/tokenize": (body('"prompt":%s'), body('"messages":%s')),
    "/detokenize": (body('"tokens":%s'),),
    "/v1/load_lora_adapter": ('{"lora_name":%s}',),
    "/v1/merges": (
        '{"adapters":%s,"weights":[1]}',
        '{"adapters":["alpha"],"weights":%s}',
        '{"adapters":["alpha"],"weights":[1],"parameters":%s}',
        '{"adapters":["alpha"],"weights":[1],"method":"ties","parameters":{"density":%s}}',
    ),
    "/v1/registry/votes": ('{"left":%s}',),
    "/v1/registry/evaluations/alpha": ('{"task":"t","scores":{"adapter":%s}}',),
}


def large_bodies() -> Iterator[tuple[str, Attack]]:
    """Every value at every place, by what it is; none may get a status of 500 or more."""
    for path, places in PLACES.items():
        for place in places:
            where = place.replace('"', "").partition("%s")[0][-30:]
            for name, value in VALUES.items():
                content = place.replace("%s", value).encode()
                headers = {"Content-Type": "application/json"}
                yield f"{path} {where} {name}", Attack(path, 400, raw=content, headers=headers)

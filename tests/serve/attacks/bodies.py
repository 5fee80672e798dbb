"""Bodies and requests that are made to hurt: each with what is sent, the status it gets, and what the answer says."""

import json
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
USER = {"role": "user", "content": "x"}
CONTENT = {"type": "text", "text": "x"}
LARGE = 4_000_000  # characters, just below what a body may have


@dataclass(frozen=True)
class Attack:
    """One request. `value` is sent as JSON, `raw` as it is; `status` may be one of several."""

    path: str
    status: int
    words: str = ""
    value: Any = None
    raw: bytes | None = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return self.raw if self.raw is not None else json.dumps(self.value).encode()

    @property
    def all_headers(self) -> dict[str, str]:
        kind = {"Content-Type": "application/json"} if self.raw is None else {}
        return kind | self.headers


def chat(messages: Any, status: int = 400, words: str = "", **more: Any) -> Attack:
    """A conversation."""
    return Attack(CHAT, status, words, {"model": "alpha", "messages": messages, "max_tokens": 1} | more)


def plain(prompt: Any, status: int = 400, words: str = "", **more: Any) -> Attack:
    """A text to be continued."""
    return Attack(COMPLETIONS, status, words, {"model": "alpha", "prompt": prompt, "max_tokens": 1, **more})


def turns(messages: Any, words: str = "", **more: Any) -> Attack:
    """A conversation in Anthropic's form."""
    return Attack("/v1/messages", 400, words, {"model": "alpha", "messages": messages, "max_tokens": 1, **more})


def tokenize(status: int = 400, words: str = "", **value: Any) -> Attack:
    """Text as token ids."""
    return Attack(TOKENIZE, status, words, value)


def template(act: str, words: str) -> Attack:
    """A conversation at which the base's chat template does something bad."""
    return chat([{"role": "user", "content": f"template: {act}"}], words=words)


def raw(content: bytes, words: str = "", status: int = 400, **headers: str) -> Attack:
    """Bytes in the place of JSON."""
    return Attack(CHAT, status, words, raw=content, headers={"Content-Type": "application/json", **headers})


def look(status: int, words: str = "", path: str = "/v1/models", method: str = "GET", **headers: str) -> Attack:
    """A request without a body, with headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Attack(path, status, words, raw=b"", method=method, headers=named)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
LONG = "do not fit"
LIST = "at most"
VALUES = "200,000 lists"
MANY = "10,000 fields"
BODIES: dict[str, Attack] = {
    "4 MB of text": plain("a" * LARGE, words=LONG),
    "4 MB of blanks": plain(" " * LARGE, words=LONG),
    "4 MB of characters of four bytes": plain("\U0001f600" * (LARGE // 12), words=LONG),
    "128 texts of 30 kB": plain(["a" * 30_000] * 128, words=LONG),
    "129 texts": plain(["a"] * 129, words=LIST),
    "a million texts": plain(["a"] * 800_000, words=LIST),
    "a million ids": plain([5] * 1_000_000, words=LONG),
    "a million ids and a word": plain([5] * 1_000_000 + ["x"]),
    "120 lists of 8,000 ids": plain([[5] * 8000] * 120, words=LONG),
    "ids that are lists": plain([[[5] * 100]] * 1000),
    "ids that are too large": plain([2**31] * 100),
    "an id that is negative": plain([-1]),
    "an id that is not there": plain([100_000], words="not one of"),
    "no ids": plain([]),
    "a million ids to echo": plain([5] * 1_000_000, words=LONG, echo=True, logprobs=1),
    "100,000 messages": chat([USER] * 100_000, words=VALUES),
    "60,000 messages": chat([USER] * 60_000, words=LIST),
    "60,000 wrong messages": chat([{"role": "user", "content": 1}] * 60_000),
    "90,000 wrong parts": chat([{"role": "user", "content": [{"type": "image", "x": "x"}] * 90_000}], words=VALUES),
    "60,000 wrong parts": chat([{"role": "user", "content": [{"type": "image", "x": "x"}] * 60_000}]),
    "120,000 parts": chat([{"role": "user", "content": [CONTENT] * 120_000}], words=VALUES),
    "60,000 parts": chat([{"role": "user", "content": [CONTENT] * 60_000}], words="16384 parts"),
    "4,000 messages of 15 parts": chat([{"role": "user", "content": [CONTENT] * 15}] * 4000, words="16384 parts"),
    "a message of 4 MB": chat([{"role": "user", "content": "a" * LARGE}], words=LONG),
    "4,000 messages of 900 letters": chat([{"role": "user", "content": "a" * 900}] * 4000, words=LONG),
    "30,000 calls": chat([{"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": ""}}] * 30_000}], words=LIST),
    "40,000 wrong calls": chat([{"role": "assistant", "content": None, "tool_calls": [{"id": 1}] * 40_000}]),
    "arguments of 4 MB": chat([{"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "[" * LARGE}}]}], words=VALUES),
    "half a million annotations": chat([{"role": "assistant", "content": "x", "annotations": [1] * 500_000}], 200),
    "30,000 tools": chat([USER], words=VALUES, tools=[TOOL] * 30_000),
    "25,000 tools": chat([USER], words=LIST, tools=[TOOL] * 25_000),
    "30,000 wrong tools": chat([USER], tools=[{"type": "x"}] * 30_000),
    "a tool described in 4 MB": chat([USER], words=LONG, tools=[
        {"type": "function", "function": {"name": "f", "description": "a" * LARGE}}]),
    "100,000 stop strings": chat([USER], words=LIST, stop=["a"] * 100_000),
    "a stop string of 4 MB": chat([USER], stop="a" * LARGE),
    "20,000 biases": chat([USER], words=MANY, logit_bias={str(number): 0 for number in range(20_000)}),
    "a bias for what is not a token": chat([USER], logit_bias={"9" * 5000: 1}),
    "100,000 stop tokens": chat([USER], words=LIST, stop_token_ids=[1] * 100_000),
    "a field called by 4 MB": chat([USER], words="no such parameter", **{"a" * LARGE: 1}),
    "200,000 fields": chat([USER], words=VALUES, **{f"field{number}": 1 for number in range(200_000)}),
    "190,000 fields": chat([USER], words=MANY, **{f"field{number}": 1 for number in range(190_000)}),
    "a role of 4 MB": chat([{"role": "a" * LARGE, "content": "x"}]),
    "a model called by 4 MB": Attack(CHAT, 404, "", {"model": "a" * LARGE, "messages": [USER]}),
    "a model of control characters": Attack(CHAT, 404, "", {"model": "\x1b[2J\x00", "messages": [USER]}),
    "a path as a model": Attack(CHAT, 404, "", {"model": "../../etc/passwd", "messages": [USER]}),
    "a number as a model": Attack(CHAT, 400, "", {"model": 1, "messages": [USER]}),
    "129 answers": chat([USER], n=129),
    "more answers than the queue holds": plain(["a"] * 100, 429, "queue", n=100),
    "an answer of a quintillion tokens": chat([USER], max_tokens=10**18),
    "a temperature that is not a number": raw(b'{"model": "alpha", "messages": [], "temperature": NaN}'),
    "a temperature of 1e400": raw(b'{"model": "alpha", "messages": [], "temperature": 1e400}'),
    "variables of the template": chat([USER], words="not a variable", chat_template_kwargs={"self": 1, "a" * 1000: 2}),
    "the template itself": chat([USER], words="no such parameter", chat_template="{{ 1 }}"),
    "half a surrogate": raw(b'{"model": "alpha", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    "lists 100,000 deep": raw(b"[" * 100_000, "body"),
    "lists 900 deep": raw(b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "objects 100,000 deep": raw(b'{"a":' * 100_000, "body"),
    "messages 5,000 deep": raw(b'{"model": "alpha", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "a number of 4 MB": raw(b'{"model": "alpha", "seed": ' + b"9" * LARGE + b"}", "body"),
    "900 numbers of 4,000 digits": raw(b'{"model": "alpha", "x": [' + b",".join([b"9" * 4000] * 900) + b"]}"),
    "4 MB of commas": raw(b'{"model": "alpha", "messages": [' + b"," * LARGE, "not JSON"),
    "an open string of 4 MB": raw(b'{"model": "' + b"a" * LARGE, "not JSON"),
    "4 MB of escapes": raw(b'{"model": "' + b"\\u0041" * 600_000 + b'", "messages": []}'),
    "1.4 million lists": raw(b'{"model": "alpha", "messages": [' + b"[]," * 1_300_000 + b"[]]}", VALUES),
    "zero bytes": raw(b"\x00" * 100_000, "body"),
    "bytes that are not UTF-8": raw(b"\xff\xfe" * 1000, "body"),
    "nothing": raw(b""),
    "compressed": raw(b"\x1f\x8b\x08\x00" + b"x" * 1000, **{"Content-Encoding": "gzip"}),
    "a form": Attack(CHAT, 400, "application/json", raw=b"a=1", headers={"Content-Type": "text/plain"}),
    "no kind of content": Attack(CHAT, 400, "application/json", raw=b'{"model": "alpha"}'),
    "a body of 5 MB": raw(b" " * 5_000_000, "bytes", 413),
    "a body that ends in two ways": raw(b"{}", "this one has both", **{"Transfer-Encoding": "chunked"}),
    "input of 60,000 items": Attack(RESPONSES, 400, LIST, {"model": "alpha", "input": [USER] * 60_000}),
    "input of 90,000 wrong parts": Attack(
        RESPONSES, 400, "", {"model": "alpha", "input": [{"role": "user", "content": [{"type": "x"}] * 90_000}]}),
    "an instruction of 4 MB": Attack(
        RESPONSES, 400, LONG, {"model": "alpha", "input": "x", "instructions": "a" * LARGE}),
    "200,000 things to include": Attack(
        RESPONSES, 400, LIST, {"model": "alpha", "input": "x", "include": ["a"] * 200_000}),
    "a salt of half a surrogate": raw(
        b'{"model": "alpha", "messages": [{"role": "user", "content": "x"}], "cache_salt": "\\ud800"}', "cache_salt"),
    "4 MB to tokenize": tokenize(words=LONG, prompt="a" * LARGE),
    "60,000 messages to tokenize": tokenize(words=LIST, messages=[USER] * 60_000),
    "25,000 tools to tokenize": tokenize(words=LIST, messages=[USER], tools=[TOOL] * 25_000),
    "a million ids to spell": Attack("/detokenize", 400, LIST, {"tokens": [5] * 1_000_000}),
    "ids to spell that are not there": Attack("/detokenize", 400, "not one of", {"tokens": [2**31 - 1]}),
    "9,000 fields": chat([USER], words="no such parameter", **{f"field{number}": 1 for number in range(9000)}),
    "9,000 wrong biases": chat([USER], user="a" * 99_999, logit_bias={f"x{number}": {} for number in range(9000)}),
    "9,000 forms": chat([USER], user="a" * 99_999, structured_outputs={f"x{number}": 1 for number in range(9000)}),
    "arguments of 20,000 keys": chat([{"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": {f"{number:x}": 1 for number in range(20_000)}}}]}],
        words=MANY),
    "arguments of 18 times 9,000 keys": chat([{"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": {f"{large:x}": {f"{number:x}": 1 for number in range(9000)}
                                                            for large in range(18)}}}]}], words=LONG),
    "notes of 20,000 keys": chat([USER], words=MANY, metadata={f"{number:x}": 1 for number in range(20_000)}),
    "notes of 9,000 keys": chat([USER], 200, metadata={f"{number:x}": "a" * 50 for number in range(9000)}),
    "a mix of 300,000 adapters": Attack(
        CHAT, 400, "at most", {"model": "+".join(["alpha"] * 300_000), "messages": [USER]}),
    "a list of 60,000 adapters": chat([USER], words="at most", model="tiny", adapters=[{"ref": "alpha"}] * 60_000),
    "a mix of a weight of 1e30": Attack(CHAT, 400, "alpha", {"model": "alpha*1e30", "messages": [USER]}),
    "a mix of a weight that is none": Attack(CHAT, 404, "", {"model": "alpha*nan", "messages": [USER]}),
    "4,000 turns of 15 parts": turns([{"role": "user", "content": [CONTENT] * 15}] * 4000, LONG),
    "60,000 parts of a turn": turns([{"role": "user", "content": [CONTENT] * 60_000}], LIST),
    "a call with 20,000 keys": turns([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f",
        "input": {f"{number:x}": 1 for number in range(20_000)}}]}], MANY),
    "a result of 4 MB": turns([{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": "a" * LARGE}]}], LONG),
    "a million stop sequences that are none": turns([USER], "stop_sequences", stop_sequences=[1] * 1_000_000),
    "a million stop sequences": turns([USER], LIST, stop_sequences=["a"] * 800_000),
    "a million tags that are none": Attack(
        "/v1/registry/tags/alpha", 400, "add", {"add": [1] * 1_000_000}, method="PUT"),
    "a million names to merge": Attack("/v1/merges", 400, "adapters", {"adapters": [1] * 1_000_000, "weights": [1]}),
    "turns of nobody": turns([{"role": "root", "content": "x"}] * 4000, "role"),
    "a context of a million ids": Attack("/api/generate", 400, "context", {
        "model": "alpha", "prompt": "x", "context": [5] * 1_000_000, "stream": False}),
    "an image of 4 MB": Attack("/api/chat", 400, "images", {"model": "alpha", "stream": False, "messages": [
        {"role": "user", "content": "x", "images": ["a" * LARGE]}]}),
    "60,000 messages to Ollama": Attack("/api/chat", 400, LIST, {"model": "alpha", "messages": [USER] * 60_000}),
    "20,000 options": Attack("/api/chat", 400, MANY, {"model": "alpha", "messages": [USER],
        "options": {f"{number:x}": 1 for number in range(20_000)}}),
    "60,000 texts to embed": Attack("/v1/embeddings", 400, LIST, {"model": "alpha", "input": ["a"] * 600_000}),
    "a text of 4 MB to embed": Attack("/v1/embeddings", 400, LONG, {"model": "alpha", "input": "a" * LARGE}),
    "800,000 answers to score": Attack("/v1/score", 400, LIST, {
        "model": "alpha", "prompt": "x", "choices": ["a"] * 800_000}),
    "an answer of 4 MB to score": Attack("/v1/score", 400, LONG, {
        "model": "alpha", "prompt": "x", "choices": ["a" * LARGE]}),
    "a merge of a million": Attack("/v1/merges", 400, "", {"adapters": ["alpha"] * 400_000, "weights": [1]}),
    "a name that another machine gave": look(403, "--allow-host", Host="evil.example.com"),
    "the same for an answer": Attack(
        COMPLETIONS, 403, "--allow-host", {"model": "alpha", "prompt": "x"}, headers={"Host": "evil.example.com"}),
    "the same for leave": look(403, "--allow-host", CHAT, "OPTIONS", Host="evil.example.com:80"),
    "the same to unload": Attack(
        "/v1/unload_lora_adapter", 403, "--allow-host", {"lora_name": "alpha"}, headers={"Host": "evil.example.com"}),
    "a page of another site": look(403, "--allow-origin", Origin="https://evil.example.com"),
    "a page without an origin": look(403, "--allow-origin", Origin="null"),
    "an image of another site": look(403, "--allow-origin", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors"),
    "a path of 60 kB": look(404, "", "/" + "a" * 60_000),
    "a path upwards": look(404, "", "/../../../../etc/passwd"),
    "a model upwards": look(404, "", "/v1/models/..%2f..%2fetc%2fpasswd"),
    "a template that loops": template("loop", "s of computing"),
    "a template of a billion letters": template("billion", "256 MiB"),
    "a template of two billion blanks": template("width", "256 MiB"),
    "a template that calls itself": template("recursion", "recursion"),
    "a template of lists in lists": template("doubled", "that a template may"),
    "a template that writes 60 MB": template("long", "32 MiB"),
    "a template that refuses": template("refusal", "not this one"),
    "a folder to load": Attack("/v1/load_lora_adapter", 403, "", {"lora_name": "x", "lora_path": "/etc"}),
    "a folder upwards to load": Attack("/v1/load_lora_adapter", 403, "", {"lora_name": "x", "lora_path": "../../etc"}),
}  # fmt: skip

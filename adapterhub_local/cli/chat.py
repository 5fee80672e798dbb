"""`qhub chat`: talk to a running server, and change the adapter in mid-conversation."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import click

from adapterhub_local import settings
from adapterhub_local.cli.output import echo
from adapterhub_local.client import bearer, check_address
from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.visible import visible_line

HERE = "http://127.0.0.1:8000"
HELP = """\
/model NAME    answer with another adapter from here on; the conversation stays
/models        list what may be asked
/system TEXT   instructions, and a new conversation
/reset         a new conversation
/undo          take the last question and its answer back
/quit          end (also Ctrl-D)"""


@click.command()
@click.argument("model", required=False)
@click.option("--url", help="The server, any that speaks OpenAI. Default: QHUB_SERVER, or http://127.0.0.1:8000/v1.")
@click.option("--system", metavar="TEXT", help="System instructions of the conversation.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Default: the server's.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of an answer.")
@click.option("--seed", type=int, help="The same seed gives the same answers.")
def command(
    model: str | None,
    url: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
) -> None:
    """Talk to MODEL, by default the base, on a running server.

    In a pipe each line is one turn and only answers are printed. An API key is taken from QHUB_API_KEY.

    \b
    qhub chat sentiment
    echo "A wonderful film." | qhub chat sentiment@prod
    """
    import httpx

    url = url or f"{(settings.server() or HERE).rstrip('/').removesuffix('/v1')}/v1"
    check_address(url)
    if urlsplit(url).path in ("", "/"):  # as servers announce themselves elsewhere
        url = f"{url.rstrip('/')}/v1"
    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    host = urlsplit(url).hostname or ""
    client = httpx.Client(
        base_url=url.rstrip("/"),
        headers=bearer(settings.api_key()),
        timeout=httpx.Timeout(600, connect=5),
        trust_env=host not in ("127.0.0.1", "localhost", "::1"),  # a proxy does not know this machine's servers
    )
    with client, _plain_errors(url):
        chat = Chat(client, {name: value for name, value in options.items() if value is not None})
        chat.use(model or chat.models()[0])
        if system:
            chat.start(system)
        _talk(chat, is_terminal=sys.stdin.isatty())


@dataclass
class Chat:
    """A conversation with a server; `messages` are the turns so far."""

    client: Any
    options: dict[str, Any]
    model: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def start(self, system: str | None = None) -> None:
        """Begin a new conversation; without `system` its instructions stay."""
        kept = [message for message in self.messages if message["role"] == "system"]
        self.messages = [{"role": "system", "content": system}] if system else kept

    def undo(self) -> None:
        """Take the last question and its answer back."""
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                return

    def models(self) -> list[str]:
        """What the server answers with, the base first."""
        return [model["id"] for model in self._json("/models")["data"]]

    def use(self, model: str) -> None:
        """Answer with `model` from here on. Raises NotFound, and then keeps the one before."""
        self._json(f"/models/{quote(model)}")
        self.model = model

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, as it comes; both become turns when it is whole, or is stopped."""
        turns = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": turns, "stream": True, **self.options}
        written = ""
        with self.client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
            _check(response)
            try:
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        piece = _piece(json.loads(line.removeprefix("data: ")))
                        written += piece
                        yield piece
            except GeneratorExit:  # stopped by the one who asked
                self._keep(turns, written)
                raise
        self._keep(turns, written)

    def _keep(self, turns: list[dict[str, str]], written: str) -> None:
        self.messages = [*turns, {"role": "assistant", "content": written}]

    def _json(self, path: str) -> dict[str, Any]:
        response = self.client.get(path)
        _check(response)
        answer: dict[str, Any] = response.json()
        return answer


def _talk(chat: Chat, *, is_terminal: bool) -> None:
    """Turn by turn until the input ends. In a pipe the first error ends it."""
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has a history
        echo(f"Talking to {chat.model}. /help shows what else there is.", err=True)
    for text in _lines(chat, is_terminal):
        if not text.strip():
            continue
        try:
            if text.startswith("/"):
                if not _command(chat, text):
                    return
                continue
            for piece in chat.ask(text):
                echo(piece, nl=False)
                sys.stdout.flush()
            echo()
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            echo(" ...", err=True)
        except QhubError as error:
            if not is_terminal:
                raise
            echo(str(error), err=True)


def _lines(chat: Chat, is_terminal: bool) -> Iterator[str]:
    """What is typed, or piped, line by line."""
    if not is_terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input(f"{visible_line(chat.model)}> ")
        except EOFError:
            echo(err=True)
            return


def _command(chat: Chat, text: str) -> bool:
    """Do what a line with a slash says; False to end. Raises InputError for what is unknown."""
    name, _, rest = text[1:].partition(" ")
    rest = rest.strip()
    match name:
        case "model" if rest:
            chat.use(rest)
            echo(f"now {rest}", err=True)
        case "models":
            echo("\n".join(chat.models()))
        case "system" if rest:
            chat.start(rest)
        case "reset":
            chat.start()
        case "undo":
            chat.undo()
        case "help":
            echo(HELP)
        case "quit" | "exit":
            return False
        case _:
            raise InputError(f"'{text}' is not known: /help shows what is")
    return True


def _piece(chunk: dict[str, Any]) -> str:
    """The text in one event. Raises QhubError if it is an error."""
    if "error" in chunk:
        raise QhubError(f"the answer broke off: {chunk['error'].get('message')}")
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _check(response: Any) -> None:
    """Raise what the server says is wrong."""
    if response.status_code < 400:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{response.url} answered {response.status_code}: is it an OpenAI server?"
    kind = NotFound if response.status_code == 404 else InputError if response.status_code < 500 else QhubError
    raise kind(message)


@contextlib.contextmanager
def _plain_errors(url: str) -> Iterator[None]:
    """Errors of the connection in our own words."""
    import httpx

    try:
        yield
    except httpx.ConnectError:
        raise QhubError(f"nothing answers at {url}: start `qhub serve`, or name the server with --url") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise QhubError(f"talking to {url} failed: {error or type(error).__name__}") from None

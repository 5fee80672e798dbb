"""`qhub chat` against a real server, through a pipe and on a terminal."""

import os
import pty
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import InputError, NotFound, QhubError
from adapterhub_local.visible import visible
from tests.patience import PATIENCE
from tests.serve.conftest import Server


def chat(server: Server, text: str, *arguments: str):
    """`qhub chat` with `text` piped into it."""
    options = ["--url", f"{server.url}/v1", "--max-tokens", "8", "--temperature", "0"]
    return CliRunner().invoke(qhub, ["chat", *arguments, *options], input=text)


def answers(server: Server, *turns: tuple[str, str]) -> list[str]:
    """What each (model, question) of a conversation is answered over plain HTTP."""
    messages, said = [], []
    for model, question in turns:
        messages.append({"role": "user", "content": question})
        body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
        reply = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": reply})
        said.append(visible(reply))
    return said


def test_the_adapter_changes_in_mid_conversation(server: Server) -> None:
    """Each line is a turn; /model switches who answers, and the conversation goes on."""
    done = chat(server, "Hello\n/model beta\nAnd you?\n\n/model alpha@prod\nBye\n", "alpha")
    assert done.exit_code == 0, done.output
    said = answers(server, ("alpha", "Hello"), ("beta", "And you?"), ("alpha", "Bye"))
    assert done.stdout == "".join(f"{line}\n" for line in said)
    assert len(set(said)) == 3


def test_commands(server: Server) -> None:
    """Without a model the base answers; /reset and /undo forget, /models lists, /quit ends."""
    one = answers(server, ("tiny", "Hello"))[0]
    done = chat(server, "Hello\n/undo\nHello\n/reset\nHello\n/models\n/quit\nHello\n")
    assert done.stdout.startswith(f"{one}\n" * 3)
    assert "alpha@prod" in done.stdout
    assert done.stdout.count(one) == 3
    system = chat(server, "Hello\n", "--system", "Be brief.")
    assert system.stdout != f"{one}\n"


@pytest.mark.parametrize(
    ("text", "arguments", "error"),
    [("Hi\n", ["nothing"], NotFound), ("/model nothing\nHi\n", ["alpha"], NotFound), ("/dance\n", [], InputError)],
)
def test_mistakes_in_a_pipe_end_it(server: Server, text: str, arguments: list[str], error: type) -> None:
    """In a pipe an unknown model or command is the command's error, and no one answers in its place."""
    result = chat(server, text, *arguments)
    assert isinstance(result.exception, error)
    assert result.stdout == ""


def test_no_server() -> None:
    """Without a server one line says how to start it."""
    result = CliRunner().invoke(qhub, ["chat", "--url", "http://127.0.0.1:9/v1"], input="Hi\n")
    assert isinstance(result.exception, QhubError)
    assert "qhub serve" in str(result.exception)


def test_on_a_terminal(server: Server) -> None:
    """On a terminal a mistake is reported and the talk continues; the prompt names who answers; Ctrl-D ends it."""
    master, terminal = pty.openpty()
    arguments = [sys.executable, "-m", "adapterhub_local", "chat", "alpha", "--url", server.url]
    process = subprocess.Popen(
        [*arguments, "--max-tokens", "3"], stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True
    )
    os.close(terminal)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + PATIENCE
        while text not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(master, 65536)
        seen = seen.partition(text)[2]

    try:
        wait_for(b"alpha> ")
        os.write(master, b"/model nothing\n")
        wait_for(b"there is no adapter 'nothing'")
        wait_for(b"alpha> ")
        os.write(master, b"/model beta\n")
        wait_for(b"now beta")
        wait_for(b"beta> ")
        os.write(master, b"Hello\n")
        wait_for(b"beta> ")
        os.write(master, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)

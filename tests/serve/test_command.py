"""`qhub serve` and `python -m serve`: start, announce, answer, stop; and what cannot be started."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import load_base
from adapterhub_local.cli.serve import command
from adapterhub_local.errors import InputError, NotFound
from adapterhub_local.registry import Registry
from tests.patience import PATIENCE
from tests.serve.adapter_makers import publish
from tests.serve.conftest import Server


def test_serve_until_terminated(tiny_base: BaseInfo, home) -> None:
    """One line says where it listens; it answers there; SIGTERM ends it with exit code 0 and no traceback."""
    publish(Registry(home), "alpha", tiny_base, seed=1)
    arguments = [sys.executable, "-m", "serve", "--base", "tiny", "--port", "0", "--max-rows", "2"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "QHUB_DEVICE": "cpu"}
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            line = process.stdout.readline()
            assert line.startswith("Serving tiny with 1 adapter on http://127.0.0.1:"), process.stderr.read()
            body = {"model": "alpha", "prompt": "Hello", "max_tokens": 3}
            answer = httpx.post(f"{line.split()[-1]}/completions", json=body, timeout=PATIENCE, trust_env=False)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_long_answers_end_with_an_error_when_the_server_stops(
    tiny_base: BaseInfo, home, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that outlives the time to drain ends with an error event, and nothing is logged as a failure."""
    server = Server(load_base(tiny_base, device="cpu"), Registry(home))
    server.slow_down(monkeypatch)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.begin_stop()
        events = [line.removeprefix("data: ") for line in lines if line]
    server.stop()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["message"] == "the server is stopping"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_port_in_use(tiny_base: BaseInfo) -> None:
    """A port that is taken is an error that says so, before the base is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(command, ["--port", str(port)])
    assert isinstance(result.exception, InputError)
    assert f"port {port} (Address already in use)" in str(result.exception)


def test_address_that_is_not_ours(tiny_base: BaseInfo) -> None:
    """An address that this machine does not have is an error, no traceback."""
    result = CliRunner().invoke(command, ["--host", "no.such.host.invalid"])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize("arguments", [[], ["--base", "nothing"]])
def test_no_base(arguments: list[str]) -> None:
    """Without a base, or with a wrong name, the error says how to add one."""
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, NotFound)
    assert "qhub base add" in str(result.exception)


def test_importing_serve_loads_no_torch() -> None:
    """Importing `serve`, its command and the scheduler loads neither torch nor the web framework."""
    code = (
        "import sys, serve, serve.__main__, serve.engine.scheduler, adapterhub_local.cli.serve;"
        "print({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert result.stdout.strip() == "set()"

"""Options from a file, https, and SIGHUP, which has both read again while answers go on."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import InputError
from serve.__main__ import command
from serve.configuration import Configuration
from serve.options import HttpOptions
from serve.tls import Tls
from tests.patience import PATIENCE
from tests.serve.certificates import make_certificate

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def parsed(*arguments: str) -> click.Context:
    """What `qhub serve` makes of its arguments."""
    return command.make_context("serve", list(arguments))


@contextmanager
def serving(*arguments: str, session: bool = True) -> Iterator[tuple[subprocess.Popen, str]]:
    """A real `qhub serve` in a process of its own, without a terminal; its address."""
    with subprocess.Popen(
        [sys.executable, "-m", "serve", "--port", "0", "--no-access-log", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=session,
        env={**os.environ, "QHUB_DEVICE": "cpu"},
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("Serving tiny"), process.stderr.read() if process.stderr else line
            yield process, line.split()[-1]
        finally:
            process.kill()


def hang_up(process: subprocess.Popen, lines: int) -> list[str]:
    """What the server reports after a SIGHUP."""
    process.send_signal(signal.SIGHUP)
    assert process.stdout
    return [process.stdout.readline().strip() for _ in range(lines)]


def test_a_file_stands_for_options(tmp_path: Path) -> None:
    """Each kind of option as it is written on the command line, which goes before it; paths count from the file."""
    path = tmp_path / "serve.toml"
    path.write_text(
        '\ufeffbase = "tiny"\nport = 8123\ntimeout = 5\nkv_cache = "64MiB"\nmax-body = 2048\nallow-host = ["a", "b"]\n'
        'share-prefixes = true\nlora-root = "adapters"\naccess-log = false\n'
        'remote = "../team"\n'
    )
    found = parsed("--config", str(path), "--timeout", "7").params
    plain = parsed(
        *["--base", "tiny", "--port", "8123", "--timeout", "7", "--kv-cache", "64MiB", "--max-body", "2048"],
        *["--allow-host", "a", "--allow-host", "b", "--share-prefixes", "--no-access-log"],
        *["--lora-root", str(tmp_path / "adapters"), "--config", str(path), "--remote", str(tmp_path / "../team")],
    ).params
    assert found == plain
    assert (found["timeout"], found["hosts"], found["max_body"]) == (7.0, ("a", "b"), 2048)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("timeuot = 5", "'timeuot' is not an option: did you mean timeout?"),
        ("config = 'x'", "'config' is not an option"),
        ("timeout = 5\ntime_out = 6", "'time_out' is not an option: did you mean timeout?"),
        ("max_body = 1\nmax-body = 2", "'max-body' is given twice"),
        ("access-log = 'no'", "'access-log' is 'no': it must be true or false"),
        ("allow-host = [['a']]", "write it as on the command line"),
        ("timeout = [5]", "'timeout' is [5]: write it as on the command line"),
        ("timeout = true", "'timeout' is True: write it as on the command line"),
        ("[timeout]\na = 1", "write it as on the command line"),
        ("timeout = ", "is not TOML"),
        ("timeout = -1", "-1"),
        ("port = 'many'", "'many' is not a valid integer"),
        ("kv-cache = 'much'", "much"),
        ("dtype = 'int4'", "serve.toml: 'dtype': 'int4' is not one of"),
        ("timeout = '1h'", "serve.toml: 'timeout': '1h' is not a valid float"),
        ("timeout = inf", "timeout is inf: it must be a number of finite size"),
        ("drain = nan", "drain is nan"),
        ("max-tokens = " + "9" * 5000, "is not TOML"),
        ("allow-host = " + "[" * 5000, "is not TOML"),
        ('lora-root = "a\\u0000b"', "has a character NUL"),
        ("uds = ''", "'uds' is empty: it must be a path"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, says: str) -> None:
    """Each is an error that names the file's key, or the option, and ends with exit code 2."""
    path = tmp_path / "serve.toml"
    path.write_text(text)
    result = CliRunner().invoke(command, ["--config", str(path)])
    code = result.exception.exit_code if isinstance(result.exception, InputError) else result.exit_code
    assert code == 2
    assert says in f"{result.exception} {result.output}"
    gone = CliRunner().invoke(command, ["--config", str(tmp_path / "none.toml")])
    assert "No such file" in str(gone.exception)
    os.mkfifo(tmp_path / "pipe")  # it could be read once, and would hold up the server the second time
    pipe = CliRunner().invoke(command, ["--config", str(tmp_path / "pipe")])
    assert "pipe is not a file that can be read again" in str(pipe.exception)


def test_what_may_change_while_a_server_runs(tmp_path: Path) -> None:
    """Every option is either live, and holds from then on, or is named as one that waits for the next start."""
    path = tmp_path / "serve.toml"
    path.write_text("timeout = 5\n")
    context = parsed("--config", str(path), "--drain", "3")
    configuration = Configuration(context)
    http = HttpOptions(timeout=5, drain=3, require_keys=True)
    assert configuration.reread(http) == (http, [], [])

    path.write_text('max-tokens = 9\ndrain = 8\nkv-cache = "1GB"\nbase = "other"\nallow-host = ["a"]\n')
    http, changed, later = configuration.reread(http)
    assert (http.timeout, http.max_tokens, http.drain, http.hosts, http.require_keys) == (600, 9, 3, (), True)
    assert changed == ["max-tokens is 9, was None", "timeout is 600.0, was 5.0"]
    assert later == ["allow-host", "base", "kv-cache"]
    assert configuration.reread(http)[1:] == ([], later)  # until it is started again

    for wrong in ("timeout = 0", "timeout = ", "timeuot = 1", "port = 'x'"):
        path.write_text(wrong)
        with pytest.raises(InputError):
            configuration.reread(http)
    path.write_text("timeout = 5\n")
    assert configuration.reread(http)[1] == ["max-tokens is None, was 9", "timeout is 5.0, was 600.0"]


@needs_openssl
def test_https_and_a_signal_that_has_everything_read_again(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """A new certificate and new limits hold for the next request, and an answer that runs goes on; errors change
    nothing."""
    old, key = make_certificate(tmp_path / "old", "old")
    new, new_key = make_certificate(tmp_path / "new", "new")
    path = tmp_path / "serve.toml"
    path.write_text("ssl-certfile = 'old/old.pem'\nssl-keyfile = 'old/old.key'\nmax-tokens = 400\n")

    def ask(certificate: Path, tokens: int) -> httpx.Response:
        trusting = ssl.create_default_context(cafile=str(certificate))
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": tokens}
        return httpx.post(f"{url}/completions", json=body, verify=trusting, timeout=PATIENCE, trust_env=False)

    with serving("--config", str(path)) as (process, url):
        assert url.startswith("https://127.0.0.1:")
        assert ask(old, 300).status_code == 200
        with pytest.raises(httpx.ConnectError):
            ask(new, 3)

        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(old)), timeout=PATIENCE, trust_env=False)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with trusting, trusting.stream("POST", f"{url}/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            shutil.copy(new, old)
            reported = hang_up(process, 2)  # the certificate, without its key
            assert reported[0] == "SIGHUP: no option changed"
            assert reported[1].startswith("SIGHUP: the certificate stays: ")
            assert "the key is of another certificate" in reported[1]
            shutil.copy(new_key, key)
            path.write_text("ssl-certfile = 'old/old.pem'\nssl-keyfile = 'old/old.key'\nmax-tokens = 20\n")
            reported = hang_up(process, 2)
            assert reported == [
                "SIGHUP: max-tokens is 20, was 400",
                f"SIGHUP: new connections get the certificate of {old} as it is now",
            ]
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        refused = ask(new, 300)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        assert ask(new, 20).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")


@needs_openssl
def test_a_certificate_of_another_kind_of_key(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Elliptic, then RSA, then elliptic again: each client sees the present one alone, whatever it can read."""
    live, key = make_certificate(tmp_path, "live")
    with serving("--ssl-certfile", str(live), "--ssl-keyfile", str(key)) as (process, url):
        port = url.split(":")[2].split("/")[0]
        for kind, name in (("rsa:2048", "second"), ("ec", "third")):
            for made, there in zip(make_certificate(tmp_path, name, kind=kind), (live, key), strict=True):
                shutil.copy(made, there)
            assert hang_up(process, 2)[1].endswith("as it is now")
            for option in ([], ["-tls1_2"], ["-noservername"]):
                shown = subprocess.run(
                    ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *option],
                    input="", capture_output=True, text=True, timeout=PATIENCE,
                ).stdout  # fmt: skip
                assert f"CN = {name}" in shown or f"CN={name}" in shown, option


@needs_openssl
def test_clients_that_must_show_a_certificate(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """With --ssl-ca-certs who has none does not get in."""
    certificate, key = make_certificate(tmp_path, "server")
    theirs, their_key = make_certificate(tmp_path, "client")
    files = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certs", str(theirs)]
    others, other_key = make_certificate(tmp_path, "other")
    trusting = ssl.create_default_context(cafile=str(certificate))

    def let_in(*shown: Path) -> bool:
        mine = ssl.create_default_context(cafile=str(certificate))
        if shown:
            mine.load_cert_chain(*shown)
        try:
            return httpx.get(f"{url}/models", verify=mine, timeout=PATIENCE, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    with serving(*files) as (process, url):
        assert [let_in(), let_in(certificate, key), let_in(theirs, their_key)] == [False, False, True]
        trusting.load_cert_chain(theirs, their_key)
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        said, before = _by_session(trusting, address, None)
        assert b"200 OK" in said
        shutil.copy(others, theirs)  # who was let in before is not any more, by no session either
        assert hang_up(process, 2)[1].endswith("as it is now")
        assert [let_in(), let_in(others, other_key)] == [False, True]
        assert _by_session(trusting, address, before)[0] == b""


def _by_session(
    trusting: ssl.SSLContext, address: tuple[str, int], session: ssl.SSLSession | None
) -> tuple[bytes, ssl.SSLSession | None]:
    """What a server says to a client that resumes a session, if it says anything, and the session to resume next."""
    with contextlib.suppress(OSError), socket.create_connection(address) as plain:
        known = trusting.wrap_socket(plain, server_hostname=address[0], session=session)
        known.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return known.read(), known.session
    return b"", None


@needs_openssl
def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    """Each is an error with the file's name before anything is loaded, and no one is asked for a password."""
    certificate, key = make_certificate(tmp_path, "server")
    _, other = make_certificate(tmp_path, "other")
    locked, text = tmp_path / "locked.key", tmp_path / "text.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    text.write_text("no certificate")
    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + certificate.read_text())
    Tls(both).check()
    for files, says in (
        (Tls(tmp_path / "none.pem"), "none.pem cannot be read: No such file"),
        (Tls(certificate, tmp_path / "none.key"), "none.key cannot be read: No such file"),
        (Tls(certificate, other), "the key is of another certificate"),
        (Tls(certificate, locked), "the private key is encrypted"),
        (Tls(certificate), "no PEM text in it, or no private key"),
        (Tls(text, key), "no PEM text in it"),
        (Tls(certificate, key, text), "text.pem cannot be read as certificates"),
        (Tls(certificate, key, tmp_path / "none.pem"), "none.pem cannot be read as certificates: No such file"),
    ):
        with pytest.raises(InputError) as error:
            files.check()
        assert says in str(error.value)
    result = CliRunner().invoke(command, ["--ssl-keyfile", str(key)])
    assert isinstance(result.exception, InputError)
    assert "--ssl-certfile" in str(result.exception)


def test_a_terminal_that_is_closed_ends_the_server(tiny_base: BaseInfo) -> None:
    """SIGHUP has files read again where there is no terminal; where there was one and it is gone it means stop."""
    main, terminal = os.openpty()
    process = os.fork()
    if process == 0:  # a session whose terminal this is, as a shell's window makes it
        try:
            os.setsid()
            os.close(main)
            os.login_tty(terminal)
            environment = {**os.environ, "QHUB_DEVICE": "cpu"}
            os.execve(sys.executable, [sys.executable, "-m", "serve", "--port", "0", "--no-access-log"], environment)
        finally:
            os._exit(1)
    os.close(terminal)
    said = b""
    while b"Serving tiny" not in said:
        said += os.read(main, 1000)
    os.kill(process, signal.SIGHUP)
    while b"SIGHUP: no option changed" not in said:
        said += os.read(main, 1000)
    os.close(main)  # the window is closed: the kernel sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

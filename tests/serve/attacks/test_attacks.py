"""Attacks on one real server process: it lives through all of them, says what is wrong and answers others meanwhile."""

from collections.abc import Iterator

import pytest

from tests.serve.attacks.attacked import AttackedServer, Bystander
from tests.serve.attacks.bodies import BODIES
from tests.serve.attacks.forms import FORMS

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def bystander(attacked: AttackedServer, request: pytest.FixtureRequest) -> Iterator[None]:
    """Somebody else is answered all the time, and the process is alive after every attack."""
    with Bystander(attacked) as others:
        yield
        assert attacked.is_alive, attacked.log.read_text()[-2000:]
    attacked.longest[request.node.name] = max(others.waits, default=0.0)
    assert not others.failures
    assert attacked.answers()


@pytest.mark.parametrize("name", FORMS)
def test_forms(attacked: AttackedServer, name: str) -> None:
    """A form that cannot be compiled is a 400 that names its parameter and the limit; none ends the process."""
    change, status, param, words = FORMS[name]
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 4, **change}
    answer = attacked.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text[:500]
    if status != 200:
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]


@pytest.mark.parametrize("name", BODIES)
def test_requests(attacked: AttackedServer, name: str) -> None:
    """Whatever is sent gets an error in its endpoint's form that is small, and tells nothing of the inside."""
    attack = BODIES[name]
    answer = attacked.http.request(attack.method, attack.path, content=attack.content, headers=attack.all_headers)
    assert answer.status_code == attack.status, answer.text[:500]
    assert len(answer.content) < 20_000
    if attack.status == 200:  # what is large and not read costs nothing
        return
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]  # Ollama's form is a text
    assert attack.words in message
    assert "Traceback" not in message


def test_there_are_many() -> None:
    """The corpus holds what it promises."""
    assert len(FORMS) + len(BODIES) >= 160

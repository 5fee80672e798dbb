"""Attacks on one real server process: it lives through all of them, says what is wrong and answers others meanwhile."""

from collections.abc import Iterator

import pytest

from tests.serve.attacks.attacked import AttackedServer, Bystander
from tests.serve.attacks.forms import FORMS

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def bystander(attacked: AttackedServer) -> Iterator[None]:
    """Somebody else is answered all the time, and the process is alive after every attack."""
    with Bystander(attacked) as others:
        yield
        assert attacked.is_alive, attacked.log.read_text()[-2000:]
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

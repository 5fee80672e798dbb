"""Who makes a change: what is claimed, what a block acts as, and what may stand in a record."""

import contextvars
import os
import pwd
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.actor import acting_as, check_actor, current_actor, named
from adapterhub_local.errors import InputError


def test_the_actor_is_the_block_then_the_claim_then_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's actor comes before QHUB_ACTOR, and that before the user at this machine."""
    monkeypatch.delenv("QHUB_ACTOR", raising=False)
    assert current_actor() == named(f"{pwd.getpwuid(os.geteuid()).pw_name}@{socket.gethostname()}")
    monkeypatch.setenv("QHUB_ACTOR", "build-bot")
    assert current_actor() == "build-bot"
    with acting_as("key:3f9c21aa"):
        assert current_actor() == "key:3f9c21aa"
        with acting_as("key:00000000"):
            assert current_actor() == "key:00000000"
        assert current_actor() == "key:3f9c21aa"
    assert current_actor() == "build-bot"


def test_a_thread_acts_for_whom_it_was_given_the_context_of() -> None:
    """A thread started with a block's context acts as the block; one started without does not."""
    found: list[str] = []
    with acting_as("key:3f9c21aa"):
        context = contextvars.copy_context()
        threads = [
            threading.Thread(target=lambda: found.append(context.run(current_actor))),
            threading.Thread(target=lambda: found.append(current_actor())),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert found[0] == "key:3f9c21aa"
    assert found[1] != "key:3f9c21aa"


@pytest.mark.parametrize("text", ["", " ", "a b", "a\nb", "-x", "é", "x" * 129, "a\x1b[31m"])
def test_what_is_not_an_actor_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal would obey, or a record could not hold in a word, is not an actor, whoever claims it."""
    with pytest.raises(InputError, match="an actor is"):
        check_actor(text)
    if text:
        monkeypatch.setenv("QHUB_ACTOR", text)
        with pytest.raises(InputError, match="QHUB_ACTOR is"):
            current_actor()


@given(st.text())
def test_whatever_somebody_is_called_becomes_an_actor(text: str) -> None:
    """Any name of another system has a form that may stand in a record."""
    assert check_actor(named(text)) == named(text)

"""What the pages say about scores: against the base, by votes, with what was noted; and of whose versions."""

import re
from collections.abc import Iterator

import httpx
import pytest

from adapterhub_local.actor import acting_as
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from serve.registry_api.bodies import VoteBody
from serve.registry_api.votes import vote
from tests.patience import PATIENCE
from tests.serve.console.conftest import Console
from tests.serve.console.hostile import scores
from tests.serve.console.test_sessions import sign_in
from tests.stores import LINEAGE, files

NOTE = "test prompts that are in the training data too: 20 of 20"


@pytest.fixture
def scored(registry: Registry) -> Iterator[Console]:
    """Two adapters with scores and a vote, of two bases."""
    lineage = LINEAGE | {"notes": [NOTE], "metrics": {"sentiment": scores()}}
    with acting_as("ann"):
        one = registry.publish("sentiment-a", files(1), lineage, alias="prod")
    other = LINEAGE | {"base": {"name": "secret", "fingerprint": "sha256:" + "2" * 64}}
    two = registry.publish("hidden", files(2), other | {"metrics": {"t": scores("secret_metric")}})
    registry.publish("unscored", files(3), LINEAGE)
    vote(registry, VoteBody(id="a" * 8, left=str(one), right=str(two), winner="left"))
    running = Console(registry)
    yield running
    running.stop()


def page(console: Console, path: str = "") -> str:
    answer = httpx.get(f"{console.url}/console{path}", timeout=PATIENCE, trust_env=False)
    assert answer.status_code == 200
    return answer.text


def test_a_score_stands_beside_what_it_is_worth(scored: Console) -> None:
    """The base's interval, the paired difference and whether it may be chance, and what was noted, are on the page."""
    text = page(scored, "/adapters/sentiment-a")
    for said in ("15.0 % to 25.0 %", "+62.0 [+55.0, +70.0], clear", NOTE):
        assert said in text
    unclear = scores()
    unclear["base"]["difference"]["exact_match"] = {"value": 0.01, "interval": [-0.02, 0.04], "is_clear": False}
    scored.registry.add_evaluation(scored.registry.resolve("sentiment-a"), "sentiment", unclear)
    assert "+1.0 [-2.0, +4.0], may be chance" in page(scored, "/adapters/sentiment-a")


def test_a_vote_is_no_score(scored: Console) -> None:
    """The list has no bar for votes but their number, and neither them nor numbers of rows are offered as an order."""
    text = page(scored)
    assert "preferred in 100.0 % of 1 vote<" in text
    assert not re.search("<title>blind", text)
    assert 'value="rows"' not in text
    assert 'value="exact_match"' in text


def test_a_task_can_be_asked_for(scored: Console) -> None:
    """The form has a field for the task that is in the address."""
    text = page(scored, "?task=sentiment")
    assert '<input name="task" value="sentiment"' in text
    assert "sentiment-a@1" in text
    assert "unscored@1" not in text


def test_the_log_of_aliases_says_who(scored: Console) -> None:
    """Each move has its actor for who may move aliases, and no other key sees it."""
    assert "<td>ann</td>" in page(scored, "/adapters/sentiment-a")
    scored.keys = {"own": Keys(scored.registry.home).create(adapters=("sentiment*",))[1]}
    with sign_in(scored, "own") as browser:
        text = browser.get("/console/adapters/sentiment-a").text
        assert "Moves of aliases" in text
        assert "<td>ann</td>" not in text
        assert "<th>Who</th>" not in text


def test_a_key_sees_only_what_its_adapters_have(scored: Console) -> None:
    """Bases, counts and orders that only other adapters have are on no page of a key for some."""
    scored.keys = {"own": Keys(scored.registry.home).create(adapters=("sentiment*",))[1]}
    with sign_in(scored, "own") as browser:
        for path in ("/console", "/console/bases", "/console?sort=exact_match"):
            text = browser.get(path).text
            assert "secret" not in text
            assert "hidden" not in text
        for asked in ("sort=nonsense", "metric=secret_metric>0", "sort=secret_metric"):
            wrong = browser.get(f"/console?{asked}")
            assert wrong.status_code == 404
            assert "no version has a score" in wrong.text
            assert "hidden" not in wrong.text
            assert "secret_metric" in asked or "secret" not in wrong.text
        assert "tiny (1)" in browser.get("/console").text
        assert '<td data-of="Versions" class="n">1</td>' in browser.get("/console/bases").text

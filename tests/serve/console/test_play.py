"""The playground on a real server: what is on the screen is what the API answers, and a link runs nothing."""

import re
import time
from typing import Any

import pytest

from adapterhub_local.visible import visible
from tests.serve.conftest import Server
from tests.serve.console.test_pages import Look

PROMPT = "The film was"


def play(server: Server, look: Look, *models: str, **options: Any) -> Any:
    """The playground with these columns, set to plain text and eight tokens."""
    asked = "&".join(f"m={model.replace('+', '%2B')}" for model in models)
    page = look(f"{server.url}/console/play?{asked}&prompt={PROMPT}", **options)
    page.get_by_label("Form").select_option("text")
    page.get_by_label("Tokens").fill("8")
    return page


def expected(server: Server, model: str) -> str:
    answer = server.complete(model=model, prompt=PROMPT)
    return visible(str(answer.json()["choices"][0]["text"]))


def ask(page: Any, columns: int) -> list[str]:
    """What the columns show, once all are done."""
    page.get_by_role("button", name="Ask").click()
    page.wait_for_function(
        "count => [...document.querySelectorAll('.facts-line')].filter(line => /done$/.test(line.textContent)).length"
        " === count && !document.getElementById('run').disabled",
        arg=columns,
    )
    texts: list[str] = page.locator(".answer").all_text_contents()
    return texts


def requests(server: Server) -> int:
    """How many answers were asked for since the start."""
    return server.service.engine.snapshot().stats.num_sampled


def test_columns_show_what_the_api_answers(full_server: Server, look: Look) -> None:
    """Base, adapters and a mix side by side: each text is the API's, and each digest that of what answered."""
    models = ("tiny", "sentiment@1", "origin@1", "sentiment@1*0.7+origin@1*0.3")
    before = requests(full_server)
    page = play(full_server, look, *models)
    page.wait_for_timeout(300)
    assert requests(full_server) == before  # a link runs nothing
    assert ask(page, 4) == [expected(full_server, model) for model in models]
    lines = page.locator(".facts-line").all_text_contents()
    assert "the base tiny" in lines[0]
    for model, line in zip(models[1:], lines[1:], strict=True):
        digest = full_server.complete(model=model, prompt=PROMPT).headers["X-Qhub-Digest"]
        assert digest in line
    page.get_by_label("token probabilities").check()
    assert ask(page, 4) == [expected(full_server, model) for model in models]
    assert "%" in page.locator(".answer span").first.get_attribute("title")
    assert all(re.search(r" · 8 tokens · done$", line) for line in page.locator(".facts-line").all_text_contents())


def test_a_slider_is_an_exact_mix(full_server: Server, look: Look) -> None:
    """At 0 and 1 the mix answers as the one adapter does, and the address has what the sliders say."""
    page = play(full_server, look, "sentiment@1*0.5+origin@1*0.5")
    for name, value in (("sentiment@1", "1"), ("origin@1", "0")):
        page.get_by_role("slider", name=name).fill(value)
    assert "m=sentiment%401*1%2Borigin%401*0" in page.url
    assert ask(page, 1) == [expected(full_server, "sentiment@1")]


def test_a_refusal_stays_in_its_column(full_server: Server, look: Look) -> None:
    """A name that nothing has is refused in the server's words, beside an answer."""
    page = play(full_server, look, "nothing-such", "tiny", expected=("404",))
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("there is no adapter 'nothing-such'").wait_for()
    page.get_by_text(re.compile("base tiny .* done$")).wait_for()
    assert page.locator(".answer").nth(1).text_content() == expected(full_server, "tiny")


# in the page itself and with the first letter
STOP_AT_ONCE = """new MutationObserver((_, observer) => {
    if (!document.querySelector('.answer')?.textContent.length) return;
    observer.disconnect();
    document.getElementById('stop').click();
}).observe(document.body, {childList: true, subtree: true, characterData: true})"""


def test_stop_ends_the_stream(full_server: Server, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping frees the server; what was written stays."""
    engine = full_server.service.engine
    step = engine.step
    # a tiny model is done before a browser has drawn its first letter
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.01), step())[1])
    page = play(full_server, look, "tiny")
    page.get_by_label("Tokens").fill("400")
    page.evaluate(STOP_AT_ONCE)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text(re.compile("stopped$")).wait_for()
    assert full_server.wait_until_idle()["running"] == 0
    assert page.locator(".answer").text_content()


@pytest.mark.parametrize("choice", ["A", "both the same"])
def test_a_blind_vote_is_kept_with_the_versions(full_server: Server, look: Look, choice: str) -> None:
    """Until the vote nothing in the page says which is which; then it is an evaluation, and a second click is none."""
    registry = full_server.registry
    page = play(full_server, look, "sentiment@1", "origin@1")
    page.get_by_label("blind").check()
    page.get_by_role("button", name="Ask").click()
    button = page.get_by_role("button", name=choice, exact=True)
    button.wait_for()
    content = page.content()
    assert not re.search("sentiment|origin|sha256|slider", content)

    def pairs() -> dict[str, list[Any]]:
        found = {name: registry.metrics(registry.resolve(name)) for name in ("sentiment@1", "origin@1")}
        return {name: metrics.get("blind:playground", {}).get("pairs", []) for name, metrics in found.items()}

    before = pairs()
    button.dblclick()
    page.get_by_text(re.compile("A was (sentiment|origin)@1, B was")).wait_for()
    after = pairs()
    assert all(len(after[name]) == len(before[name]) + 1 for name in after)
    won = {name: after[name][-1]["won"] for name in after}
    if choice == "both the same":
        assert won == {"sentiment@1": 0.5, "origin@1": 0.5}
    else:
        first = re.search("A was (.+?),", page.locator("#vote").text_content())
        assert first
        assert won == {name: float(name == first[1]) for name in won}

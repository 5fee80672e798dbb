"""What the playground lets a person see and do: settings in the address, tokens, speeds, old answers, its keys."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import load_base
from adapterhub_local.keys import Keys
from adapterhub_local.registry import Registry
from adapterhub_local.visible import visible
from tests.serve.conftest import Server
from tests.serve.console.hostile import TEXT, UNSEEN
from tests.serve.console.test_pages import Look
from tests.serve.console.test_play import ask, play, requests

LETTERS = [*range(0x2100), *range(0xD700, 0xE010), *range(0xFEF0, 0x10000), *range(0xE0000, 0xE0090)]


@pytest.fixture(scope="module")
def guarded(built_base: Path, shown_registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a model that needs keys."""
    home = tmp_path_factory.mktemp("guarded") / "home"
    shutil.copytree(shown_registry.home.root, home)
    registry = Registry(home)
    running = Server(load_base(read_record(built_base), device="cpu"), registry)
    running.token = Keys(registry.home).create(scopes=("infer",))[1]  # type: ignore[attr-defined]
    yield running
    running.stop()


def sign_in(server: Server, look: Look, path: str, **options: Any) -> Any:
    """A page of somebody who showed the server's key."""
    page = look(f"{server.url}/console", **options)
    page.get_by_label("API key").fill(server.token)  # type: ignore[attr-defined]
    page.get_by_role("button", name="Sign in").click()
    page.goto(f"{server.url}{path}")
    return page


def test_the_address_has_all_that_is_set(full_server: Server, look: Look) -> None:
    """What is set in any field is in the address; a link sets it again, asks nothing, and ignores what is no number."""
    before = requests(full_server)
    page = look(f"{full_server.url}/console/play?m=tiny")
    for label, value in (
        ("System message", "Be brief."),
        ("Prompt", "\nHi\u202e & <b>"),
        ("Temperature", "0.35"),
        ("Tokens", "7"),
    ):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Form").select_option("text")
    page.get_by_label("token probabilities").check()
    page.get_by_label("blind").check()
    for part in (
        "system=Be",
        "prompt=%0AHi",
        "temperature=0.35",
        "tokens=7",
        "form=text",
        "probabilities=1",
        "blind=1",
    ):
        assert part in page.url
    other = look(page.url)
    assert other.get_by_label("System message").input_value() == "Be brief."
    assert other.get_by_label("Prompt").input_value() == "\nHi\u202e & <b>"
    assert other.get_by_label("Temperature").input_value() == "0.35"
    assert other.get_by_label("Tokens").input_value() == "7"
    assert other.get_by_label("Form").input_value() == "text"
    assert other.get_by_label("token probabilities").is_checked()
    assert other.get_by_label("blind").is_checked()
    other.wait_for_timeout(300)
    assert requests(full_server) == before
    wrong = look(f"{full_server.url}/console/play?temperature=9&tokens=nan&form=x&blind=2")
    assert wrong.get_by_label("Temperature").input_value() == "0"
    assert wrong.get_by_label("Tokens").input_value() == "128"


def test_hostile_links_are_letters(full_server: Server, look: Look) -> None:
    """A link's models are shown with what hides in them, its prompt is kept as it is in its field, and nothing runs."""
    text = quote(TEXT.replace("\x00", ""), errors="replace")
    page = look(f"{full_server.url}/console/play?m={text}&m={'W' * 400}&prompt={text}&system={text}",
                viewport={"width": 390, "height": 800})  # fmt: skip
    assert "\\u202e" in page.locator("input[name=m]").first.input_value()
    assert page.get_by_label("Prompt").input_value().startswith("\u202e\u2066")
    page.evaluate("document.querySelectorAll('#system, #prompt').forEach(field => field.remove())")
    assert not [letter for letter in UNSEEN if letter in page.content()]
    assert page.locator("main img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_tokens_are_told_without_a_mouse(full_server: Server, look: Look) -> None:
    """Arrow keys, buttons and a tap each say what a token was and could have been; the colours have a legend."""
    page = play(full_server, look, "tiny")
    assert not page.locator("#legend").is_visible()
    page.get_by_label("token probabilities").check()
    assert page.locator("#legend").is_visible()
    ask(page, 1)
    told = page.locator(".token-line [role=status]")
    page.get_by_role("log", name="Answer").focus()
    page.keyboard.press("ArrowRight")
    first = told.text_content()
    assert re.fullmatch(r'(?s)".*" \d+\.\d %; else (".*" \d+\.\d %(, )?){1,5}', first), first
    page.get_by_role("button", name="Next token, Answer").press("Enter")
    second = told.text_content()
    page.get_by_role("button", name="Token before, Answer").click()
    assert told.text_content() == first
    assert page.locator(".answer .current").count() == 1
    page.evaluate("document.querySelectorAll('.answer span')[1].click()")
    assert told.text_content() == second


def test_a_speed_is_of_tokens_and_measured(full_server: Server, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of a moment has no speed; a longer one has the server's count of tokens by the time that they took."""
    page = play(full_server, look, "tiny")
    ask(page, 1)
    assert "tokens/s" not in page.locator(".facts-line").text_content()
    full_server.slow_down(monkeypatch, 0.05)
    page.get_by_label("Tokens").fill("16")
    ask(page, 1)
    said = re.search(r"16 tokens at ([\d.]+) tokens/s", page.locator(".facts-line").text_content())
    assert said
    assert float(said[1]) <= 25  # a step of 50 ms makes one token: no machine is faster


def test_an_answer_of_other_weights_says_so(full_server: Server, look: Look) -> None:
    """A moved slider, another model or prompt marks the answer that is there until it is asked for again."""
    page = play(full_server, look, "sentiment@1*0.5+origin@1*0.5")
    note = page.locator(".old")
    ask(page, 1)
    assert not note.is_visible()
    page.get_by_role("slider", name="sentiment@1").fill("1")
    assert "The answer below is of sentiment@1*0.5+origin@1*0.5: ask again" in note.inner_text()
    page.get_by_role("slider", name="sentiment@1").fill("0.5")
    assert not note.is_visible()
    page.get_by_label("Prompt").fill("Another")
    assert "another prompt" in note.inner_text()
    ask(page, 1)
    assert not note.is_visible()


def test_a_blind_answer_has_no_time(full_server: Server, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the vote there is no time and no speed, and no answer comes before the other; then there are."""
    full_server.slow_down(monkeypatch, 0.02)
    page = play(full_server, look, "sentiment@1", "origin@1")
    page.get_by_label("Tokens").fill("16")
    page.get_by_label("blind").check()
    page.evaluate(
        "() => { window.alone = 0; new MutationObserver(() => {"
        " const written = [...document.querySelectorAll('.answer')].filter(one => one.textContent).length;"
        " window.alone += written === 1; }).observe(document.body, {childList: true, subtree: true}); }"
    )
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="both the same").wait_for()
    assert page.evaluate("window.alone") == 0
    assert page.locator(".facts-line").all_text_contents() == ["written", "written"]
    page.get_by_role("button", name="both the same").click()
    page.get_by_text(re.compile("A was")).wait_for()
    assert all("first token after" in line for line in page.locator(".facts-line").all_text_contents())


def test_no_vote_where_one_did_not_answer(full_server: Server, look: Look) -> None:
    """A model that is refused is named with its reason, and nothing is asked of a person."""
    page = play(full_server, look, "sentiment@1", "nothing-such", expected=("404",))
    page.get_by_label("blind").check()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("There is no vote: one of the two did not answer.").wait_for()
    assert page.get_by_text("there is no adapter 'nothing-such'").count() == 1
    assert page.get_by_role("button", name="both the same").count() == 0
    assert page.get_by_role("button", name="Ask").is_enabled()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_an_answered_playground_fits(full_server: Server, look: Look, width: int) -> None:
    """Digests, long names of models and words without an end stay within their cards, and these within the window."""
    size = {"width": width, "height": 800}
    page = play(full_server, look, "sentiment@1", "n" * 120, "tiny", expected=("404",), viewport=size)
    page.get_by_label("token probabilities").check()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text(re.compile("done$")).nth(1).wait_for()
    page.locator(".answer .message").wait_for()
    page.locator("input[name=m]").first.fill("W" * 300)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    over = page.evaluate(
        "() => [...document.querySelectorAll('.column *')].filter(one => one.getBoundingClientRect().right >"
        " one.closest('.column').getBoundingClientRect().right + 0.5).map(one => one.outerHTML.slice(0, 99))"
    )
    assert over == []


def test_scripts_show_what_hides_as_pages_do(full_server: Server, look: Look) -> None:
    """Every character that Python makes visible, scripts make the same."""
    page = look(f"{full_server.url}/console/play")
    made = page.evaluate(
        "async codes => { const { visible } = await import('/console/static/parts.js');"
        " return codes.map(code => visible(code < 0x10000 ? String.fromCharCode(code) : String.fromCodePoint(code)))"
        ".map(text => [...text].map(letter => letter.codePointAt(0))); }",
        LETTERS,
    )
    expected = [[ord(letter) for letter in visible(chr(code))] for code in LETTERS]
    assert made == expected


def test_a_key_that_cannot_vote_is_not_asked_to(guarded: Server, look: Look) -> None:
    """A key of scope infer has a playground without blind votes, and the reason."""
    page = sign_in(guarded, look, "/console/play?m=tiny&prompt=Hi&blind=1")
    assert page.locator("#blind").count() == 0
    assert page.get_by_text("a key of scope admin can give one").count() == 1
    page.get_by_label("Form").select_option("text")
    page.get_by_label("Tokens").fill("4")
    assert ask(page, 1)[0]


def test_an_ended_session_leads_to_the_login(guarded: Server, look: Look) -> None:
    """Who asks after a session has ended is led to the login page, and the prompt stays."""
    page = sign_in(guarded, look, "/console/play?m=tiny&prompt=Hi", expected=("401",))
    page.context.clear_cookies()
    page.get_by_role("button", name="Ask").click()
    link = page.get_by_role("link", name="sign in again")
    link.wait_for()
    assert link.get_attribute("href") == "/console/login?next=/console/play"
    assert "Authorization" not in page.inner_text("main")
    assert page.get_by_label("Prompt").input_value() == "Hi"

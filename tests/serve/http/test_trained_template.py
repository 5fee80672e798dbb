"""A version is asked as it was trained: the settings of its recipe decide how the server writes its prompts."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from adapterhub_local.base.bases import read_record
from adapterhub_local.registry import Version
from tests.serve.adapter_makers import llama_shapes, write_random
from tests.serve.conftest import Server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}{{ mark | default('') }}"


def publish(
    server: Server, built_base: Path, name: str, data: dict[str, Any], seed: int = 5, **lineage: Any
) -> Version:
    """A version whose recipe had these settings of data."""
    base = read_record(built_base)
    with tempfile.TemporaryDirectory() as folder:
        shapes = llama_shapes(AutoConfig.from_pretrained(base.folder))
        files = write_random(Path(folder), shapes, fingerprint=base.fingerprint, seed=seed)
        recipe = {"resolved": {"data": data}}
        return server.registry.publish(name, files, {"base": base.lineage(), "recipe": recipe, **lineage})


def ask(server: Server, model: str, **body: Any) -> Any:
    """One token of an answer to MESSAGES."""
    return server.http.post(
        "/v1/chat/completions", json={"model": model, "messages": MESSAGES, "max_tokens": 1, **body}
    )


def num_tokens(server: Server, text: str) -> int:
    """How many tokens a text has by itself."""
    reply = server.http.post("/tokenize", json={"model": "tiny", "prompt": text, "add_special_tokens": False})
    return int(reply.json()["count"])


def test_the_template_of_the_recipe_writes_the_prompt(server: Server, built_base: Path) -> None:
    """A chat template and its arguments that a version was trained with are used, and those of the request go first."""
    publish(server, built_base, "joined", {"chat_template": JOINED, "template_args": {"mark": "!!"}})

    trained = ask(server, "joined").json()["usage"]["prompt_tokens"]
    other = ask(server, "joined", chat_template_kwargs={"mark": ""}).json()["usage"]["prompt_tokens"]

    assert trained == num_tokens(server, "Be brief.one two!!")
    assert other == num_tokens(server, "Be brief.one two")


def test_the_system_message_stands_where_it_stood(server: Server, built_base: Path) -> None:
    """With `system_role = "user"` the system message is put before the user's, as in training."""
    publish(server, built_base, "merged", {"system_role": "user", "chat_template": JOINED})

    assert ask(server, "merged").json()["usage"]["prompt_tokens"] == num_tokens(server, "Be brief.\n\none two")


@pytest.mark.parametrize("origin", ["pulled_from", "imported_from"])
def test_templates_of_others_are_not_run(server: Server, built_base: Path, origin: str) -> None:
    """A version from elsewhere that brings a template of its own is refused with the way out, not asked otherwise."""
    name = origin.replace("_", "-")
    publish(server, built_base, name, {"chat_template": JOINED}, **{origin: {}})

    reply = ask(server, name)

    assert reply.status_code == 400
    assert "/v1/completions" in reply.json()["error"]["message"]


def test_what_is_no_setting_counts_for_nothing(server: Server, built_base: Path) -> None:
    """A lineage with other forms in these places is asked like the base."""
    publish(server, built_base, "odd", {"template_args": [1], "system_role": 7, "date": "tomorrow"})

    assert ask(server, "odd").json()["usage"]["prompt_tokens"] == ask(server, "tiny").json()["usage"]["prompt_tokens"]


def test_a_mix_of_different_ways_is_asked_like_the_base(server: Server, built_base: Path) -> None:
    """Parts that were trained differently have no way in common: the base's counts."""
    publish(server, built_base, "one-way", {"chat_template": JOINED})
    publish(server, built_base, "other-way", {"system_role": "user"}, seed=6)

    mixed = ask(server, "one-way*0.5+other-way*0.5").json()["usage"]["prompt_tokens"]

    assert mixed == ask(server, "tiny").json()["usage"]["prompt_tokens"]

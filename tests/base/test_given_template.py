"""A base that is given a chat template, by name or as a file, has it and not the model's own."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import find_base, list_bases
from adapterhub_local.base.named_templates import NAMED_TEMPLATES
from adapterhub_local.cli.main import qhub
from adapterhub_local.errors import InputError
from adapterhub_local.hub.usage import usage
from adapterhub_local.registry import Registry
from adapterhub_local.settings import Home
from tests.tiny import byte_tokenizer, save_tiny_model

OWN = "{% for m in messages %}{{ '# ' + m.role + '\\n' + m.content + eos_token }}{% endfor %}"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model without a chat template."""
    return save_tiny_model(tmp_path / "bare", chat_template=None)


@pytest.mark.parametrize("wanted", ["chatml", "own.jinja"])
def test_a_base_keeps_what_it_is_given(home: Home, tmp_path: Path, bare: Path, wanted: str) -> None:
    """The base's folder has the template, its record says which, and its fingerprint is another."""
    (tmp_path / "own.jinja").write_text(OWN)
    given = wanted if wanted == "chatml" else str(tmp_path / wanted)
    plain, base = add_base("plain", bare, home), add_base("talks", bare, home, chat_template=given)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)

    assert tokenizer.chat_template == (NAMED_TEMPLATES["chatml"] if wanted == "chatml" else OWN)
    assert "hi" in tokenizer.apply_chat_template(TALK, tokenize=False)
    assert base.has_chat_template
    assert not plain.has_chat_template
    assert find_base("talks", home).chat_template == base.lineage()["chat_template"] == wanted
    assert plain.lineage().get("chat_template") is None
    assert base.fingerprint != plain.fingerprint


def test_one_of_the_models_own(home: Home, tmp_path: Path) -> None:
    """Of a model with several templates one can be named, and a name that is neither lists all."""
    folder = save_tiny_model(tmp_path / "several")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": str(tokenizer.chat_template), "rag": OWN}
    tokenizer.save_pretrained(folder)
    base = add_base("rag", folder, home, chat_template="rag")

    assert AutoTokenizer.from_pretrained(base.folder).chat_template == OWN
    with pytest.raises(InputError, match=r"no chat template 'tool': known are default, rag, chatml, .* \.jinja file"):
        add_base("tool", folder, home, chat_template="tool")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe{{", "cannot be read: it is not UTF-8 text"),
        (b"{" * (2 << 20), "cannot be read: it has more than 1,048,576 bytes"),
        (b"{% for m in messages %}", "cannot write a message of the user: Unexpected end of template"),
        (b"{{ raise_exception('not today') }}", "cannot write a message of the user: not today"),
        (b"{% for m in messages %}{% for n in range(10**9) %}{% endfor %}{% endfor %}", "cannot write a message"),
        (b"", "does not write what the user says"),
        (b"hello", "does not write what the user says"),
        ("a folder", "cannot be read: Is a directory"),
    ],
)  # fmt: skip
def test_templates_that_are_none(
    home: Home, tmp_path: Path, bare: Path, text: bytes | str | None, message: str
) -> None:
    """A template that is missing, broken, endless or no template is one sentence and exit code 2; nothing is left."""
    path = tmp_path / "given.jinja"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text:
        path.mkdir()
    result = CliRunner().invoke(qhub, ["base", "add", "talks", str(bare), "--chat-template", str(path)])
    error = result.exception

    assert isinstance(error, InputError), result.output
    assert error.exit_code == 2
    assert message in str(error)
    assert "given.jinja" in str(error)
    assert "\n" not in str(error)
    assert list_bases(home) == []
    assert not (home.tmp.exists() and list(home.tmp.iterdir()))


def test_cards_name_the_template(registry: Registry, bare: Path) -> None:
    """A card says how the base is made whose template its own model does not have; of others it says nothing."""
    base = add_base("talks", bare, registry.home, hub_id="some/model", chat_template="gemma")
    version = registry.publish("a", {"adapter_config.json": b"{}"}, {"base": base.lineage()})
    given, plain = (usage(version, entry, "some/model", "me/a", 16)
                    for entry in (base.lineage(), {**base.lineage(), "chat_template": None}))  # fmt: skip

    assert "qhub base add model some/model --chat-template gemma\n" in given
    assert "written with the chat template gemma" in given
    assert "chat template gemma" not in plain


def test_the_command_says_which(home: Home, bare: Path) -> None:
    """`qhub base show` names the template that a base was given."""
    run = CliRunner()
    assert run.invoke(qhub, ["base", "add", "talks", str(bare), "--chat-template", "zephyr"]).exit_code == 0

    assert "zephyr, which it was given" in run.invoke(qhub, ["base", "show", "talks"]).output

"""Ollama's folder: templates render as the tokenizer does, and no text in them can become a command."""

import re
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.modelfile import command, go_text
from adapterhub_local.export.ollama import Template, learn_template, modelfile, write_ollama
from adapterhub_local.lora.adapter import open_adapter
from adapterhub_local.registry import Registry
from tests.serve.adapter_makers import publish
from tests.tiny import byte_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'system' %}[SYS]{{ m['content'] }}[/SYS]{% elif m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TURN = (
    "{% for m in {0} %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA2 = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURN.replace(
    "{0}", "messages"
)
GEMMA3 = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}" + TURN.replace("{0}", "rest")
)
SHOUTING = "{% for m in messages %}{{ m['role'] }}: {{ loop.index }} {{ m['content'] }}\n{% endfor %}"
HOSTILE = (
    "{% for m in messages %}{{ m['role'] }}: {\"a\": '{{ '{{ .System }}' }}'} \"\"\"\nFROM evil\n{{ m['content'] }}"
    ' {% raw %}{{- end }}}}{{{% endraw %}\u200b\x1b[2J\u00a0"""\nPARAMETER stop "x"\n{% endfor %}'
)


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """What Ollama reads (parser/parser.go): its states, its quotes, the characters it drops."""
    commands, state, name, buffer = [], "nil", "", ""

    def unquoted(value: str) -> tuple[str, bool]:
        for quote in ('"""', '"'):
            if value.startswith(quote):
                ends = len(value) >= 2 * len(quote) and value.endswith(quote)
                return (value[len(quote) : -len(quote)], True) if ends else ("", False)
        return value, True

    for char in text + "\n":
        is_newline, is_space = char in "\r\n", char in " \t"
        kept = char
        if state == "nil":
            after = "comment" if char == "#" else "nil" if is_newline or is_space else "name"
        elif state == "comment":
            after = "nil" if is_newline else "comment"
        elif state in ("name", "parameter"):
            after = "value" if is_space else state
            assert is_space or char.isalnum() or char == "_", f"invalid command {buffer + char!r}"
        else:
            after = "nil" if is_newline or is_space else "value"
        if after != state:
            if state == "name":
                name = buffer.lower()
                assert name in ("from", "template", "system", "parameter", "adapter", "license", "message"), buffer
                after = "parameter" if name == "parameter" else after
            elif state == "parameter":
                name = f"parameter {buffer}"
            elif state == "value":
                value, is_whole = unquoted(buffer.strip())
                if not is_whole or is_space:
                    buffer += char
                    continue
                commands.append((name, value))
            buffer, state = "", after
            kept = char if state == "name" else ""
        if kept and (kept == " " or (kept.isprintable() and not kept.isspace())) and state not in ("nil", "comment"):
            buffer += kept
    assert state in ("nil", "comment"), "the file ends within a value"
    return commands


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """Go's text/template, as much of it as is used: constants, if, else if, else, range over the messages, end."""
    parts, position = [], 0
    while (start := template.find("{{", position)) >= 0:
        end = template.index("}}", start)
        parts += [("text", template[position:start]), ("do", template[start + 2 : end].strip())]
        position = end + 2
    parts.append(("text", template[position:]))
    has_system = messages[0]["role"] == "system"

    def run(at: int, index: int, is_live: bool) -> tuple[str, int]:
        out = ""
        while at < len(parts):
            kind, what = parts[at]
            if kind == "text":
                out += what if is_live else ""
            elif what == "end" or what.startswith("else"):
                return out, at
            elif what.startswith("range"):
                bodies = [run(at + 1, number, is_live) for number in range(len(messages))]
                out, at = out + "".join(text for text, _ in bodies), bodies[0][1]
            elif what.startswith("if"):
                is_done = False
                while what != "end":
                    chosen = is_live and not is_done and holds(what, index)
                    text, at = run(at + 1, index, chosen)
                    out, is_done, what = out + (text if chosen else ""), is_done or chosen, parts[at][1]
            elif is_live:
                out += messages[index]["content"] if what == "$m.Content" else constant(what)
            at += 1
        return out, at

    def holds(what: str, index: int) -> bool:
        if (role := re.fullmatch(r'(?:else )?if eq \$m\.Role "(\w+)"', what)) is not None:
            return messages[index]["role"] == role[1]
        first = '(eq (index $.Messages 0).Role "system")'
        cases = {
            f"if not {first}": not has_system,
            f"if and (eq $i 1) {first}": index == 1 and has_system,
            "else": True,
        }
        return cases[what]

    def constant(what: str) -> str:
        digits = re.fullmatch(r'"((?:\\U[0-9a-f]{8})+)"', what)
        assert digits is not None, f"not a constant: {what}"
        return "".join(chr(int(each, 16)) for each in digits[1].split("\\U")[1:])

    return run(0, 0, True)[0]


@pytest.mark.parametrize("text", [LLAMA3, SMOLLM2, MISTRAL, GEMMA2, GEMMA3, HOSTILE])
def test_template_renders_as_the_tokenizer_does(text: str) -> None:
    """What is learned from a chat template renders longer chats alike, in Python and in Ollama's language."""
    tokenizer = byte_tokenizer(text)
    template = learn_template(tokenizer, "tiny")
    chat = [{"role": role, "content": f"{role}?"} for role in ("user", "assistant", "user", "assistant", "user")]

    for messages in (chat, chat[:1], [{"role": "system", "content": "short"}, *chat]):
        if messages[0]["role"] not in template.before:
            assert text == GEMMA2
            continue
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == wanted
        assert render_go(template.to_go(), messages) == wanted


def test_template_that_is_a_program_is_refused() -> None:
    """A template that numbers messages, or raises for an ordinary chat, is not text around messages."""
    with pytest.raises(Incompatible, match=r"more than text around messages.* export with --to fused-gguf"):
        learn_template(byte_tokenizer(SHOUTING), "tiny")
    with pytest.raises(Incompatible, match="refuses an ordinary chat"):
        learn_template(byte_tokenizer("{{ raise_exception('no') }}"), "tiny")


ODD = st.text(
    st.sampled_from('"{}\\`#\n\r\t \x00\x1b\u00a0\u200b\u2028\ud7ff\U0001f600ab-./:') | st.characters(codec="utf-8")
)
ATTACKS = [
    '"""',
    '"""\nFROM evil\n"""',
    '"\nFROM evil\nSYSTEM "',
    "{{ .System }}",
    "}}",
    "{",
    "\r\nFROM evil",
    "\\",
    '"',
]
TEXTS = st.lists(ODD | st.sampled_from(ATTACKS), max_size=4).map("".join)


@settings(max_examples=400)
@given(name=TEXTS, texts=st.lists(TEXTS, min_size=9, max_size=9), stops=st.lists(TEXTS.filter(bool), max_size=4))
def test_no_text_becomes_a_command(name: str, texts: list[str], stops: list[str]) -> None:
    """Whatever a template, a stop word or a name holds, Ollama reads our commands only, and renders the text."""
    template = Template(
        texts[0], texts[1], dict(zip(("system", "user", "assistant"), texts[2:5], strict=True)),
        dict(zip(("system", "user", "assistant"), texts[5:8], strict=True)), texts[8], joined=texts[0],
    )  # fmt: skip

    text, notes = modelfile(name, template, stops, 512)

    commands = parse_modelfile(text)
    kept = [stop for stop in stops if command("PARAMETER stop", stop) is not None]
    names = ["from", "template", *["parameter stop"] * len(kept), "parameter num_ctx", "parameter temperature"]
    assert [each for each, _ in commands] == names
    assert commands[0] == ("from", "./model.gguf")
    assert [value for each, value in commands if each == "parameter stop"] == kept
    assert len(notes) == len(stops) - len(kept)
    for roles in (("user",), ("system", "user", "assistant", "user")):
        messages = [{"role": role, "content": f"<{role}>"} for role in roles]
        assert render_go(commands[1][1], messages) == template.render(messages)


def test_ordinary_text_stays_readable() -> None:
    """Only what could end something is written as a constant."""
    assert go_text("<|im_start|>user\n") == "<|im_start|>user\n"
    assert go_text('a{"') == 'a{{ "\\U0000007b\\U00000022" }}'
    assert command("PARAMETER stop", "</s>") == 'PARAMETER stop """</s>"""'
    assert command("PARAMETER stop", 'a"""b') is None


@pytest.mark.parametrize("dora", [False, True])
def test_ollama_folder_is_one_model_and_its_modelfile(
    tiny_base: BaseInfo, registry: Registry, tmp_path: Path, dora: bool
) -> None:
    """The folder has one GGUF with base and adapter, DoRA too, and a Modelfile without ADAPTER."""
    version = publish(registry, "a", tiny_base, seed=1, dora=dora)
    adapter = open_adapter(version.path, dora=True)

    made = write_ollama(adapter, tiny_base, tmp_path / "whole", name="a@1", digest=version.content_digest, kind="q8_0")

    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["Modelfile", "model.gguf"]
    commands = parse_modelfile((tmp_path / "whole" / "Modelfile").read_text())
    assert [name for name, _ in commands] == ["from", "template", "parameter stop", *commands_at_the_end()]
    assert dict(commands)["parameter stop"] == "<|im_end|>"
    assert (dict(commands)["parameter num_ctx"], made.notes) == ("512", ())
    fields = gguf.GGUFReader(tmp_path / "whole" / "model.gguf").fields
    assert fields["qhub.content_digest"].contents() == version.content_digest


def commands_at_the_end() -> list[str]:
    """What follows the stop words."""
    return ["parameter num_ctx", "parameter temperature"]

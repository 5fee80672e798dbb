"""A folder for `ollama create`: GGUF adapter, base, and a Modelfile with the base's chat template and stop words.

Ollama's templates are Go, a tokenizer's are Jinja: the chat is rendered with marked messages, the text around them
becomes the template, and the result is held against further chats before it is believed.
"""

import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.durable import check_absent, place_folder, staging
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.fused import write_fused
from adapterhub_local.export.gguf import write_gguf
from adapterhub_local.lora.adapter import AdapterFile

ROLES = ("system", "user", "assistant")
ADAPTER, MODELFILE, BASE = "adapter.gguf", "Modelfile", "base"
LONGEST = 8192  # tokens of context; Ollama reserves memory for all of them
_MARK = "\u00a7{}\u00a7"  # no template has it
_CHATS = (  # what the template must render as the tokenizer does; the system message, if there is one, comes first
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True)
class Template:
    """A chat as text around messages: `start` is always there, `without_system` if no system message is first,
    then `before[role]` + content + `after[role]` for each message, then `answer`, where the model goes on.
    """

    start: str
    without_system: str
    before: dict[str, str]
    after: dict[str, str]
    answer: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """What the model is given for a chat."""
        head = self.start + ("" if messages[0]["role"] == "system" else self.without_system)
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return head + "".join(turns) + self.answer

    def to_go(self) -> str:
        """The same in Ollama's language (Go's text/template)."""
        default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.without_system}{{{{ end }}}}'
        turns = "".join(
            f'{{{{ {"if" if role == ROLES[0] else "else if"} eq .Role "{role}" }}}}'
            f"{self.before[role]}{{{{ .Content }}}}{self.after[role]}"
            for role in ROLES
        )
        head = self.start + (default if self.without_system else "")
        return f"{head}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def write_ollama(
    adapter: AdapterFile, base: BaseInfo, target: Path, *, name: str, digest: str, from_model: str | None = None
) -> None:
    """Write the folder `target`. `from_model` is the base as Ollama or a path names it; else it is written too.

    What DoRA changes is in the base that is written, there is no adapter beside it then. Raises InUse if `target`
    exists, Incompatible for a chat template that is more than text around messages, or DoRA with `from_model`.
    """
    check_absent(target)
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    template = learn_template(tokenizer, base.name) if base.has_chat_template else None
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        folder = stage / "ollama"
        folder.mkdir()
        is_fused = bool(adapter.magnitudes) and from_model is None
        if not is_fused:
            write_gguf(adapter, base, folder / ADAPTER, name=name, digest=digest)
        if from_model is None:
            write_fused(base, adapter if is_fused else None, folder / BASE)
        text = modelfile(
            from_model or f"./{BASE}", name, template, _stops(tokenizer, template), base.max_length,
            adapter=None if is_fused else ADAPTER,
        )  # fmt: skip
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        place_folder(folder, target)


def modelfile(
    from_model: str, name: str, template: Template | None, stops: list[str], max_length: int | None,
    *, adapter: str | None = ADAPTER,
) -> str:  # fmt: skip
    """The text of a Modelfile (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx)."""
    lines = [f"# {name}: ollama create NAME -f {MODELFILE}", f"FROM {from_model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    if template is not None:
        lines.append(f'TEMPLATE """{template.to_go()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if max_length:
        lines.append(f"PARAMETER num_ctx {min(max_length, LONGEST)}")
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"  # greedy, as adapters are scored


def learn_template(tokenizer: Any, base_name: str) -> Template:
    """The text around messages in the tokenizer's chat template. Raises Incompatible if it is not only that."""
    bos = ""  # a tokenizer that begins every text with a token does so in llama.cpp too
    if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        bos = tokenizer.bos_token

    def rendered(roles: tuple[str, ...], generate: bool) -> str:
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return text.removeprefix(bos)

    try:
        template = _learn(rendered)
        chats = {roles: rendered(roles, True) for roles in _CHATS}
    except Exception as error:  # a template is a program, and may raise whatever it likes
        raise Incompatible(f"the chat template of base '{base_name}' refuses an ordinary chat: {error}") from None
    pieces = [template.start, template.without_system, template.answer, *template.before.values()]
    is_plain = not any(odd in piece for piece in [*pieces, *template.after.values()] for odd in ("{{", "}}", '"""'))
    for roles, expected in chats.items():
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        if not is_plain or template.render(messages) != expected:
            raise Incompatible(
                f"the chat template of base '{base_name}' is more than text around messages, so Ollama's language "
                "cannot say it: export with --to gguf and write the Modelfile by hand"
            )
    return template


def _learn(rendered: Callable[[tuple[str, ...], bool], str]) -> Template:
    """The pieces, from one long chat and one of a user alone; whether they are right is not known yet."""
    chat = re.split(_MARK.format(r"\d"), rendered(("system", "user", "assistant", "user"), False))
    opening, system_to_user, user_to_assistant, assistant_to_user, after_user = chat
    alone = rendered(("user",), False).split(_MARK.format(0))[0]
    before_user = assistant_to_user.removeprefix(after_user)  # most end an assistant's turn as they end a user's
    if not (system_to_user.endswith(before_user) and alone.endswith(before_user)):
        before_user = _common_end(system_to_user, assistant_to_user, alone)
    head = alone[: len(alone) - len(before_user)]
    start = os.path.commonprefix([opening, head])
    return Template(
        start=start,
        without_system=head[len(start) :],
        before={
            "system": opening[len(start) :],
            "user": before_user,
            "assistant": user_to_assistant.removeprefix(after_user),
        },
        after={
            "system": system_to_user[: len(system_to_user) - len(before_user)],
            "user": after_user,
            "assistant": assistant_to_user[: len(assistant_to_user) - len(before_user)],
        },
        answer=rendered(("user",), True).removeprefix(rendered(("user",), False)),
    )


def _common_end(*texts: str) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _stops(tokenizer: Any, template: Template | None) -> list[str]:
    """The tokens that end an answer: the tokenizer's own, and what the template puts behind one."""
    behind = template.after["assistant"] if template is not None else ""
    ending = [token for token in tokenizer.get_added_vocab() if token and behind.startswith(token)]
    stops = dict.fromkeys([*([tokenizer.eos_token] if tokenizer.eos_token else []), *ending])
    return [stop for stop in stops if '"' not in stop]

"""A folder for `ollama create`: one GGUF with base and adapter, and a Modelfile with chat template and stop words.

Ollama's templates are Go, a tokenizer's are Jinja: the chat is rendered with marked messages, the text around them
becomes the template, and the result is held against further chats before it is believed.
"""

import os.path
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.base.renderer import chat_text
from adapterhub_local.durable import check_absent, place_folder, staging
from adapterhub_local.errors import Incompatible
from adapterhub_local.export.formats import TYPES, Request, Written
from adapterhub_local.export.gguf_model import MODEL, FusedGguf, write_gguf_model
from adapterhub_local.export.modelfile import command, go_text
from adapterhub_local.export.opening import open_request, size_text
from adapterhub_local.lora.adapter import AdapterFile

ROLES = ("system", "user", "assistant")
MODELFILE = "Modelfile"
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

    `joined` is what stands before the first user's message instead if a system message was put into its turn, as
    Gemma does. A template without "system" in `before` refuses system messages.
    """

    start: str
    without_system: str
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    joined: str | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """What the model is given for a chat."""
        has_system = messages[0]["role"] == "system"
        text = self.start + ("" if has_system else self.without_system)
        for index, message in enumerate(messages):
            before = self.before[message["role"]]
            if index == 1 and has_system and self.joined is not None:
                before = self.joined
            text += before + message["content"] + self.after[message["role"]]
        return text + self.answer

    def to_go(self) -> str:
        """The same in Ollama's language (Go's text/template)."""
        is_first = '(eq (index $.Messages 0).Role "system")'
        head = go_text(self.start)
        if self.without_system:
            head += f"{{{{ if not {is_first} }}}}{go_text(self.without_system)}{{{{ end }}}}"
        before = {role: go_text(text) for role, text in self.before.items()}
        if self.joined is not None:
            first = f"{{{{ if and (eq $i 1) {is_first} }}}}"
            before["user"] = f"{first}{go_text(self.joined)}{{{{ else }}}}{before['user']}{{{{ end }}}}"
        turns = "".join(
            f'{{{{ {"else if" if number else "if"} eq $m.Role "{role}" }}}}'
            f"{before[role]}{{{{ $m.Content }}}}{go_text(self.after[role])}"
            for number, role in enumerate(self.before)
        )
        return f"{head}{{{{ range $i, $m := .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{go_text(self.answer)}"


def export(request: Request) -> Written:
    """The version and its base as a folder for Ollama; see `write_ollama`."""
    adapter, base = open_request(request)
    version, kind = request.version, request.kind or TYPES[0]
    made = write_ollama(
        adapter, base, request.target, name=str(version), digest=version.content_digest, kind=kind,
        vocabulary=request.vocabulary, progress=request.progress,
    )  # fmt: skip
    report = {"base": base.name, "type": kind, "size": made.size, "context": made.context}
    name = version.name.replace("/", "-")
    return Written(report, f"{size_text(made.size)}: ollama create {name} -f {request.target}/{MODELFILE}", made.notes)


def write_ollama(
    adapter: AdapterFile, base: BaseInfo, target: Path, *, name: str, digest: str, kind: str = "f16",
    vocabulary: Path | None = None, progress: Callable[[int, int], None] | None = None,
) -> FusedGguf:  # fmt: skip
    """Write the folder `target`: one GGUF with base and adapter, DoRA too, and the Modelfile.

    There is no ADAPTER line: newer versions of Ollama refuse it. Raises InUse if `target` exists, Incompatible for a
    chat template that is more than text around messages, and what `write_gguf_model` raises.
    """
    check_absent(target)
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    template = learn_template(tokenizer, base.name) if base.has_chat_template else None
    with staging(target.absolute().parent, prefix=".qhub-") as stage:
        folder = stage / "ollama"
        folder.mkdir()
        made = write_gguf_model(
            base, adapter, folder / MODEL, name=name, digest=digest, kind=kind, vocabulary=vocabulary, progress=progress
        )
        text, notes = modelfile(name, template, _stops(tokenizer, template), made.context)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        place_folder(folder, target)
    if template is not None and "system" not in template.before:
        notes.append("the base's chat template takes no system message: Ollama leaves them out")
    return FusedGguf(made.size, made.context, (*made.notes, *notes))


def modelfile(name: str, template: Template | None, stops: Iterable[str], context: int) -> tuple[str, list[str]]:
    """The text of a Modelfile (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx), and what it leaves out.

    Whatever template and stops hold, the commands are these and no others.
    """
    title = re.sub(r"[^ -~]", "?", name)
    lines, notes = [f"# {title}: ollama create NAME -f {MODELFILE}", f"FROM ./{MODEL}"], []
    if template is not None:
        written = command("TEMPLATE", template.to_go())
        assert written is not None, "go_text leaves nothing that a Modelfile cannot hold"
        lines.append(written)
    for stop in stops:
        if (written := command("PARAMETER stop", stop)) is not None:
            lines.append(written)
        else:
            notes.append(f"the stop word {stop!r} cannot be written in a Modelfile")
    lines.append(f"PARAMETER num_ctx {min(context, LONGEST)}")
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n", notes  # greedy, as adapters are scored


def learn_template(tokenizer: Any, base_name: str) -> Template:
    """The text around messages in the tokenizer's chat template. Raises Incompatible if it is not only that."""
    bos = ""  # a tokenizer that begins every text with a token does so in llama.cpp too
    if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        bos = tokenizer.bos_token

    def rendered(roles: tuple[str, ...], generate: bool) -> str:
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        return chat_text(tokenizer, messages, begins_answer=generate).removeprefix(bos)

    try:
        template = _learn(rendered)
        roles_known = set(template.before)
        chats = {roles: rendered(roles, True) for roles in _CHATS if roles_known >= set(roles)}
    except Exception as error:  # a template is a program, and may raise whatever it likes
        raise Incompatible(f"the chat template of base '{base_name}' refuses an ordinary chat: {error}") from None
    for roles, expected in chats.items():
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        if template.render(messages) != expected:
            raise Incompatible(
                f"the chat template of base '{base_name}' is more than text around messages, so Ollama's language "
                "cannot hold it: export with --to fused-gguf, which has the template as it is, and write the Modelfile "
                "by hand"
            )
    return template


def _learn(rendered: Callable[[tuple[str, ...], bool], str]) -> Template:
    """The pieces, from a long chat and one of a user alone; whether they are right is not known yet."""
    mark = _MARK.format(r"\d")
    alone = re.split(mark, rendered(("user",), False))[0]
    turns = re.split(mark, rendered(("user", "assistant", "user"), False))
    _, user_to_assistant, assistant_to_user, after_user = turns
    answer = rendered(("user",), True).removeprefix(rendered(("user",), False))
    try:
        opening, system_to_user = re.split(mark, rendered(("system", "user"), False))[:2]
    except Exception:  # Gemma 2's raises: it has no system message
        opening = system_to_user = None
    before_user = assistant_to_user.removeprefix(after_user)  # most end an assistant's turn as they end a user's
    others = [alone] if system_to_user is None else [alone, system_to_user]
    joined = None
    if not all(text.endswith(before_user) for text in others):
        if system_to_user is not None and alone.endswith(before_user) and opening == alone:
            joined = ""  # the system message stands in the user's turn
        else:
            before_user = _common_end(assistant_to_user, *others)
    head = alone[: len(alone) - len(before_user)]
    before = {"user": before_user, "assistant": user_to_assistant.removeprefix(after_user)}
    after = {"user": after_user, "assistant": assistant_to_user[: len(assistant_to_user) - len(before_user)]}
    start = head
    if opening is not None and system_to_user is not None:
        start = os.path.commonprefix([opening, head])
        end = len(system_to_user) - (0 if joined is not None else len(before_user))
        before = {"system": opening[len(start) :], **before}
        after = {"system": system_to_user[:end], **after}
    return Template(start, head[len(start) :], before, after, answer, joined)


def _common_end(*texts: str) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _stops(tokenizer: Any, template: Template | None) -> list[str]:
    """The tokens that end an answer: the tokenizer's own, and what the template puts behind one."""
    behind = template.after["assistant"] if template is not None else ""
    ending = [token for token in tokenizer.get_added_vocab() if token and behind.startswith(token)]
    stops = dict.fromkeys([*([tokenizer.eos_token] if tokenizer.eos_token else []), *ending])
    return list(stops)

"""A model card that people edit: of a new push only our block and our keys change, all else stays theirs."""

from typing import Any

import yaml

from adapterhub_local.errors import InputError

BEGIN = "<!-- qhub: what is between this line and the next of its kind is written anew by every `qhub push` -->"
END = "<!-- qhub: end; what is outside of these lines stays as you edit it -->"
OURS = ("library_name", "base_model", "base_model_relation", "pipeline_tag", "model-index")  # replaced, or removed
LICENCE = ("license", "license_name", "license_link")  # theirs, unless one was asked for


def block(text: str) -> str:
    """Our part of a card, between its two lines."""
    return f"{BEGIN}\n\n{text.strip()}\n\n{END}"


def merged(theirs: str, ours: str, *, is_licence_asked: bool, where: str) -> str:
    """The card of a new push, `ours`, in the one that is there, `theirs`.

    A card without our lines keeps all of its text, below ours. Raises InputError if its front matter is not YAML.
    """
    matter, body = _parts(theirs, where)
    fresh, text = _parts(ours, where)
    keys = dict(matter)
    for key in OURS:
        keys.pop(key, None)
    licence = {key: keys.pop(key) for key in LICENCE if key in keys}
    if is_licence_asked or "license" not in licence:
        licence = {key: fresh[key] for key in LICENCE if key in fresh} or licence
    tags = [*_tags(matter), *(tag for tag in _tags(fresh) if tag not in _tags(matter))]
    whole = {**licence, **{key: fresh[key] for key in OURS if key in fresh}, **keys, "tags": tags}
    front = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=1000)
    start, end = body.find(BEGIN), body.rfind(END)
    if 0 <= start < end:
        mine = text[text.find(BEGIN) : text.rfind(END) + len(END)]
        body = body[:start] + mine + body[end + len(END) :]
    else:
        body = f"{text.strip()}\n\n{body.strip()}\n" if body.strip() else text
    return f"---\n{front}---\n\n{body.strip()}\n"


def _parts(card: str, where: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    card = card.replace("\r\n", "\n").lstrip("\ufeff")
    if not card.startswith("---\n"):
        return {}, card
    front, line, body = f"\n{card[4:]}".partition("\n---\n")
    if not line and card.rstrip().endswith("\n---"):
        front, body = card.rstrip()[4:-4], ""
    try:
        matter = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the front matter of the model card of {where} is not YAML ({reason}): fix it there"
        ) from None
    if matter is None:
        return {}, body
    if not isinstance(matter, dict):
        raise InputError(f"the front matter of the model card of {where} is not a table of keys: fix it there")
    return matter, body


def _tags(matter: dict[str, Any]) -> list[Any]:
    tags = matter.get("tags")
    return tags if isinstance(tags, list) else [tags] if isinstance(tags, str) else []

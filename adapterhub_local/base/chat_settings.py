"""How conversations are written where that is not the base's default, as a version keeps it and the server uses it."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.errors import InputError

DAY = "2026-01-01"  # what templates that print today's date print in training, so that a run does not depend on its day


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are written, where that is not the base's default. A version keeps it, and the server uses it.

    template_args: variables of the chat template. chat_template: its text, the name of one of the tokenizer's, or of
    `NAMED_TEMPLATES`; None for the base's. system_role: `system`, or `user` to put system messages before the next
    message of the user. control_tokens: `text`, or `tokens` where texts hold ready-made marks. day: ISO date.
    """

    template_args: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    system_role: str = "system"
    control_tokens: str = "text"
    day: str | None = None

    @classmethod
    def of_lineage(cls, lineage: Mapping[str, Any]) -> "ChatSettings":
        """How the conversations that a version was trained on were written; the defaults if it was not trained.

        Raises InputError where a version from elsewhere brings a template of its own: that is a program.
        """
        recipe = lineage.get("recipe")
        resolved = recipe.get("resolved") if isinstance(recipe, dict) else None
        data = resolved.get("data") if isinstance(resolved, dict) else None
        if not isinstance(data, dict):
            return DEFAULTS
        arguments, template = data.get("template_args"), data.get("chat_template")
        is_foreign = "pulled_from" in lineage or "imported_from" in lineage
        if is_foreign and isinstance(template, str) and is_source(template):
            raise InputError(
                "it was trained elsewhere with a chat template of its own, and templates of others are not run: "
                "ask with /v1/completions and a prompt as it was trained"
            )
        return cls(
            template_args=arguments if isinstance(arguments, dict) else {},
            chat_template=template if isinstance(template, str) else None,
            system_role="user" if data.get("system_role") == "user" else "system",
            control_tokens="tokens" if data.get("control_tokens") == "tokens" and not is_foreign else "text",
            day=_day(data.get("date")) or DAY,
        )

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {key: value for key, value in vars(self).items() if value != getattr(DEFAULTS, key)}


DEFAULTS = ChatSettings()


def _day(value: Any) -> str | None:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        return None


def is_source(text: str) -> bool:
    """Whether it is a template's text and not a name."""
    return "{" in text or "\n" in text

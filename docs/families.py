"""The table of chat templates that training is tested with, from the very families of the tests.

python -m docs.families        # writes recipes/families.md
"""

import sys
from pathlib import Path

from adapterhub_local.base.tool_format import format_of
from tests.rows.conversations import KINDS, THOUGHT, tokenised
from tests.rows.families import FAMILIES
from tests.rows.family import Family, tokenizer_of

PAGE = Path(__file__).resolve().parent.parent / "recipes" / "families.md"
COLUMNS = ("family", "several turns", "system", "tools", "thoughts", "remarks")
ABOUT = """# Chat templates

Templates that do what those of these families do with turns, ends, system messages, tools and thoughts. For each the
tests hold training to one law: every answer is learned once, behind the tokens that the server sends for it, up to a
token at which the server stops; nothing that a user, a tool or the system says is learned; every message is in what
was written, or the run says what the template left out. `python -m docs.families` makes this page.

- **several turns**: *one example* holds all answers of a chat; *one an answer* where the template writes an answer
  differently once more turns follow.
- **system**: *first only* and *no* are an error that names the way on, `data.system_role = "user"`, which puts system
  messages before the user's text.
- **tools**: schemas, calls and results in *its own* form, where the server reads calls of that form; else *described*
  in the system's turn, with calls as text, as the server does for this template.
- **thoughts** of an answer (`reasoning_content`, or between marks): *forgotten later* are those that the prompts of
  later turns do not have; *no* is an error, as the template leaves them out, or asks for an answer without them
  (`data.template_args` may change that).
- **remarks**: where the prompt *opens a thought*, the answer continues it, or closes it at once. Where a token is
  *added*, the template ends an answer with nothing at which the server stops. A template that *prints a date* prints
  the same in every run (`data.date`). Where roles must *alternate*, two messages of the user in a row are an error.

Every template writes a chat of one question and one answer.

"""


def table() -> str:
    """A row for each family, in the order of their names."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *((name, *_cells(FAMILIES[name])) for name in sorted(FAMILIES))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _cells(family: Family) -> list[str]:
    system = "no" if "system" in family.lacks else "first only" if "second system" in family.lacks else "yes"
    return [
        "one an answer" if family.divides else "one example",
        system,
        "described" if format_of(family.template).is_prompted else "its own",
        _thoughts(family),
        "; ".join(_remarks(family)),
    ]


def _thoughts(family: Family) -> str:
    if "thoughts" in family.lacks:
        return "no"
    last = tokenised(family, KINDS["thoughts of earlier turns"]).examples[-1]
    return "yes" if THOUGHT in tokenizer_of(family).decode(last.ids[: last.spans[-1][0]]) else "forgotten later"


def _remarks(family: Family) -> list[str]:
    found = tokenised(family, KINDS["single"])
    (example,) = found.examples
    prompt = tokenizer_of(family).decode(example.ids[: example.spans[0][0]])
    opens = prompt.rfind("<think>") > prompt.rfind("</think>")
    variables = ", ".join(f"{name} = {str(value).lower()}" for name, value in family.variables)
    return [
        *([f"with {variables}"] if variables else []),
        *(["opens a thought"] if opens else []),
        *(f"`{stop}` added" for stop in found.stops),
        *(["prints a date"] if found.day else []),
        *(["alternate"] if "two users" in family.lacks else []),
    ]


def page() -> str:
    """The whole page."""
    return f"{ABOUT}{table()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

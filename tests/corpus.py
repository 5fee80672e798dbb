"""Every hostile input that the tests hold, in one table: files, archives, remotes, templates and requests.

python -m tests.corpus    # a line each: where it comes in, its name, its exit code or status, a word of the message
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.base.template_attacks import ATTACKS as TEMPLATES
from tests.base.template_attacks import HARMLESS
from tests.base.test_base_hostile import FILES, GGUF
from tests.lora.test_lora_attacks import ATTACKS as ADAPTERS
from tests.recipe.test_recipe_hostile import HOSTILE as RECIPES
from tests.registry.test_archive_attacks import CONTAINERS, CONTENTS, exit_code
from tests.registry.test_registry_sync_hostile import LIES
from tests.serve.attacks.bodies import BODIES
from tests.serve.attacks.forms import FORMS


@dataclass(frozen=True)
class Member:
    """One hostile input. `end` is an exit code or an HTTP status, `words` a part of the message, "" if accepted."""

    door: str
    name: str
    end: str
    words: str


def corpus() -> Iterator[Member]:
    """All members, each of which a test runs: that of the file that its table is from."""
    for name, (_, words) in ADAPTERS.items():
        yield Member("adapter", name, "exit 2", words)
    for name, (_, words) in {**CONTENTS, **CONTAINERS}.items():
        yield Member("archive", name, f"exit {exit_code(name)}", words)
    for part, said, code, words in LIES:
        yield Member("remote", f"{part} {said}"[:60], f"exit {code}", words)
    for name, (_, words) in GGUF.items():
        yield Member("GGUF", name, "exit 2", words)
    for name, (file, _, words) in FILES.items():
        yield Member("model", f"{name} ({file})", "exit 2", words)
    for name, (_, words) in TEMPLATES.items():
        yield Member("template", name, "nothing" if words == HARMLESS else "exit 2", words)
    for name, (_, words) in RECIPES.items():
        yield Member("recipe, plan", name, "exit 2", words)
    for name, attack in BODIES.items():
        yield Member("request", name, str(attack.status), attack.words)
    for name, (_, status, parameter, words) in FORMS.items():
        yield Member("form", name, str(status), words or parameter or "")


def main() -> None:
    """Print the table, and how many there are of each kind."""
    members = list(corpus())
    for one in members:
        sys.stdout.write(f"{one.door:13} {one.name:60} {one.end:8} {one.words}\n")
    counts = Counter(one.door for one in members)
    sys.stdout.write(f"{len(members)} members: {', '.join(f'{count} {door}' for door, count in counts.items())}\n")


if __name__ == "__main__":
    main()

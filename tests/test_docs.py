"""The README and the pages of the rooms say what is so."""

import ast
import re
from pathlib import Path

import pytest

from adapterhub_local.cli.main import VERBS
from adapterhub_local.recipe.reference import reference
from docs.families import PAGE as FAMILIES_PAGE
from docs.families import page as families_page
from tests.test_layout import ORDER

ROOT = Path(__file__).parent.parent
README_PATH = ROOT / "README.md"
README = README_PATH.read_text()
TUTORIALS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = sorted([ROOT / "recipes/README.md", ROOT / "serve/README.md", *(ROOT / "adapterhub_local").glob("*/README.md")])


def test_every_recipe_key_is_described() -> None:
    """The table of keys in recipes/README.md is the schema's (python -m adapterhub_local.recipe.reference)."""
    assert reference() in (ROOT / "recipes/README.md").read_text()


def test_the_table_of_chat_templates_is_what_happens() -> None:
    """recipes/families.md is made of the families of the tests (python -m docs.families)."""
    assert FAMILIES_PAGE.read_text(encoding="utf-8") == families_page()


def test_the_shown_recipe_is_shipped() -> None:
    """The recipe in the README is recipes/sentiment.toml."""
    assert (ROOT / "recipes/sentiment.toml").read_text().strip() in README


def test_every_verb_is_mentioned() -> None:
    """No command is left out of the README and its pages, and none that they show is unknown."""
    text = "\n".join([README, *(page.read_text() for page in PAGES)])
    shown = set(re.findall(r"qhub ([a-z]+(?:-[a-z]+)*)", text))

    assert set(VERBS) <= shown
    assert shown <= set(VERBS)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file of this project names one that is there, and every page of a room is linked by the README."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in target]

    assert not [target for target in targets if not (page.parent / target).exists()]
    assert page == ROOT / "README.md" or f"({page.relative_to(ROOT)})" in README


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    """Every path in backticks of the two maps leads to a file or folder, from the top or inside the library."""
    text = (ROOT / page).read_text()
    paths = re.findall(r"`([a-z_]+/[\w./]*)`", text)

    assert len(paths) > 20
    places = [
        path for path in paths if path.split("/")[0] not in ("build", "tmp", "quarantine", "bases", "blobs", "runs")
    ]
    assert not [path for path in places if not any((top / path).exists() for top in (ROOT, ROOT / "adapterhub_local"))]


def test_the_map_shows_the_rooms() -> None:
    """ARCHITECTURE.md lists every room that tests/test_layout.py orders, and none besides."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = text[text.index("## Rooms") : text.index("## The life of a recipe")]
    names = [name for line in re.findall(r"^ {4,}(\S.*?)(?: {2,}.*)?$", listed, re.M) for name in line.split()]

    assert sorted(names) == sorted([room.removeprefix("serve/") for room in ORDER] + ["serve/"])


def test_private_parts_of_other_libraries_are_listed() -> None:
    """What the code takes of another library under a name that begins with _ stands in ARCHITECTURE.md."""
    ours, taken = {"_exit", "_replace"}, {}  # os._exit and a named tuple's are documented
    for path in [*(ROOT / "adapterhub_local").rglob("*.py"), *(ROOT / "serve").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute | ast.alias):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                if re.match("_[^_]", name):
                    taken[name] = f"{path.relative_to(ROOT)}:{node.lineno}"
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Private parts of other libraries")[2]
    missing = {
        name: place for name, place in taken.items() if name not in ours and not re.search(rf"\b{name}\b", table)
    }
    assert len(taken.keys() - ours) > 10
    assert not missing


def test_the_site_builds(tmp_path: Path) -> None:
    """Every page is put together, every verb and option is in it with a meaning, and no link is broken."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    from docs.build import build

    pages = build(tmp_path / "docs")
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"))
    build_site(config)

    assert {"index.md", "architecture.md", "reference/verbs.md"} <= set(pages)
    verbs = (tmp_path / "docs/reference/verbs.md").read_text()
    assert all(f"### qhub {verb}\n" in verbs for verb in VERBS)
    rows = [line for line in verbs.splitlines() if line.startswith("| `-")]
    assert len(rows) > 150
    assert not [row for row in rows if row.endswith("|  |")], "every option says what it does"


ENGLISH = re.compile(
    r"(?<!here )\b(?:is|was) no (?:\w+ )?(?:id|file|number|folder|adapter|digest|version|alias|name|option|rate)\b|"
    r"\b(?:is|are|was|were) (?:told|said)\b(?! (?:not )?to\b)|\btold (?:of|that)\b|\bmend(?:s|ed)?\b|"
    r"cannot be had|say something|\bcomes? to (?:its|an) end\b|\bfor ever\b|\bis none of an?\b|\bhas not (?:the|both)\b"
)


# what stood for a field's own word: a metric, a reason, an event, an origin; and those of the engine's prefix cache
NAMES = re.compile(r"_*(?:\w+_)?(?:told|tell|said|promised|is_coming|goes_on)(?:_\w+)?", re.I)


@pytest.mark.parametrize("room", ["adapterhub_local", "serve"])
def test_names_are_the_fields(room: str) -> None:
    """Nothing that we define is called by what somebody told, said or promised, but by what it is."""
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            stored = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
            name = stored or getattr(node, "name", None) or getattr(node, "arg", None)
            if isinstance(name, str) and NAMES.fullmatch(name):
                found.append(f"{path.name}: {name}")
    assert not found


@pytest.mark.parametrize("room", ["adapterhub_local", "serve"])
def test_messages_are_in_plain_english(room: str) -> None:
    """No message, help text or docstring uses turns of phrase that native readers stumble over: "is no digest"."""
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{path.name}:{node.lineno}: {match[0]}" for match in ENGLISH.finditer(node.value)]
    assert not found


def test_pages_are_in_plain_english() -> None:
    """The same holds for every page."""
    pages = [README_PATH, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *TUTORIALS, *PAGES]
    assert not [f"{page.name}: {match[0]}" for page in pages for match in ENGLISH.finditer(page.read_text())]

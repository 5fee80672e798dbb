"""Puts the site's pages together under build/docs: this folder, the rooms' READMEs, and what `reference` makes.

    python -m docs.build        # then `mkdocs build`; `make docs` does both

A page of a room stays where the room is, so there is one copy of each; links between them are rewritten.
"""

import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from docs.reference import pages as generated_pages

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "docs"
# file of the repository -> page of the site
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "recipes/README.md": "guide/recipes.md",
    "recipes/data/README.md": "guide/data.md",
    "recipes/families.md": "guide/chat-templates.md",
    "serve/README.md": "guide/server.md",
}
for path in sorted((ROOT / "docs").rglob("*.md")):
    PAGES[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
for path in sorted((ROOT / "adapterhub_local").glob("*/README.md")):
    PAGES[path.relative_to(ROOT).as_posix()] = f"guide/{path.parent.name}.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def rewrite(text: str, source: str) -> str:
    """Links of a page as they are on the site: to other pages, or as plain code to files that are none."""

    def link(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        file = os.path.normpath(PurePosixPath(source).parent / path)
        here = PurePosixPath(PAGES[source]).parent
        if file in PAGES:
            return f"{bang}[{label}]({os.path.relpath(PAGES[file], here)}{'#' + anchor if anchor else ''})"
        if bang:
            return f"![{label}]({os.path.relpath(file.removeprefix('docs/'), here)})"
        return f"{label} (`{file}`)" if file not in label else f"`{file}`"

    return LINK.sub(link, text)


def build(out: Path = OUT) -> list[str]:
    """Write all pages below `out`, which is emptied first; the pages' paths."""
    shutil.rmtree(out, ignore_errors=True)
    texts = {page: rewrite((ROOT / source).read_text(encoding="utf-8"), source) for source, page in PAGES.items()}
    texts |= generated_pages()
    for page, text in texts.items():
        target = out / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for picture in (*ROOT.glob("docs/**/*.svg"), *ROOT.glob("docs/**/*.png")):
        target = out / picture.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    return sorted(texts)


if __name__ == "__main__":
    sys.stdout.write(f"{len(build())} pages\n")

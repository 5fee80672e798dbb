"""Where a version came from, as a tree: parents of merges, or recipe and data; as text, Mermaid or Graphviz."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version

MAX_DEPTH = 64


@dataclass(frozen=True)
class Node:
    """A version, a file that was merged, or a data file; `weight` is how much of it its child took."""

    label: str
    detail: str
    parents: tuple["Node", ...] = ()
    weight: float | None = None
    reference: str | None = None  # of a version that is in the registry


def ancestry(registry: Registry, version: Version, *, weight: float | None = None, depth: int = 0) -> Node:
    """The tree of what `version` was made of. Parents that were removed or never registered have no parents."""
    lineage = version.lineage
    parents = [_parent(registry, entry, depth) for entry in lineage.get("parents") or ()]
    for entry in lineage.get("data") or ():
        detail = f"{entry.get('role')} data, {entry.get('rows')} rows, {str(entry.get('digest'))[:19]}"
        parents.append(Node(str(entry.get("file")), detail))
    kind = lineage.get("kind") or "unknown"
    method = (lineage.get("merge") or {}).get("method")
    base = (lineage.get("base") or {}).get("name")
    details = [
        f"{kind} by {method}" if method else kind,
        *([f"on {base}"] if base else []),
        version.content_digest[:19],
    ]
    return Node(str(version), ", ".join(details), tuple(parents), weight, str(version))


def _parent(registry: Registry, entry: dict[str, Any], depth: int) -> Node:
    label, weight = str(entry.get("reference")), entry.get("weight")
    digest = entry.get("manifest_digest")
    # by digest, not by name: the version it was then, whatever is called so now
    same = "v.manifest_digest = ? OR json_extract(v.lineage, '$.imported_from.manifest_digest') = ?"
    rows = registry.rows(f"AND ({same})", (digest, digest)) if digest else []
    if rows and depth < MAX_DEPTH:
        return ancestry(registry, registry.version(rows[0]), weight=weight, depth=depth + 1)
    known = entry.get("content_digest") or entry.get("digest") or ""
    return Node(label, f"not in this registry, {known[:19]}" if known else "not in this registry", (), weight)


def children(registry: Registry, version: Version) -> list[str]:
    """The references of the live versions that were merged from `version`."""
    rows = registry.rows(
        "AND EXISTS (SELECT 1 FROM json_each(v.lineage, '$.parents') p"
        " WHERE json_extract(p.value, '$.manifest_digest') = ? OR json_extract(p.value, '$.reference') = ?)",
        (version.manifest_digest, str(version)),
    )
    return [f"{row['name']}@{row['number']}" for row in rows]


def text(node: Node) -> Iterator[str]:
    """The tree as lines with box-drawing characters."""
    yield f"{node.label}  ({node.detail})"
    for index, parent in enumerate(node.parents):
        is_last = index == len(node.parents) - 1
        weight = f"{parent.weight:g} x " if isinstance(parent.weight, int | float) else ""
        for number, line in enumerate(text(parent)):
            branch = ("└── " if is_last else "├── ") + weight if number == 0 else ("    " if is_last else "│   ")
            yield branch + line


def mermaid(node: Node) -> Iterator[str]:
    """The tree as a Mermaid flow chart, parents above."""
    yield "flowchart TD"
    yield from _graph(node, '    {id}["{label}<br/>{detail}"]', "    {source} -->{weight} {target}", "|{}|", _html)


def dot(node: Node) -> Iterator[str]:
    """The tree as a Graphviz graph, parents above."""
    yield "digraph lineage {"
    yield "    node [shape=box];"
    yield from _graph(
        node, '    {id} [label="{label}\\n{detail}"];', "    {source} -> {target}{weight};", ' [label="{}"]', _quoted
    )
    yield "}"


def _graph(node: Node, box: str, arrow: str, weight_text: str, escape: Any) -> Iterator[str]:
    """Boxes and arrows; the same version is one box, however often it occurs."""
    ids: dict[tuple[str, str], str] = {}
    drawn: set[tuple[str, str, str]] = set()
    pending = [node]
    while pending:
        current = pending.pop(0)
        target = (current.label, current.detail)
        if target not in ids:
            ids[target] = f"n{len(ids)}"
            yield box.format(id=ids[target], label=escape(current.label), detail=escape(current.detail))
        for parent in current.parents:
            source = (parent.label, parent.detail)
            if source not in ids:
                ids[source] = f"n{len(ids)}"
                yield box.format(id=ids[source], label=escape(parent.label), detail=escape(parent.detail))
                pending.append(parent)
            weighted = isinstance(parent.weight, int | float)
            edge = (ids[source], ids[target], f"{parent.weight:g}" if weighted else "")
            if edge not in drawn:
                drawn.add(edge)
                yield arrow.format(
                    source=edge[0], target=edge[1], weight=weight_text.format(edge[2]) if edge[2] else ""
                )


def _html(value: str) -> str:
    for letter, code in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;")):
        value = value.replace(letter, code)
    return value


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')

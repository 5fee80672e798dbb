"""Where a version came from, as a tree: parents of merges, or recipe and data; as text, Mermaid or Graphviz."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from adapterhub_local.digests import short
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version


@dataclass(frozen=True)
class Node:
    """A version, a file that was merged, or a data file; `weight` is how much of it its child took."""

    label: str
    detail: str
    parents: tuple["Node", ...] = ()
    weight: float | None = None
    reference: str | None = None  # of a version that is in the registry


def ancestry(registry: Registry, version: Version) -> Node:
    """The tree of what `version` was made of. Parents that were removed or never registered have no parents.

    A version that several others were made of is one node, however often it occurs.
    """
    made: dict[str, Node] = {}
    found: dict[str, Version | None] = {}
    entered: set[str] = set()
    pending = [version]
    while pending:
        current = pending[-1]
        if current.manifest_digest in made:
            pending.pop()
            continue
        entries = current.lineage.get("parents") or ()
        parents = [parent for entry in entries if (parent := _parent(registry, entry, found)) is not None]
        entered.add(current.manifest_digest)
        # one that is entered and not made is being made of this one: a lineage from elsewhere may say so
        if missing := [parent for parent in parents if parent.manifest_digest not in entered]:
            pending += missing
        else:
            made[current.manifest_digest] = _node(current, made, found)
            pending.pop()
    return made[version.manifest_digest]


def _node(version: Version, made: dict[str, Node], found: dict[str, Version | None]) -> Node:
    """The node of a version whose parents have theirs."""
    lineage = version.lineage
    parents = []
    for entry in lineage.get("parents") or ():
        weight = entry.get("weight")
        parent = found.get(str(entry.get("manifest_digest")))
        if parent is not None and parent.manifest_digest in made:
            parents.append(replace(made[parent.manifest_digest], weight=weight))
        else:
            known = entry.get("content_digest") or entry.get("digest") or ""
            detail = f"not in this registry, {short(known)}" if known else "not in this registry"
            parents.append(Node(str(entry.get("reference")), detail, (), weight))
    for entry in lineage.get("data") or ():
        if not isinstance(entry, dict):  # a lineage that was published here may say anything
            parents.append(Node(str(entry), "data without rows or digest"))
            continue
        detail = f"{entry.get('role')} data, {entry.get('rows')} rows, {short(str(entry.get('digest')))}"
        parents.append(Node(str(entry.get("file")), detail))
    kind = lineage.get("kind") or "unknown"
    method = (lineage.get("merge") or {}).get("method")
    base = (lineage.get("base") or {}).get("name")
    details = [
        f"{kind} by {method}" if method else kind,
        *([f"on {base}"] if base else []),
        short(version.content_digest),
    ]
    return Node(str(version), ", ".join(details), tuple(parents), None, str(version))


def _parent(registry: Registry, entry: dict[str, Any], found: dict[str, Version | None]) -> Version | None:
    """The version an entry of `parents` names, by digest, not by name: what it was then, whatever is called so now."""
    digest = str(entry.get("manifest_digest"))
    if digest not in found:
        same = "v.manifest_digest = ? OR json_extract(v.lineage, '$.imported_from.manifest_digest') = ?"
        rows = registry.rows(f"AND ({same})", (digest, digest)) if entry.get("manifest_digest") else []
        found[digest] = registry.version(rows[0]) if rows else None
    return found[digest]


def children(registry: Registry, version: Version) -> list[str]:
    """The references of the live versions that were merged from `version`."""
    rows = registry.database.rows(
        "SELECT DISTINCT l.name, l.number FROM parents p JOIN listed l USING (id)"
        " WHERE p.digest = ? OR p.reference = ? ORDER BY l.name, l.number",
        (version.manifest_digest, str(version)),
    )
    return [f"{row['name']}@{row['number']}" for row in rows]


def text(node: Node) -> Iterator[str]:
    """The tree as lines with box-drawing characters; what occurs again has its parents where it came first."""
    seen: set[str] = set()
    pending = [(node, "", "")]
    while pending:
        current, first, rest = pending.pop()
        again = bool(current.parents) and current.reference in seen
        yield f"{first}{current.label}  ({current.detail}{', as above' if again else ''})"
        if again:
            continue
        if current.reference is not None:
            seen.add(current.reference)
        below = []
        for index, parent in enumerate(current.parents):
            is_last = index == len(current.parents) - 1
            weight = f"{parent.weight:g} x " if isinstance(parent.weight, int | float) else ""
            branch, line = ("└── ", "    ") if is_last else ("├── ", "│   ")
            below.append((parent, f"{rest}{branch}{weight}", f"{rest}{line}"))
        pending += reversed(below)


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

"""Lineage as a graph: nodes and edges, each version once, however often it was used. The walk is linear and bounded."""

from dataclasses import dataclass, field
from typing import Any

from adapterhub_local.registry.ancestry import Node, ancestry, children
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version

MAX_NODES = 400


@dataclass
class Graph:
    """`nodes` with id, label, detail, reference (None for what is not a version here) and depth; `edges` from parent to
    child with weight. `is_cut`: there is more than was walked."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    edges: list[dict[str, Any]] = field(default_factory=list)
    made_into: list[str] = field(default_factory=list)
    is_cut: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"nodes": self.nodes, "edges": self.edges, "made_into": self.made_into, "is_cut": self.is_cut}


def graph(registry: Registry, version: Version, *, limit: int = MAX_NODES) -> Graph:
    """What `version` was made of, and what was made of it; the nearest `limit` nodes."""
    found = Graph(made_into=children(registry, version))
    ids: dict[tuple[str, str], str] = {}
    drawn: set[tuple[str, str, Any]] = set()

    def place(node: Node, depth: int) -> tuple[str, bool] | None:
        key = (node.reference or node.label, "" if node.reference else node.detail)
        if key in ids:
            return ids[key], False
        if len(ids) >= limit:
            found.is_cut = True
            return None
        ids[key] = f"n{len(ids)}"
        shown = {"id": ids[key], "label": node.label, "detail": node.detail, "reference": node.reference}
        found.nodes.append({**shown, "depth": depth})
        return ids[key], True

    root = ancestry(registry, version)
    place(root, 0)
    pending = [(root, "n0", 0)]
    for node, target, depth in pending:  # grows while it is walked: breadth first
        for parent in node.parents:
            placed = place(parent, depth + 1)
            if placed is None:
                continue
            source, is_new = placed
            if (edge := (source, target, parent.weight)) not in drawn:
                drawn.add(edge)
                found.edges.append({"from": source, "to": target, "weight": parent.weight})
            if is_new:
                pending.append((parent, source, depth + 1))
    return found

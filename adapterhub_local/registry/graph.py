"""Lineage as a graph: nodes and edges, each version once, however often it was used. The walk is linear and bounded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterhub_local.errors import RemoteError
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


def tree_of(found: Mapping[str, Any]) -> Node:
    """The tree of `ancestry`, of what `Graph.to_json` gives of it. Raises RemoteError for what it does not give."""
    try:
        nodes = {node["id"]: node for node in found["nodes"]}
        root = found["nodes"][0]["id"]
        parents: dict[str, list[tuple[str, float | None]]] = {}
        for edge in found["edges"]:
            parents.setdefault(edge["to"], []).append((edge["from"], edge["weight"]))
        made: dict[str, Node] = {}
        for identity in _parents_first(root, parents):
            node = nodes[identity]
            above = tuple(replace(made[parent], weight=weight) for parent, weight in parents.get(identity, ()))
            made[identity] = Node(node["label"], node["detail"], above, None, node["reference"])
        return made[root]
    except (KeyError, IndexError, TypeError):
        raise RemoteError("the answer is not a lineage") from None


def _parents_first(root: str, parents: Mapping[str, Sequence[tuple[str, float | None]]]) -> Iterator[str]:
    """All that leads to `root`, each once and after its parents. Raises KeyError where one leads to itself."""
    done: set[str] = set()
    entered: set[str] = set()
    pending = [root]
    while pending:
        current = pending[-1]
        missing = [parent for parent, _ in parents.get(current, ()) if parent not in done]
        if current in done or not missing:
            pending.pop()
            if current not in done:
                done.add(current)
                yield current
        elif current in entered:
            raise KeyError(current)
        else:
            entered.add(current)
            pending += missing


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

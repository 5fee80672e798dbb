"""Blind votes: which of two answers a person preferred, kept as an evaluation of the versions that gave them.

A version's evaluation `blind:<set>` has its win rate (a tie is half a win) with Wilson's interval, and every pair, so
that the rate can be computed again; a vote that comes twice counts once.
"""

import threading
from typing import Any

from adapterhub_local.durable import digest_bytes
from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.refs import Reference
from adapterhub_local.registry import Registry, Version
from serve.errors import BadParameter
from serve.registry_api.bodies import VoteBody

MAX_PAIRS = 10_000  # of one version in one set
_LOCK = threading.Lock()  # a vote reads what was kept, adds one and keeps all


def vote(registry: Registry, body: VoteBody) -> dict[str, Any]:
    """Keep a vote; the win rates after it. Raises BadParameter if neither side is a version, or both are the same."""
    sides = {"left": _version(registry, body.left), "right": _version(registry, body.right)}
    if not any(sides.values()):
        raise BadParameter("a vote is about versions: neither of the two is one", "left")
    if sides["left"] == sides["right"]:
        raise BadParameter("the two sides are the same version", "right")
    prompt = digest_bytes(body.prompt.encode(errors="replace"))
    rates = {}
    with _LOCK:
        for side, version in sides.items():
            if version is not None:
                other = body.right if side == "left" else body.left
                won = 0.5 if body.winner == "tie" else float(body.winner == side)
                pair = {"id": body.id, "against": str(sides["right" if side == "left" else "left"] or other),
                        "won": won, "prompt": prompt}  # fmt: skip
                rates[str(version)] = _keep(registry, version, f"blind:{body.set}", pair)
    return {"task": f"blind:{body.set}", "win_rates": rates}


def _keep(registry: Registry, version: Version, task: str, pair: dict[str, Any]) -> dict[str, Any]:
    from adapterhub_local.intervals import wilson  # numpy

    kept = registry.metrics(version).get(task, {})
    pairs = [one for one in kept.get("pairs", ()) if isinstance(one, dict)]
    if any(one.get("id") == pair["id"] for one in pairs):
        return dict(kept["adapter"])
    if len(pairs) >= MAX_PAIRS:
        raise BadParameter(f"{version} has {MAX_PAIRS:,} votes in this set: begin another one", "set")
    pairs.append(pair)
    wins = sum(float(one.get("won", 0)) for one in pairs)
    scores: dict[str, Any] = {"win_rate": round(wins / len(pairs), 6), "rows": len(pairs)}
    scores["intervals"] = {"win_rate": [round(bound, 6) for bound in wilson(wins, len(pairs))]}
    registry.add_evaluation(version, task, {"adapter": scores, "pairs": pairs})
    return scores


def _version(registry: Registry, text: str) -> Version | None:
    """The version a text names, None for a base, a mix or what is not in the registry."""
    try:
        return registry.resolve(Reference.parse(text))
    except (BadReference, NotFound):
        return None

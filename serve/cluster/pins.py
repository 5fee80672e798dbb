"""Pins: which versions a request's `model` means now, looked up once for all replicas."""

import json
from dataclasses import dataclass

from adapterhub_local.durable import canonical_json, digest_bytes
from adapterhub_local.errors import QhubError
from adapterhub_local.refs import Mix, Reference
from adapterhub_local.registry import Registry
from adapterhub_local.registry.split import side_of, split_of
from serve.requests.model_ref import read_model
from serve.requests.ollama import plain_name


@dataclass(frozen=True)
class Pinned:
    """`versions`, such as sentiment@3 or a mix of such; `affinity`: equal for equal contents. None: not known."""

    versions: str | None = None
    affinity: str | None = None


def pin(body: bytes, path: str, base: str, registry: Registry) -> Pinned:
    """What the body of a request to `path` asks for.

    Nothing if it asks for the base, or for what is not there or cannot be read: a replica says so, in the words of the
    endpoint.
    """
    try:
        asked = json.loads(body)
        model, user = asked["model"], asked.get("user")
        if path == "/v1/messages":
            user = (asked.get("metadata") or {}).get("user_id")
        elif path.startswith("/api/"):
            model = plain_name(model)
        terms = [(term["ref"], float(term.get("weight", 1.0))) for term in asked.get("adapters") or ()]
        ref = read_model(model, base, terms)
        if ref.mix is None:
            return Pinned()
        if ref.name is not None and (split := split_of(registry, ref.name)):
            ref = ref.on_side(side_of(split, ref.name, user if isinstance(user, str) else None))
        assert ref.mix is not None
        found = [(registry.resolve(reference), weight) for reference, weight in ref.mix.terms]
    except (QhubError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Pinned()
    versions = Mix(tuple((Reference(version.name, version=version.number), weight) for version, weight in found))
    contents = sorted([version.content_digest, weight] for version, weight in found)
    return Pinned(str(versions), digest_bytes(canonical_json(contents)))

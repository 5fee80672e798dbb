"""Where a version comes from, as others check it: an in-toto Statement with SLSA's provenance, for a DSSE envelope.

What the lineage records becomes what was built (subjects: every file and the manifest), how (recipe or merge), from
what (data, base, parents, packages, each by digest where it has one) and by which program.

Statement v1       https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
Provenance v1      https://slsa.dev/spec/v1.0/provenance
DSSE v1            https://github.com/secure-systems-lab/dsse
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.durable import canonical_json
from adapterhub_local.registry.version import Version

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUILDER = "urn:adapterhub-local:qhub"
BASE_DIGEST = "qhubBaseV1"  # a sha256 over tensors, config and tokenizer, which is not that of any file
NOT_PACKAGES = ("python", "device", "gpu")  # of what a lineage's environment names


def statement(version: Version) -> dict[str, Any]:
    """What is signed of a version. Digests are hexadecimal, as in-toto has them."""
    lineage = version.lineage
    kind = str(lineage.get("kind") or "unknown")
    environment = _table(lineage.get("environment"))
    builder: dict[str, Any] = {"id": BUILDER}
    if versions := {name: str(environment[name]) for name in ("adapterhub-local", "python") if name in environment}:
        builder["version"] = versions
    metadata: dict[str, Any] = {"finishedOn": version.created_at}
    if isinstance(lineage.get("run"), str):
        metadata["invocationId"] = lineage["run"]
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": str(version), "digest": {"sha256": hex_of(version.manifest_digest)}},
            *({"name": file.path, "digest": {"sha256": hex_of(file.digest)}} for file in version.files),
        ],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"urn:adapterhub-local:{kind}:1",
                "externalParameters": _external(lineage) | {"name": version.name},
                "internalParameters": _internal(lineage, environment),
                "resolvedDependencies": list(_dependencies(lineage, environment)),
            },
            "runDetails": {
                "builder": builder,
                "metadata": metadata,
                "byproducts": [
                    {"name": "lineage.json", "digest": {"sha256": hex_of(version.lineage_file.digest)},
                     "mediaType": "application/json"},
                ],
            },
        },
    }  # fmt: skip


def payload_of(version: Version) -> bytes:
    """The bytes that are signed: the statement, the same for the same version."""
    return canonical_json(statement(version))


def encoding(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, which a signature is over."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_statement(payload: bytes) -> dict[str, Any]:
    """The statement in a payload. Raises ValueError if it is not one of provenance."""
    value = json.loads(payload)
    if not isinstance(value, dict) or value.get("_type") != STATEMENT or value.get("predicateType") != PROVENANCE:
        raise ValueError("it is not an in-toto statement of provenance")
    return value


def _external(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What whoever started it decided: the recipe with what was changed, or the merge with its weights."""
    external: dict[str, Any] = {}
    recipe = _table(lineage.get("recipe"))
    if recipe:
        external["recipe"] = {key: recipe[key] for key in ("text", "overrides") if key in recipe}
    merge = _table(lineage.get("merge"))
    if merge:
        external["merge"] = merge
    weights = {str(one.get("reference")): one["weight"] for one in _tables(lineage.get("parents")) if "weight" in one}
    if weights:
        external["weights"] = weights
    return external


def _internal(lineage: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    internal = {key: lineage[key] for key in ("seed", "adapter") if lineage.get(key) is not None}
    return internal | {key: environment[key] for key in ("device", "gpu") if key in environment}


def _dependencies(lineage: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What went in; each with its digest where one was recorded."""
    recipe = _table(lineage.get("recipe"))
    if digest := _sha256(recipe.get("digest")):
        yield {"name": "recipe", "digest": {"sha256": digest}}
    for entry in _tables(lineage.get("data")):
        if digest := _sha256(entry.get("digest")):
            notes = {key: entry[key] for key in ("role", "rows") if key in entry}
            yield {"name": f"data {entry.get('file')}", "digest": {"sha256": digest}, "annotations": notes}
    base = _table(lineage.get("base"))
    if digest := _sha256(base.get("fingerprint")):
        revision = f"@{base['revision']}" if base.get("revision") else ""
        uri = {"uri": f"pkg:huggingface/{base['hub_id']}{revision}"} if base.get("hub_id") else {}
        yield {"name": f"base {base.get('name')}", "digest": {BASE_DIGEST: digest}, **uri}
    for parent in _tables(lineage.get("parents")):
        if digest := _sha256(parent.get("manifest_digest") or parent.get("digest") or parent.get("content_digest")):
            yield {"name": f"parent {parent.get('reference')}", "digest": {"sha256": digest}}
    for name in sorted(environment.keys() - {*NOT_PACKAGES, "adapterhub-local"}):
        # a build as 2.13.0+cpu: the sign is escaped in a package URL
        address = f"pkg:pypi/{name}@{str(environment[name]).replace('+', '%2B')}"
        yield {"name": f"package {name}", "uri": address}


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _sha256(value: Any) -> str | None:
    return hex_of(value) if isinstance(value, str) and value.startswith("sha256:") else None

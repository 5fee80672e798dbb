"""Each link between a version and what it was made of, and whether it holds: what `qhub verify --explain` prints.

holds       checked here and now
recorded    named by the lineage, with a digest, and not here to be checked
open        nothing covers it: no signature, no digest
broken      it does not hold
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterhub_local.digests import short
from adapterhub_local.durable import canonical_json, digest_bytes, digest_file
from adapterhub_local.errors import Corrupt, NotFound
from adapterhub_local.registry.attest import statement
from adapterhub_local.registry.envelope import envelope_of, verify_envelope
from adapterhub_local.registry.fsck import verify
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.signature import signature_of, verify_signature
from adapterhub_local.registry.version import Version

MAX_VERSIONS = 1000  # of one chain


@dataclass(frozen=True)
class Link:
    """One step of the chain of `version`: `about` is bytes, signature, attestation, recipe, data, base or parent."""

    version: str
    about: str
    state: str
    what: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def chain(registry: Registry, version: Version, keys: Sequence[Path] = (), data: Path | None = None) -> list[Link]:
    """The links of a version and of all versions it was made of, itself first.

    `data` is a folder in which the data files of lineages are looked for, by name.
    """
    found: list[Link] = []
    pending, seen = [version], {version.manifest_digest}
    while pending and len(seen) < MAX_VERSIONS:
        one = pending.pop(0)
        found += _own(registry, one, keys, data)
        for link, parent in _parents(registry, one):
            found.append(link)
            if parent is not None and parent.manifest_digest not in seen:
                seen.add(parent.manifest_digest)
                pending.append(parent)
    return found


def _own(registry: Registry, version: Version, keys: Sequence[Path], data: Path | None) -> Iterator[Link]:
    name = str(version)
    problems = verify(registry, version)
    for problem in problems:
        yield Link(name, "bytes", "broken", problem.message)
    if not problems:
        what = f"{len(version.files)} files, lineage and manifest {short(version.manifest_digest)} have their digests"
        yield Link(name, "bytes", "holds", what)
        yield _signature(registry, version, keys)
    yield _attestation(registry, version, keys)
    lineage = version.lineage
    recipe = lineage.get("recipe")
    if isinstance(recipe, dict) and isinstance(recipe.get("text"), str):
        same = digest_bytes(recipe["text"].encode()) == recipe.get("digest")
        what = "the recipe's text has the digest that is recorded" if same else "the recipe's text has another digest"
        yield Link(name, "recipe", "holds" if same else "broken", what)
    for entry in lineage.get("data") or ():
        yield _data(name, entry, data)
    base = lineage.get("base") or {}
    if base.get("fingerprint"):
        what = f"made for {base.get('name')} with fingerprint {short(base['fingerprint'])}"
        yield Link(name, "base", "recorded", what)
    else:
        yield Link(name, "base", "open", "its lineage names no fingerprint of a base")


def _signature(registry: Registry, version: Version, keys: Sequence[Path]) -> Link:
    name = str(version)
    if signature_of(registry, version) is None:
        return Link(name, "signature", "open", f"weights and config are not signed: `qhub sign {version} --key`")
    if not keys:
        return Link(name, "signature", "recorded", "weights and config are signed: --key PUBLIC.pem checks it")
    try:
        key = verify_signature(registry, version, keys)
    except Corrupt as error:
        return Link(name, "signature", "broken", str(error))
    return Link(name, "signature", "holds", f"weights and config were signed with {key.name}")


def _attestation(registry: Registry, version: Version, keys: Sequence[Path]) -> Link:
    name = str(version)
    envelope = envelope_of(registry, version)
    if envelope is None:
        return Link(name, "attestation", "open", f"where it comes from is not signed: `qhub attest {version} --key`")
    if not keys:
        return Link(name, "attestation", "recorded", "where it comes from is signed: --key PUBLIC.pem checks it")
    try:
        attested, key = verify_envelope(envelope, keys)
    except (Corrupt, NotFound) as error:
        return Link(name, "attestation", "broken", str(error))
    if canonical_json(attested) != canonical_json(statement(version)):
        return Link(name, "attestation", "broken", f"what {key.name} signed is not what the lineage says now")
    what = f"{key.name} signed its digests, recipe, data, base, parents and packages"
    return Link(name, "attestation", "holds", what)


def _data(name: str, entry: dict[str, Any], folder: Path | None) -> Link:
    file, digest = str(entry.get("file")), entry.get("digest")
    if not isinstance(digest, str):
        return Link(name, "data", "open", f"{file} has no digest in the lineage")
    shown = f"{entry.get('role')} data {file}, {entry.get('rows')} rows"
    path = folder / Path(file).name if folder is not None else None
    if path is None or not path.is_file():
        return Link(name, "data", "recorded", f"{shown}, {short(digest)}")
    if digest_file(path) == digest:
        return Link(name, "data", "holds", f"{shown}: {path} has its digest")
    return Link(name, "data", "broken", f"{shown}: {path} has another digest")


def _parents(registry: Registry, version: Version) -> Iterator[tuple[Link, Version | None]]:
    for entry in version.lineage.get("parents") or ():
        reference, digest = str(entry.get("reference")), entry.get("manifest_digest")
        if not isinstance(digest, str):
            known = entry.get("digest") or entry.get("content_digest")
            state, what = ("recorded", f", {short(known)}") if isinstance(known, str) else ("open", " has no digest")
            yield Link(str(version), "parent", state, f"{reference}{what}"), None
            continue
        query = (
            "AND (v.manifest_digest = ? OR json_extract(v.lineage, '$.imported_from.manifest_digest') = ?)"
        )  # fmt: skip
        rows = registry.rows(query, (digest, digest))
        if rows:
            parent = registry.version(rows[0])
            yield Link(str(version), "parent", "holds", f"{reference} is {parent} here, {short(digest)}"), parent
        else:
            yield Link(str(version), "parent", "recorded", f"{reference}, {short(digest)}, is not here"), None

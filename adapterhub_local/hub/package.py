"""What is in a repository that `qhub push` made, and how a version is restored from it.

    adapter_model.safetensors   the version's weights, byte for byte
    adapter_config.json         the version's config, naming its base by Hub id
    README.md                   the model card; people may edit it
    loss.svg                    the training curve, if the lineage has one
    model.sig                   the signature of weights and config as in the registry, if it is signed
    qhub-manifest.json          {
        "format": 1,
        "manifest_digest":  digest of the next, the identity of the version,
        "manifest":         the registry's manifest, as is,
        "lineage":          its lineage, as is, but for paths of the pusher's machine,
        "shortened":        the places in the lineage where a path was cut short, or samples were left out,
        "files":            [{"path", "digest", "size"}] of weights and config as they are in the repository,
        "adapter_config":   the config's text in the registry, only if the pushed one names another base }

Manifest and lineage are canonical JSON in the registry, so their bytes, and with them their digests,
come back from the values. Knows nothing of the network.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_local.draw.curve import loss_panel, svg
from adapterhub_local.durable import canonical_json, digest_bytes, digest_file
from adapterhub_local.errors import Corrupt, Incompatible
from adapterhub_local.hub.card import card
from adapterhub_local.hub.scrub import machine_roots, without_paths
from adapterhub_local.lora.config import CONFIG, SERVER_RANKS, WEIGHTS
from adapterhub_local.lora.config_reader import parse_config
from adapterhub_local.lora.header import read_header
from adapterhub_local.registry import File, Version
from adapterhub_local.registry.lineage_form import check_lineage
from adapterhub_local.registry.signature import SIGNATURE

CARD = "README.md"
CURVE = "loss.svg"
MANIFEST = "qhub-manifest.json"
OPTIONAL = (CURVE, SIGNATURE)  # in some versions, not in others
FORMAT = 1


@dataclass(frozen=True)
class Package:
    """The files of one push, by path in the repository; `listed` are those the manifest vouches for."""

    files: Mapping[str, bytes | Path]
    listed: tuple[File, ...]
    manifest_digest: str


@dataclass(frozen=True)
class Unpacked:
    """What the pusher's registry had beside the weights: config, lineage, and the digest of the manifest."""

    config: bytes
    lineage: Mapping[str, Any]
    manifest_digest: str


def pack(
    version: Version, folder: Path, base_id: str, repo_id: str, home: Path, *,
    metrics: Mapping[str, Any] | None = None, licence: Mapping[str, str] | None = None,
    signature: bytes | None = None,
) -> Package:  # fmt: skip
    """The files to push for `version`, whose checked files are in `folder`.

    `metrics` are the scores for the card, those of the lineage if not given; a training curve is drawn if known.
    Raises Incompatible if the version has other files than an adapter, or a path of this machine inside its weights.
    """
    if {file.path for file in version.files} != {WEIGHTS, CONFIG}:
        raise Incompatible(f"{version} is not an adapter of {WEIGHTS} and {CONFIG}: it cannot be pushed")
    roots = machine_roots(home)
    lineage, shortened = without_paths(json.loads(canonical_json(version.lineage)), roots)
    if lineage.pop("samples", None) is not None:  # texts of the held-out data, which nobody asked to publish
        shortened.append("samples")
    original = (folder / CONFIG).read_bytes()
    config = _with_base(original, base_id)
    fields: dict[str, Any] = {
        "format": FORMAT,
        "manifest_digest": version.manifest_digest,
        "manifest": json.loads(version.manifest),
        "lineage": lineage,
        "shortened": shortened,
    }
    weights = next(file for file in version.files if file.path == WEIGHTS)
    listed = (weights, File(CONFIG, digest_bytes(config), len(config)))
    fields["files"] = [{"path": file.path, "digest": file.digest, "size": file.size} for file in listed]
    if config != original:
        fields["adapter_config"] = original.decode()
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    curve = _curve_of(lineage)
    drawn = svg([loss_panel(curve)], str(version)) if len(curve) > 1 else None
    measured = {**lineage, "metrics": without_paths(metrics, roots)[0]} if metrics is not None else lineage
    readme = card(
        replace(version, lineage=measured), base_id, repo_id, picture=CURVE if drawn else None, licence=licence,
        max_lora_rank=_vllm_rank(original),
    )  # fmt: skip
    metadata = json.dumps(dict(read_header(folder / WEIGHTS).metadata))
    texts = {CONFIG: config.decode(), WEIGHTS: metadata, MANIFEST: text, CARD: readme}
    for place, content in texts.items():
        if found := [root for root in roots if f"{root}/" in content]:
            raise Incompatible(f"{place} of {version} names {found[0]}, a folder of this machine: it is not published")
    files: dict[str, bytes | Path] = {
        WEIGHTS: folder / WEIGHTS,
        CONFIG: config,
        CARD: readme.encode(),
        MANIFEST: text.encode(),
        **({CURVE: drawn.encode()} if drawn else {}),
        **({SIGNATURE: signature} if signature else {}),
    }
    return Package(files, listed, version.manifest_digest)


def describes(manifest: bytes, package: Package) -> bool:
    """Whether the bytes of a `qhub-manifest.json` describe the same version with the same files as `package`."""
    try:
        fields = json.loads(manifest)
        files = {(file["path"], file["digest"]) for file in fields["files"]}
        return fields["manifest_digest"] == package.manifest_digest and files == {
            (file.path, file.digest) for file in package.listed
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def unpack(folder: Path, where: str) -> Unpacked:
    """The version whose downloaded weights, config and manifest are in `folder`; `where` is for messages.

    Raises Corrupt if a file is not what the manifest says, or the manifest does not agree with itself.
    """
    try:
        fields = json.loads((folder / MANIFEST).read_bytes(), parse_constant=_refuse_constant)
        if fields["format"] != FORMAT:
            raise Corrupt(f"its format is {fields['format']!r}: install a newer qhub to pull it")
        listed = {file["path"]: (file["digest"], file["size"]) for file in fields["files"]}
        manifest, lineage = canonical_json(fields["manifest"]), canonical_json(fields["lineage"])
        version = Version.from_manifest(manifest, lineage)
        original = fields.get("adapter_config")
        config = (folder / CONFIG).read_bytes() if original is None else original.encode()
        is_whole = fields["manifest_digest"] == version.manifest_digest and (
            bool(fields["shortened"]) or digest_bytes(lineage) == version.lineage_file.digest
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{MANIFEST} of {where} cannot be read: {type(error).__name__}: {error}") from None
    except Corrupt as error:
        raise Corrupt(f"{MANIFEST} of {where} cannot be used: {error}") from None
    if not is_whole:
        raise Corrupt(f"{MANIFEST} of {where} contradicts itself: it was changed after the push")
    try:
        check_lineage(version.lineage)  # as what `qhub import` and `qhub sync` bring: one door, one check
    except ValueError as error:
        raise Corrupt(f"{MANIFEST} of {where} cannot be used, nothing was registered: {error}") from None
    for path in (WEIGHTS, CONFIG):
        if listed.get(path) != (digest_file(folder / path), (folder / path).stat().st_size):
            raise Corrupt(
                f"{path} of {where} is not what its {MANIFEST} says: it was changed after the push or damaged on the "
                "way; nothing was registered. Pull again, or name another revision"
            )
    restored = {WEIGHTS: listed[WEIGHTS][0], CONFIG: digest_bytes(config)}
    if restored != {file.path: file.digest for file in version.files}:
        raise Corrupt(f"{MANIFEST} of {where} describes another version than the files beside it")
    return Unpacked(config, version.lineage, version.manifest_digest)


def _curve_of(lineage: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(step, loss) of the training, as far as the lineage has them."""
    training = lineage.get("training")
    points = training.get("curve") if isinstance(training, dict) else None
    return [
        (point[0], point[1])
        for point in points or ()
        if isinstance(point, list) and len(point) == 2 and all(isinstance(value, int | float) for value in point)
    ]


def _vllm_rank(config: bytes) -> int | None:
    """The `--max-lora-rank` vLLM needs; None if it would read another delta or has no such rank."""
    parsed = parse_config(config, CONFIG, dora=True, tokens=True)
    if (
        parsed.use_dora or parsed.tokens or parsed.rank_pattern or parsed.alpha_pattern
    ):  # vLLM has no DoRA, no rows of embeddings, and one scale for all modules
        return None
    return next((rank for rank in SERVER_RANKS if rank >= parsed.rank), None)


def _with_base(config: bytes, base_id: str) -> bytes:
    """The adapter config naming its base by Hub id: the same bytes if it does already."""
    fields = json.loads(config)
    if fields.get("base_model_name_or_path") == base_id:
        return config
    fields["base_model_name_or_path"] = base_id
    return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")

"""The bill of materials of a version for machine learning: CycloneDX 1.6, https://cyclonedx.org/capabilities/mlbom/.

The adapter is a machine-learning model with its card (task, base, data, scores); base, data, parents and packages are
components that it depends on. The same version gives the same bytes.
"""

import uuid
from typing import Any

from adapterhub_local.digests import hex_of
from adapterhub_local.registry.registry import Registry
from adapterhub_local.registry.version import Version

NAMESPACE = uuid.UUID("5b3f0b1e-6a51-5a1c-9a43-2c8a4f2f1d10")  # of serial numbers, which are made of digests


def ml_bom(registry: Registry, version: Version) -> dict[str, Any]:
    """The BOM of a version as CycloneDX JSON."""
    lineage = version.lineage
    own = f"adapter:{version}"
    parts = [*_bases(lineage), *_data(lineage), *_parents(lineage), *_packages(lineage)]
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": own,
        "name": version.name,
        "version": str(version.number),
        "hashes": [{"alg": "SHA-256", "content": hex_of(version.manifest_digest)}],
        "modelCard": _card(registry, version, [part["bom-ref"] for part in parts if part["type"] == "data"]),
        "components": [
            {"type": "file", "bom-ref": f"file:{file.path}", "name": file.path,
             "hashes": [{"alg": "SHA-256", "content": hex_of(file.digest)}]}
            for file in version.files
        ],
    }  # fmt: skip
    if lineage.get("description"):
        model["description"] = str(lineage["description"])
    program = str((lineage.get("environment") or {}).get("adapterhub-local") or "")
    tool = {"type": "application", "name": "adapterhub-local", **({"version": program} if program else {})}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(NAMESPACE, version.manifest_digest).urn,
        "version": 1,
        "metadata": {"timestamp": version.created_at, "tools": {"components": [tool]}, "component": model},
        "components": parts,
        "dependencies": [
            {"ref": own, "dependsOn": sorted(part["bom-ref"] for part in parts)},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


def _card(registry: Registry, version: Version, data: list[str]) -> dict[str, Any]:
    lineage = version.lineage
    parameters: dict[str, Any] = {"approach": {"type": "supervised"}, "modelArchitecture": "LoRA"}
    if lineage.get("task"):
        parameters["task"] = str(lineage["task"])
    if architecture := (lineage.get("base") or {}).get("architecture"):
        parameters["architectureFamily"] = str(architecture)
    if data:
        parameters["datasets"] = [{"ref": ref} for ref in data]
    scores = [
        {"type": str(metric), "value": str(value), "slice": str(task)}
        for task, who in sorted(registry.metrics(version).items())
        if isinstance(who, dict) and isinstance(who.get("adapter"), dict)
        for metric, value in sorted(who["adapter"].items())
        if isinstance(value, int | float)
    ]
    card: dict[str, Any] = {"modelParameters": parameters}
    if lineage.get("kind") != "train":
        del parameters["approach"]
    if scores:
        card["quantitativeAnalysis"] = {"performanceMetrics": scores}
    return card


def _bases(lineage: Any) -> list[dict[str, Any]]:
    base = lineage.get("base") or {}
    if not base.get("name"):
        return []
    part: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"base:{base['name']}",
        "name": str(base["name"]),
    }
    if base.get("fingerprint"):
        part["properties"] = [{"name": "qhub:fingerprint", "value": str(base["fingerprint"])}]
    if base.get("revision"):
        part["version"] = str(base["revision"])
    if base.get("hub_id"):
        part["purl"] = f"pkg:huggingface/{base['hub_id']}" + (f"@{base['revision']}" if base.get("revision") else "")
    if base.get("license"):
        part["licenses"] = [{"license": {"name": str(base["license"])}}]
    return [part]


def _data(lineage: Any) -> list[dict[str, Any]]:
    parts = {}
    for entry in lineage.get("data") or ():
        ref = f"data:{entry.get('role')}:{entry.get('file')}"
        part: dict[str, Any] = {"type": "data", "bom-ref": ref, "name": str(entry.get("file")),
                                "data": [{"type": "dataset", "name": str(entry.get("file"))}]}  # fmt: skip
        if isinstance(entry.get("digest"), str):
            part["hashes"] = [{"alg": "SHA-256", "content": hex_of(entry["digest"])}]
        parts[ref] = part
    return list(parts.values())


def _parents(lineage: Any) -> list[dict[str, Any]]:
    parts = {}
    for entry in lineage.get("parents") or ():
        name, _, number = str(entry.get("reference")).partition("@")
        ref = f"parent:{entry.get('reference')}"
        part: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": ref, "name": name}
        if number:
            part["version"] = number
        if isinstance(entry.get("manifest_digest"), str):
            part["hashes"] = [{"alg": "SHA-256", "content": hex_of(entry["manifest_digest"])}]
        parts[ref] = part
    return list(parts.values())


def _packages(lineage: Any) -> list[dict[str, Any]]:
    environment = lineage.get("environment") or {}
    return [
        {"type": "library", "bom-ref": f"package:{name}", "name": name, "version": str(environment[name]),
         "purl": f"pkg:pypi/{name}@{str(environment[name]).replace('+', '%2B')}"}
        for name in sorted(environment) if name not in ("python", "device", "gpu", "adapterhub-local")
    ]  # fmt: skip

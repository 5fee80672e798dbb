"""Small stores for the registry's tests: adapters with real headers, and a home with a little of everything."""

import json
import struct
from pathlib import Path
from typing import Any

from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home

LINEAGE: dict[str, Any] = {
    "kind": "train",
    "base": {"name": "tiny", "fingerprint": "sha256:" + "0" * 64},
    "adapter": {"rank": 2, "alpha": 4.0, "num_parameters": 8},
    "description": "says yes or no",
}


def weights(values: bytes = bytes(16)) -> bytes:
    """A sound safetensors file with one tensor of these bytes (a multiple of 4)."""
    entry = {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}
    header = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(header)) + header + values


def files(seed: int = 0) -> dict[str, Path | bytes]:
    """The two files of an adapter, different for each seed."""
    return {
        "adapter_model.safetensors": weights(struct.pack("<4f", *range(seed, seed + 4))),
        "adapter_config.json": b"{}",
    }


def small_store(registry: Registry) -> list[Version]:
    """Three versions of two names, an alias that moved, and a later evaluation."""
    made = [registry.publish("a", files(1), LINEAGE), registry.publish("a", files(2), LINEAGE, alias="prod")]
    made.append(registry.publish("team/b", files(3), {**LINEAGE, "parents": [{"reference": "a@1", "weight": 1.0}]}))
    registry.set_alias("a", "prod", 1)
    registry.add_evaluation(made[1], "task", {"adapter": {"exact_match": 0.5, "loss": 1.0, "rows": 2}})
    return made


def blob_paths(home: Home) -> list[Path]:
    """Every blob of the home."""
    return sorted(path for path in home.blobs.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    """Change one bit of a read-only file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)

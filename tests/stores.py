"""Small stores for the registry's tests: adapters with real headers, and a home with a little of everything."""

import json
import sqlite3
import struct
from contextlib import closing
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


MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}).encode()


def weights(values: bytes = bytes(16)) -> bytes:
    """A sound adapter of rank 1 whose A has these bytes (a multiple of 4), and whose B is 1 x 1 and zero."""
    prefix, end = f"base_model.model.{MODULE}.lora_", len(values)
    entries = {
        f"{prefix}A.weight": {"dtype": "F32", "shape": [1, end // 4], "data_offsets": [0, end]},
        f"{prefix}B.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [end, end + 4]},
    }
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + values + bytes(4)


def files(seed: int = 0) -> dict[str, Path | bytes]:
    """The two files of an adapter, different for each seed."""
    return {
        "adapter_model.safetensors": weights(struct.pack("<4f", *range(seed, seed + 4))),
        "adapter_config.json": CONFIG,
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


def merged(registry: Registry, name: str, *parents: tuple[Version, float]) -> Version:
    """A version that says it was merged from these."""
    entries = [
        {"reference": str(parent), "manifest_digest": parent.manifest_digest,
         "content_digest": parent.content_digest, "weight": weight}
        for parent, weight in parents
    ]  # fmt: skip
    return registry.publish(
        name, files(len(name)), {"kind": "merge", "merge": {"method": "weighted_sum"}, "parents": entries}
    )


def backup(home: Home, target: Path) -> None:
    """A copy of the database as SQLite makes it."""
    with closing(sqlite3.connect(home.database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


def drop(home: Home) -> None:
    """Delete the database and what SQLite keeps beside it."""
    for path in home.root.glob("registry.db*"):
        path.unlink()

"""The strict loader and the pool: what does not belong to the base is refused, what is in use stays."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.weights import dequantised
from adapterhub_local.errors import BadFile, Corrupt, Incompatible
from adapterhub_local.registry import Registry
from serve.adapters.pool import AdapterPool
from serve.adapters.reader import AdapterReader
from serve.errors import Busy
from tests.serve.adapter_makers import llama_shapes, publish, write_random


@pytest.fixture
def shapes(tiny_base: BaseInfo) -> dict[str, tuple[int, int]]:
    """The linear layers of the tiny base."""
    return llama_shapes(AutoConfig.from_pretrained(tiny_base.folder))


@pytest.fixture
def registry(home) -> Registry:
    """An empty registry."""
    return Registry(home)


def make_pool(base: BaseInfo, shapes, max_bytes: int = 1 << 30) -> AdapterPool:
    weights = {name: weight for name, weight, _ in dequantised(base, shapes)}
    reader = AdapterReader(base, shapes, weights.__getitem__, torch.float32)
    return AdapterPool(reader, max_bytes=max_bytes, max_pins=1)


def test_factors_are_the_files(tiny_base: BaseInfo, shapes, registry: Registry) -> None:
    """What is loaded is A and the scaled, transposed B of every module."""
    version = publish(registry, "a", tiny_base, seed=1, rank=4, modules=("q_proj",), use_rslora=True)
    pool = make_pool(tiny_base, shapes)
    factors = pool.get(pool.acquire(version).digest)
    assert set(factors) == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    a, b = factors["model.layers.1.self_attn.q_proj"]
    assert (a.shape, b.shape) == ((64, 4), (4, 64))
    assert pool.num_bytes == sum(one.nbytes + two.nbytes for one, two in factors.values())


def test_other_base(tiny_base: BaseInfo, shapes, registry: Registry) -> None:
    """A fingerprint that is not the base's is refused, by the lineage and by the file itself."""
    other = dataclasses.replace(tiny_base, name="other", fingerprint="sha256:" + "1" * 64)
    pool = make_pool(tiny_base, shapes)
    with pytest.raises(Incompatible, match="base 'other', not for 'tiny'"):
        pool.acquire(publish(registry, "a", other, seed=1))
    folder = registry.home.root / "x"
    folder.mkdir(parents=True)
    files = write_random(folder, shapes, seed=1, fingerprint="sha256:" + "2" * 64)
    unsaid = registry.publish("b", files, {})
    with pytest.raises(Incompatible, match="another base"):
        pool.acquire(unsaid)
    assert len(pool) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda shapes: {**shapes, "model.layers.2.self_attn.q_proj": (64, 64)},
            r"layers\.2\.self_attn\.q_proj \(no such",
        ),
        (lambda shapes: {**shapes, "model.layers.0.mlp.up_proj": (64, 64)}, r"up_proj \(64 -> 64, not 64 -> 128\)"),
        (lambda shapes: {f"base.{name}": shape for name, shape in shapes.items()}, r"base\.model.* and 11 more"),
    ],
    ids=["leftover", "shape", "nothing matches"],
)
def test_modules_must_fit(
    tiny_base: BaseInfo, shapes, registry: Registry, tmp_path: Path, change, message: str
) -> None:
    """A module that the base lacks or has in another shape is refused and named; nothing is served in part."""
    files = write_random(tmp_path, change(shapes), seed=1)
    with pytest.raises(Incompatible, match=message):
        make_pool(tiny_base, shapes).acquire(registry.publish("a", files, {}))


def test_unknown_origin(tiny_base: BaseInfo, shapes, registry: Registry, tmp_path: Path) -> None:
    """Without a fingerprint the base's Hub id must not contradict."""
    pool = make_pool(tiny_base, shapes)
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    same = write_random(tmp_path / "same", shapes, seed=1, base_model="someone/tiny")
    pool.acquire(registry.publish("same", same, {}))
    other = write_random(tmp_path / "other", shapes, seed=1, base_model="someone/large")
    with pytest.raises(Incompatible, match="someone/large"):
        pool.acquire(registry.publish("other", other, {}))


def test_no_effect(tiny_base: BaseInfo, shapes, registry: Registry) -> None:
    """An adapter that changes nothing is refused: its answers would be the base's."""
    with pytest.raises(Incompatible, match="changes nothing"):
        make_pool(tiny_base, shapes).acquire(publish(registry, "a", tiny_base, seed=1, strength=0.0))


def test_damaged_files(tiny_base: BaseInfo, shapes, registry: Registry, tmp_path: Path) -> None:
    """Bytes that changed on disk, or tensors that are no factors, are refused."""
    pool = make_pool(tiny_base, shapes)
    version = publish(registry, "a", tiny_base, seed=1)
    blob = registry.blobs.path(next(file.digest for file in version.files if file.path.endswith("safetensors")))
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Corrupt):
        pool.acquire(version)
    with pytest.raises(BadFile):
        pool.acquire(registry.publish("b", {"adapter_model.safetensors": b"not an adapter"}, {}))


def test_equal_content_is_held_once(tiny_base: BaseInfo, shapes, registry: Registry) -> None:
    """Two names for the same bytes are one adapter in memory, read once however many ask at a time."""
    first = publish(registry, "a", tiny_base, seed=1)
    second = publish(registry, "b", tiny_base, seed=1)
    pool = make_pool(tiny_base, shapes)
    barrier = threading.Barrier(4)

    def acquire(version) -> str:
        barrier.wait()
        return pool.acquire(version).digest

    with ThreadPoolExecutor(4) as threads:
        digests = set(threads.map(acquire, [first, second, first, second]))
    assert len(digests) == 1
    assert (len(pool), pool.num_loads) == (1, 1)


def test_budget(tiny_base: BaseInfo, shapes, registry: Registry) -> None:
    """The least recently used adapter without users goes; those in use stay, and a full pool is Busy."""
    versions = [publish(registry, name, tiny_base, seed=seed) for seed, name in enumerate("abc")]
    probe = make_pool(tiny_base, shapes)
    size = (probe.acquire(versions[0]).digest, probe.num_bytes)[1]
    pool = make_pool(tiny_base, shapes, max_bytes=2 * size)
    a, b = pool.acquire(versions[0]).digest, pool.acquire(versions[1]).digest
    with pytest.raises(Busy):
        pool.acquire(versions[2])
    pool.release(b)
    pool.release(a)
    pool.release(pool.acquire(versions[0]).digest)  # used more recently than b
    c = pool.acquire(versions[2]).digest
    assert pool.num_evictions == 1
    assert pool.get(a)
    assert pool.get(c)
    with pytest.raises(KeyError):
        pool.get(b)
    with pytest.raises(Incompatible, match="more memory"):
        make_pool(tiny_base, shapes, max_bytes=size - 1).acquire(versions[0])

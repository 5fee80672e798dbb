"""Hostile models: every one is refused in a moment with one sentence, and nothing of it is left behind."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_local.base.add import add_base
from adapterhub_local.base.bases import list_bases
from adapterhub_local.base.bounds import check_settings, check_tokenizer
from adapterhub_local.base.gguf_header import read_gguf_header
from adapterhub_local.errors import BadFile
from adapterhub_local.settings import Home
from tests.patience import ends
from tests.tiny import llama_config, save_tiny_model


def text(value: str | bytes) -> bytes:
    """A string of GGUF."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def setting(name: str, kind: int, raw: bytes) -> bytes:
    """A setting of GGUF: 4 is u32, 8 text, 9 a list."""
    return text(name) + struct.pack("<I", kind) + raw


LLAMA = setting("general.architecture", 8, text("llama"))


def gguf(*settings: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, counts: tuple | None = None) -> bytes:
    """A GGUF file of these parts; `counts` are (tensors, settings) if it lies about them."""
    told = counts or (len(tensors), len(settings))
    return b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join((*settings, *tensors))


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of a tensor."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def items(kind: int, count: int, raw: bytes = b"") -> bytes:
    """A list that claims `count` items."""
    return struct.pack("<IQ", kind, count) + raw


NESTED = items(9, 1) * 100_000
GGUF = {
    "nothing after the magic": (b"GGUF", "is truncated"),
    "version 99": (gguf(LLAMA, version=99), "version 99"),
    "big-endian": (gguf(LLAMA, version=3 << 24), "big-endian"),
    "2^62 items": (gguf(LLAMA, setting("a", 9, items(4, 1 << 62))), "claims 4,611,686,018,427,387,904 items of a"),
    "2^62 texts": (gguf(LLAMA, setting("a", 9, items(8, 1 << 62))), "claims"),
    "items that are not there": (gguf(LLAMA, setting("a", 9, items(4, 1000))), "is truncated: 1,000 items of a"),
    "nested lists": (gguf(LLAMA, setting("a", 9, NESTED)), "a list of lists"),
    "numeric architecture": (gguf(setting("general.architecture", 4, struct.pack("<I", 7))), "not the name of an arch"),
    "no architecture": (gguf(setting("a", 4, struct.pack("<I", 7))), "general.architecture"),
    "ESC in the architecture": (gguf(setting("general.architecture", 8, text("\x1b[31mred"))), "general.architecture"),
    "unknown architecture": (gguf(setting("general.architecture", 8, text("marsian"))), "marsian"),
    "long text": (gguf(setting("general.architecture", 8, text("x" * (5 << 20)))), "claims 5,242,880 bytes"),
    "text of 2^62": (gguf(LLAMA, text("a") + struct.pack("<IQ", 8, 1 << 62)), "claims"),
    "ESC in a name": (gguf(LLAMA, setting("\x1b[2J", 4, struct.pack("<I", 1))), "control characters"),
    "not UTF-8": (gguf(LLAMA, setting("a", 8, text(b"\xff\xfe"))), "not UTF-8"),
    "unknown type": (gguf(LLAMA, setting("a", 77, b"")), "of type 77"),
    "NaN": (gguf(LLAMA, setting("a", 6, struct.pack("<f", float("nan")))), "not a finite number"),
    "10^9 layers": (gguf(LLAMA, setting("llama.block_count", 4, struct.pack("<I", 10**9))), "more than the 512"),
    "more layers than tensors": (gguf(LLAMA, setting("llama.block_count", 4, struct.pack("<I", 99))), "has 0 tensors"),
    "10^18 settings": (gguf(LLAMA, counts=(0, 10**18)), "claims"),
    "10^18 tensors": (gguf(LLAMA, counts=(10**18, 1)), "claims"),
    "settings that are not there": (gguf(LLAMA, counts=(0, 9)), "is truncated"),
    "unknown tensor type": (gguf(LLAMA, tensors=(tensor("a", (2, 2), 9999),)), "of type 9999"),
    "many dimensions": (gguf(LLAMA, tensors=(tensor("a", (1,) * 5000),)), "5,000 dimensions"),
    "huge tensor": (gguf(LLAMA, tensors=(tensor("a", (1 << 40, 1 << 40)),)), "than any disk"),
    "tensor beyond the end": (gguf(LLAMA, tensors=(tensor("a", (64, 64)),)), "is truncated: 16,"),
    "tensor twice": (gguf(LLAMA, tensors=(tensor("a", (0,)), tensor("a", (0,)))), "twice"),
    "odd alignment": (gguf(LLAMA, setting("general.alignment", 4, struct.pack("<I", 0))), "alignment"),
    "no model in it": (gguf(LLAMA), "cannot be read"),
}  # fmt: skip


def config(**changes: Any) -> bytes:
    """A sound config with these changes."""
    return json.dumps({**llama_config().to_dict(), "architectures": ["LlamaForCausalLM"], **changes}).encode()


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
BOMB = {"type": "Sequence", "normalizers": [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10} for _ in range(20)]}  # fmt: skip
FILES: dict[str, tuple[str, bytes, str]] = {
    "10^9 layers": ("config.json", config(num_hidden_layers=10**9), "more than the 512"),
    "more layers than tensors": ("config.json", config(num_hidden_layers=500), "the checkpoint has 21 tensors"),
    "10^9 labels": ("config.json", config(num_labels=10**9), "num_labels"),
    "10^30 wide": ("config.json", config(hidden_size=10**30), "a number of many digits"),
    "huge in the dark": ("config.json", config(text_config={"num_hidden_layers": 10**9}), "more than the 512"),
    "experts": ("config.json", config(num_local_experts=60_000, num_hidden_layers=20), "layers of 60,000 experts"),
    "NaN": ("config.json", config(rms_norm_eps=float("nan")), "not a finite number"),
    "infinite": ("config.json", config(initializer_range=float("inf")), "not a finite number"),
    "deep": ("config.json", DEEP, "nested too deeply"),
    "a list": ("config.json", b"[1]", "not a JSON object"),
    "not JSON": ("config.json", b"{", "is not JSON"),
    "long": ("config.json", b" " * (2 << 20), "more than 1,048,576 bytes"),
    "many values": ("config.json", json.dumps({"a": [0] * 300_000}).encode(), "too many values"),
    "layers in words": ("config.json", config(num_hidden_layers="many"), "cannot be read"),
    "heads of none": ("config.json", config(num_attention_heads=0), "cannot be read"),
    "heads that do not divide": ("config.json", config(num_attention_heads=7), "number of attention heads (7)"),
    "width in words": ("config.json", config(hidden_size="64"), "Field 'hidden_size' expected int"),
    "heads are a table": ("config.json", config(num_attention_heads={}), "cannot be read"),
    "no type": ("config.json", b"{}", "cannot be read"),
    "own code": ("config.json", json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}).encode(), "trust_remote_code|cannot be"),
    "not a decoder": ("config.json", json.dumps({"model_type": "vit"}).encode(), "cannot be read|is not what"),
    "other shapes": ("config.json", config(hidden_size=128), "has shape"),
    "tokenizer is a list": ("tokenizer.json", b"[]", "not a JSON object"),
    "tokenizer of nothing": ("tokenizer.json", b"{}", "cannot be read"),
    "deep tokenizer": ("tokenizer.json", DEEP, "nested too deeply"),
    "growing tokenizer": ("tokenizer.json", json.dumps({"normalizer": BOMB, "model": {}}).encode(), "times as long"),
    "tokenizer of words": ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": "x", "merges": 7}}', "cannot be"),
    "own tokenizer": ("tokenizer_config.json", json.dumps({"tokenizer_class": "Evil", "auto_map": {
        "AutoTokenizer": ["evil.Tokenizer", None]}}).encode(), "custom code"),
    "deep tokenizer config": ("tokenizer_config.json", DEEP, "nested too deeply"),
    "generation in a list": ("generation_config.json", b"[]", "not a JSON object"),
    "weights of 2^62": ("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}", "header claims"),
    "shape of digits": ("model.safetensors", b"digits", "a damaged header"),
    "shape of thousands": ("model.safetensors", b"shape", "a damaged header"),
    "index without a map": ("model.safetensors.index.json", b'{"weight_map": 3}', "has no weight_map"),
    "index that climbs": ("model.safetensors.index.json", b'{"weight_map": {"a": "../../../etc/passwd"}}', "passwd"),
    "deep index": ("model.safetensors.index.json", DEEP, "nested too deeply"),
}  # fmt: skip
SHAPES = {b"digits": [int("9" * 4000)] * 500, b"shape": [1] * 500_000}


def refusal(home: Home, path: Path) -> str:
    """What `base add` says; it took a moment, is one line that can be printed, and left nothing behind."""
    with ends(), pytest.raises(BadFile) as caught:
        add_base("bad", path, home)
    assert caught.value.exit_code == 2
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 700
    assert list_bases(home) == []
    assert not list(home.tmp.iterdir())
    return said


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Callable[[str, bytes], Path]:
    """A folder like the tiny model's in which one file is another."""

    def build(name: str, content: bytes) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in tiny_folder.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        (folder / "evil.py").write_text("import os\nos.mkdir('evil-was-here')\nclass Config: pass\n")
        return folder

    return build


@pytest.mark.parametrize(("content", "told"), GGUF.values(), ids=GGUF)
def test_hostile_gguf_is_refused(content: bytes, told: str, home: Home, tmp_path: Path) -> None:
    """Counts, lengths, types and names that lie: refused for what they are; truncated is only what is."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    said = refusal(home, path)
    assert told in said
    assert ("truncated" in said) == ("truncated" in told)


@pytest.mark.parametrize(("name", "content", "told"), FILES.values(), ids=FILES)
def test_hostile_model_is_refused(
    name: str, content: bytes, told: str, home: Home, model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a model that lies, is too long or of another kind: a sentence, and no code of it was run."""
    monkeypatch.chdir(tmp_path)
    if content in SHAPES:
        entry = {"a": {"dtype": "F32", "shape": SHAPES[content], "data_offsets": [0, 4]}}
        raw = json.dumps(entry).encode()
        content = struct.pack("<Q", len(raw)) + raw
    folder = model(name, content)
    said = refusal(home, folder)
    assert any(part in said for part in told.split("|")), said
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "m.gguf"])
def test_pipes_and_devices_are_refused(name: str, home: Home, model: Callable, tmp_path: Path) -> None:
    """A file of a model that leads to a device or a pipe is refused without a wait."""
    folder = model("extra", b"")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if name == "config.json" else (folder / name).symlink_to("/dev/zero")
    said = refusal(home, folder / name if name == "m.gguf" else folder)
    assert any(part in said for part in ("a device or a pipe", "has no config.json", "has no model.safetensors")), said


def test_real_settings_pass() -> None:
    """What published models say is within the bounds: many layers, many experts, long contexts, large vocabularies."""
    for fields in (
        {"num_hidden_layers": 126, "max_position_embeddings": 10_485_760, "vocab_size": 262_208, "rope_theta": 1e7},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8, "n_group": 8},
        {"text_config": {"num_hidden_layers": 62, "layer_types": ["full_attention"] * 62}, "time_step_limit": [0.0, 9]},
        {"time_step_limit": [0.0, float("inf")], "n_positions": 1 << 20, "n_ctx": 1 << 20, "sliding_window": None},
    ):
        check_settings(fields, "config.json", num_tensors=100_000)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    check_tokenizer({"normalizer": {"type": "Sequence", "normalizers": [replace] * 9}, "model": {}}, "tokenizer.json")


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    """Settings of every type, lists skipped, and the names of the tensors."""
    path = tmp_path / "m.gguf"
    tokens = setting("tokenizer.ggml.tokens", 9, items(8, 2, text("a") + text("b")))
    scores = setting("tokenizer.ggml.scores", 9, items(6, 2, struct.pack("<2f", 0, 1)))
    head = gguf(LLAMA, tokens, scores, setting("x.eps", 6, struct.pack("<f", 0.5)), tensors=(tensor("w", (4, 4)),))
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(64))
    header = read_gguf_header(path)
    assert header.architecture == "llama"
    assert header.tensors == {"w"}
    assert {name: header.settings[name] for name in ("tokenizer.ggml.tokens", "x.eps")} == {
        "tokenizer.ggml.tokens": 2, "x.eps": 0.5,
    }  # fmt: skip


def test_a_model_that_names_no_end_of_its_own(home: Home, tmp_path: Path) -> None:
    """Where every end token lies beyond the model's own, answers would not end: it is refused, with what to correct."""
    said = refusal(home, save_tiny_model(tmp_path / "m", vocab_size=257))  # the tokenizer's end is 258
    assert "eos_token_id is 258, which is not one of the 257 tokens" in said
    add_base("fits", save_tiny_model(tmp_path / "fits", vocab_size=257, eos_token_id=[1, 258]), home)

"""A tokenizer's vocabulary in a GGUF: split and merged by llama.cpp as by us, or refused with the reason."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.gguf_split import BY_NAME, SPLITS, pre_tokenizer
from adapterhub_local.errors import BadFile, Incompatible
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.export.gguf_vocabulary import model_name, split_name
from tests.export.llama_cpp import serve, tokenise
from tests.tiny import SPECIALS

TEXTS = [
    "The film is long, but its last half hour isn't: 1234567 minutes, 3.14159!",
    "  two spaces,\n\n\ttabs and\r\nlines   \n",
    "We'LL see; HTTPServer <|im_start|>user\nhi<|im_end|>\n caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600 \u00bd",
    "a_b = [c**2 for c in d if c != 'x']  # $5+<=>^~|`",
    " x",
    "x",
]
SIZE = 320  # tokens of the base's embeddings
RULES = [split.names[0] for split in SPLITS]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp is not installed: pip install 'adapterhub-local[llama-cpp]'",
)


def byte_level(name: str) -> Tokenizer:
    """A small byte-level tokenizer with merges learned from the texts."""
    split = BY_NAME[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=split.takes_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(split), decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if split.composes else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def sentencepiece(*, prefix: bool) -> Tokenizer:
    """A small tokenizer of the kind that Llama 2 (with `prefix`) and Gemma have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for text in ["\u2581", *"thefilmsonau", "th", "the", "\u2581the", "is", "\u2581is", "on", "lo", "\u2581\u2581"]:
        vocab[text] = len(vocab)
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIALS])
    return tokenizer


def with_tokenizer(base: BaseInfo, tokenizer: Tokenizer, **special: str) -> BaseInfo:
    """The base with another tokenizer in its folder."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(base.folder)
    return base


@needs_llama_cpp
@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_splits_as_the_tokenizer_does(tiny_base: BaseInfo, tmp_path: Path, name: str) -> None:
    """Numbers, contractions, white space, letters of other scripts and special tokens become the same tokens."""
    base = with_tokenizer(tiny_base, byte_level(name), eos_token="<|im_end|>")
    write_gguf_model(base, None, tmp_path / "m.gguf", name="m", kind="f16")

    server, ours = serve(tmp_path / "m.gguf"), AutoTokenizer.from_pretrained(base.folder)
    for text in TEXTS:
        assert tokenise(server, text) == ours(text)["input_ids"], text


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_merges_pieces_as_the_tokenizer_does(tiny_base: BaseInfo, tmp_path: Path, prefix: bool) -> None:
    """Sentencepiece's kind: scores that follow the merges give the same pieces, bytes for what has none."""
    base = with_tokenizer(tiny_base, sentencepiece(prefix=prefix), unk_token="<unk>", eos_token="</s>")
    write_gguf_model(base, None, tmp_path / "m.gguf", name="m", kind="f16")

    server, ours = serve(tmp_path / "m.gguf"), AutoTokenizer.from_pretrained(base.folder)
    for text in ["the film is long", "  the  is\nthe", "caf\u00e9 the", "lothe"]:
        assert tokenise(server, text) == ours(text)["input_ids"], text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"splits text by a rule unknown there \(\?Whitespace\)"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, r"unknown there \(\?ByteLevel\)"),
        ({"pre_tokenizer": None}, r"unknown there \(\?None\)"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises by Lowercase"),
    ],
)
def test_splitters_that_are_not_known_are_refused(tiny_base: BaseInfo, change: dict, reason: str) -> None:
    """A rule that llama.cpp does not have is named, with the two ways out."""
    data = json.loads((tiny_base.folder / "tokenizer.json").read_bytes())
    with pytest.raises(Incompatible, match=reason + r".*--vocabulary FILE\.gguf, or export --to fused"):
        split_name({**data, **change}, tiny_base)


def test_other_models_of_tokens_are_refused(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """Word pieces and pairs that no merge makes: refused, nothing is written."""
    path = tiny_base.folder / "tokenizer.json"
    data = json.loads(path.read_bytes())
    for model, reason in (
        ({"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##",
          "max_input_chars_per_word": 9}, "its model is WordPiece"),
        ({**data["model"], "byte_fallback": True, "vocab": {"a": 0, "b": 1, "ab": 2}}, "make a token that is not"),
    ):  # fmt: skip
        settings = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}
        path.write_text(json.dumps({**data, **settings, "pre_tokenizer": None, "model": model}))
        with pytest.raises(Incompatible, match=reason):
            write_gguf_model(tiny_base, None, tmp_path / "m.gguf", name="m")
        assert not (tmp_path / "m.gguf").exists()


def test_vocabulary_of_another_gguf(tiny_base: BaseInfo, tmp_path: Path) -> None:
    """--vocabulary takes over that of a GGUF of the same model, and refuses another's, or what has none."""
    write_gguf_model(tiny_base, None, tmp_path / "one.gguf", name="m")
    write_gguf_model(tiny_base, None, tmp_path / "two.gguf", name="m", vocabulary=tmp_path / "one.gguf")
    fields = [gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("one", "two")]
    for key in fields[0]:
        if key.startswith("tokenizer."):
            assert fields[0][key].contents() == fields[1][key].contents()
    assert fields[1]["tokenizer.chat_template"].contents().startswith("{% for")

    with_tokenizer(tiny_base, byte_level("smollm"), eos_token="<|im_end|>")
    with pytest.raises(Incompatible, match="is not that of base 'tiny': token 256 differs"):
        write_gguf_model(tiny_base, None, tmp_path / "x.gguf", name="m", vocabulary=tmp_path / "one.gguf")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadFile, match="is not a GGUF model with a vocabulary"):
        write_gguf_model(tiny_base, None, tmp_path / "x.gguf", name="m", vocabulary=tmp_path / "no.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_models_name_does_not_make_a_phi3_of_it(tiny_base: BaseInfo) -> None:
    """llama.cpp reads off the name whether white space after special tokens is dropped: only Phi-3's may say so."""
    assert model_name("a@1 on me/Phi3-like", tiny_base) == ("a@1 on me/Phi 3-like", [])
    path = tiny_base.folder / "tokenizer.json"
    data = json.loads(path.read_bytes())
    data["added_tokens"][0]["rstrip"] = True
    path.write_text(json.dumps(data))
    assert "keeps the white space" in model_name("a@1 on x", tiny_base)[1][0]
    data["model"]["vocab"] |= {"<unk>": 300, "<s>": 301, "</s>": 302, "<|endoftext|>": 303}
    path.write_text(json.dumps(data))
    assert model_name("a@1 on x", replace(tiny_base)) == ("a@1 on x (phi-3)", [])

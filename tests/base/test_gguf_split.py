"""A base from a GGUF file splits text as its makers' tokenizer does, which is what llama.cpp does with that file."""

import importlib.util
import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapterhub_local.base.add import add_base
from adapterhub_local.base.chat_template import stop_tokens
from adapterhub_local.base.gguf_split import BY_NAME
from adapterhub_local.base.gguf_tokenizer import gguf_tokenizer
from adapterhub_local.base.source import open_source
from adapterhub_local.errors import BadFile
from adapterhub_local.export.gguf_model import write_gguf_model
from adapterhub_local.settings import Home
from tests.export.llama_cpp import serve, tokenise
from tests.tiny import CHAT_TEMPLATE, SPECIALS, save_tiny_model

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp is not installed: pip install 'adapterhub-local[llama-cpp]'",
)
SIZE = 900
PARTS = [
    *("1", "22", "333", "4444", "55555", "3.14", "1,000", " 7", "\u0661", "\u00bd"),
    *("it's", "We'LL", "don't", "I'd", " the", "the", "HTTPServer", "caf\u00e9", " na\u00efve", "\u00c9t\u00e9"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\u3000"),
    *("\u65e5\u672c\u8a9e", "\u4e2d\u6587", "\ud55c\uad6d", "\u3072\u3089", "\u0434\u0430", "\u0e44\u0e17\u0e22"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469", ".", ", ", "!?", "...", "--", "$5", "<=>", "a_b", "/x/y", "(", "|"),
    *("<|im_start|>", "<|im_end|>"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a tiny model whose merges go over every border that some rule draws: blanks, digits, lines, marks."""
    folder = tmp_path_factory.mktemp("gguf")
    save_tiny_model(folder / "model", vocab_size=SIZE)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [one + other + one for one in PARTS for other in PARTS]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIALS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder / "model")
    home = Home(folder / "home")
    write_gguf_model(add_base("m", folder / "model", home), None, folder / "m.gguf", name="m", kind="f16")
    return folder / "m.gguf"


def with_settings(path: Path, target: Path, **changes: Any) -> Path:
    """The GGUF at `path` with other `tokenizer.ggml.` settings; None leaves one out."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    known = {name.removeprefix("tokenizer.ggml."): field for name, field in reader.fields.items()}
    for name, field in known.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for name, value in changes.items():
        if value is not None:
            kind = gguf.GGUFValueType.UINT32 if name.endswith("_id") else gguf.GGUFValueType.get_type(value)
            inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(f"tokenizer.ggml.{name}", value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def tokenizer_of(path: Path, **changes: Any) -> Any:
    """Our tokenizer of the GGUF at `path` with other `tokenizer.ggml.` settings."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    return gguf_tokenizer(fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, path)


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_name_splits_as_llama_cpp(name: str, model: Path, tmp_path: Path) -> None:
    """Under every name that a file may have, a text becomes the tokens that llama.cpp makes of it, and text again."""
    if name == "falcon":
        pytest.skip("its makers' rule cuts more than llama.cpp's, inside of words that their vocabulary does not have")
    server, tokenizer = serve(with_settings(model, tmp_path / "m.gguf", pre=name)), tokenizer_of(model, pre=name)
    for text in (" ".join(PARTS), "".join(PARTS), "".join(reversed(PARTS)), "".join(PARTS[::3]), "\n".join(PARTS[::2])):
        assert tokenizer(text)["input_ids"] == tokenise(server, text)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.fixture(scope="module", params=["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3"])
def both(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """llama.cpp over a file with this name, and our tokenizer of the same file."""
    path = with_settings(model, tmp_path_factory.mktemp("named") / "m.gguf", pre=request.param)
    return serve(path), open_source(path).tokenizer


@needs_llama_cpp
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_any_text_is_split_as_llama_cpp_does(both: Any, text: str) -> None:
    """The families of most bases, on whatever is written."""
    server, tokenizer = both
    text = unicodedata.normalize("NFC", text)  # as some of the models do and llama.cpp never does
    assert tokenizer(text)["input_ids"] == tokenise(server, text)


def test_a_rule_that_is_not_known_is_refused(home: Home, model: Path, tmp_path: Path) -> None:
    """A file that splits by another rule, or does not say by which, is refused with the reason and the way out."""
    for name, reason in (
        ("marsian", "by the rule 'marsian', which is not known"),
        (None, "by a rule that it does not name"),
    ):
        path = with_settings(model, tmp_path / f"{name}.gguf", pre=name)
        with pytest.raises(BadFile, match=f"splits text {reason[:10]}.*{reason[-12:]}.*give the transformers folder"):
            add_base("bad", path, home)
    assert not home.bases.exists() or not list(home.bases.iterdir())
    assert not list(home.tmp.iterdir())


@needs_llama_cpp
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}]
)
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_texts_begin_and_end_as_the_file_says(name: str, flags: dict, model: Path, tmp_path: Path) -> None:
    """BOS before and EOS behind a text where the file wants them, and by default where llama.cpp puts them."""
    tokens = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].contents()
    begins = flags | {"pre": name, "bos_token_id": tokens.index("<|im_start|>")}
    path = with_settings(model, tmp_path / "m.gguf", **({"add_bos_token": None, "add_eos_token": None} | begins))
    tokenizer = open_source(path).tokenizer

    assert tokenizer("a 1")["input_ids"] == tokenise(serve(path), "a 1")
    assert tokenizer.bos_token == "<|im_start|>"


def test_a_base_keeps_what_the_file_says(home: Home, model: Path, tmp_path: Path) -> None:
    """The base on disk splits as the file says, has its template, and ends answers where the file's turns end."""
    tokens = gguf.GGUFReader(model).fields["tokenizer.ggml.tokens"].contents()
    end, types = tokens.index("<|im_end|>"), [1] * len(tokens)
    types[end] = types[tokens.index("<|im_start|>")] = 3
    types[tokens.index("the")] = 4
    path = with_settings(model, tmp_path / "m.gguf", pre="smollm", eos_token_id=0, token_type=types)
    base = add_base("smol", path, home)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)

    pieces = tokenizer.tokenize("it's 123 the<|im_end|>")
    assert "".join(pieces) == "it's\u0120123\u0120the<|im_end|>"
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "2", "3"]  # one by one
    assert pieces[-2:] == ["the", "<|im_end|>"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.added_tokens_decoder[end].special
    assert not tokenizer.added_tokens_decoder[tokens.index("the")].special
    named = {field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name.endswith("eot_token_id")}
    ends = json.loads((base.folder / "generation_config.json").read_bytes())["eos_token_id"]
    assert set(ends) == {0, end} | named
    assert stop_tokens(base.folder, tokenizer) == set(ends)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"thefilmsonaub"]
JOINED = [
    "th",
    "the",
    "\u2581the",
    "is",
    "\u2581is",
    "on",
    "lo",
    "\u2581\u2581",
    "\u2581film",
    "fi",
    "lm",
    "film",
    "\u2581f",
]


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [True, False, None])
def test_pieces_are_joined_as_llama_cpp_does(prefix: bool | None, model: Path, tmp_path: Path) -> None:
    """Sentencepiece's kind: the best score is joined first, bytes for what has no piece, a blank before a text."""
    tokens = [*PIECES, *JOINED, *SPECIALS]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), SIZE)]
    types = [2, 3, 3, *[6] * 256] + [1] * (len(tokens) - 259)
    types[tokens.index("<|im_end|>")] = 3
    order = {text: float(-number) for number, text in enumerate(reversed(JOINED))}
    path = with_settings(
        model, tmp_path / "m.gguf", model="llama", pre="default", merges=None, tokens=tokens, token_type=types,
        scores=[order.get(text, -1000.0) for text in tokens], add_space_prefix=prefix, bos_token_id=1, eos_token_id=2,
        unknown_token_id=0, padding_token_id=0,
    )  # fmt: skip
    server, tokenizer = serve(path), open_source(path).tokenizer
    for text in (
        "the film is long",
        " the",
        "  the  film\nis",
        "caf\u00e9 \u65e5",
        "a<|im_end|>the<|im_end|> the",
        "x",
    ):
        assert tokenizer(text)["input_ids"] == tokenise(server, text), text
        if "<|" not in text:  # a blank is put behind special tokens too
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text.strip()


DAMAGED = {
    "merge without a token": ({"merges": ["q z"]}, "the merge 'q z' has no token"),
    "merge of one part": ({"merges": ["qz"]}, "the merge 'qz' is not a pair"),
    "no merges": ({"merges": None}, "has no merges of a tokenizer"),
    "types for other tokens": ({"token_type": [1, 1]}, "a damaged vocabulary"),
    "a token beyond the end": ({"eos_token_id": 99_999}, "names token 99999 as its eos token, and has 900 tokens"),
}


@pytest.mark.parametrize(("changes", "told"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_vocabularies(changes: dict, told: str, home: Home, model: Path, tmp_path: Path) -> None:
    """A vocabulary whose parts do not fit together is refused in a sentence; nothing is left behind."""
    with pytest.raises(BadFile, match=told):
        add_base("bad", with_settings(model, tmp_path / "m.gguf", **changes), home)
    assert not list(home.tmp.iterdir())

"""A base's tokenizer as a GGUF vocabulary: tokens, types, merges or scores, special tokens, chat template.

llama.cpp splits a text before it merges by a rule that it knows by name, and our tokenizer has one as data: only rules
that are equal in both are written, everything else is refused, since a model that splits otherwise answers otherwise.
"""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.gguf_split import SPLITS
from adapterhub_local.base.load import quiet_loading
from adapterhub_local.errors import BadFile, Incompatible

# (how the text is split, whether a word that is a token is taken whole, whether the text is normalised to NFC first)
# -> the name in llama.cpp's src/llama-vocab.cpp, which does not normalise
NAMES = {(", ".join(split.steps), split.takes_words, split.composes): split.names[0] for split in reversed(SPLITS)}
_SPACE = "\u2581"  # what sentencepiece writes for a space


def write_vocabulary(writer: Any, base: BaseInfo, size: int) -> list[str]:
    """Add the base's vocabulary of `size` tokens (as many as the embeddings have); returns what llama.cpp does
    otherwise. Raises Incompatible for a tokenizer that it does not have.
    """
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    data = read_tokenizer(base)
    model, notes = data["model"], []
    if model.get("type") != "BPE":
        raise Incompatible(refusal(base, f"its model is {model.get('type')}, not BPE"))
    if any(
        value for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if (value := model.get(key))
    ):
        raise Incompatible(refusal(base, "it has dropout, or marks the parts of words"))
    tokens, types = _tokens(data, base, size)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        prefix, note = _space_prefix(data, base)
        writer.add_add_space_prefix(prefix)
        notes += note
        writer.add_token_list(tokens)
        added = {token["content"] for token in data.get("added_tokens", [])}
        writer.add_token_scores(scores(tokens, model["vocab"], merges, added, base))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(data, base))
        writer.add_token_list(tokens)
        writer.add_token_merges(
            [_joined(merge) for merge in merges] or ["a b"]
        )  # llama.cpp wants some; "ab" is not a token
    writer.add_token_types(types)
    _write_special(writer, base, tokenizer)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def model_name(name: str, base: BaseInfo) -> tuple[str, list[str]]:
    """`name` as a model's name, and what llama.cpp does otherwise.

    Whether white space after a special token is dropped it reads off the name: as Phi-3's tokenizer does if that is in
    the name, where it then fails without four tokens, and not for any other model.
    """
    data = read_tokenizer(base)
    added = data.get("added_tokens", [])
    known = data["model"].get("vocab", {}).keys() | {token["content"] for token in added}
    strips = any(token.get("rstrip") for token in added)
    if strips and known >= {"<unk>", "<s>", "</s>", "<|endoftext|>"}:
        return (name if re.search("phi-?3", name.lower()) else f"{name} (phi-3)"), []
    note = "after a special token llama.cpp keeps the white space that this base's tokenizer drops"
    return re.sub("(?i)(phi)-?3", r"\1 3", name), [note] if strips else []


def read_tokenizer(base: BaseInfo) -> dict[str, Any]:
    """The base's tokenizer.json. Raises Incompatible if it has none."""
    path = base.folder / "tokenizer.json"
    if not path.is_file():
        raise Incompatible(refusal(base, "it is not kept as a tokenizer.json"))
    data: dict[str, Any] = json.loads(path.read_bytes())
    return data


def refusal(base: BaseInfo, reason: str) -> str:
    return (
        f"llama.cpp has no tokenizer like that of base '{base.name}': {reason}. Take the vocabulary of a GGUF of the "
        "same model with --vocabulary FILE.gguf, or export --to fused"
    )


def _tokens(data: dict[str, Any], base: BaseInfo, size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token; ids that the embeddings have and the tokenizer does not are unused."""
    import gguf

    is_bytes = bool(data["model"].get("byte_fallback"))
    texts = {index: text for text, index in data["model"]["vocab"].items()}
    types = dict.fromkeys(texts, int(gguf.TokenType.NORMAL))
    if is_bytes:
        known = data["model"]["vocab"]
        types |= {
            known[f"<0x{byte:02X}>"]: int(gguf.TokenType.BYTE) for byte in range(256) if f"<0x{byte:02X}>" in known
        }
    for added in data.get("added_tokens", []):
        texts[added["id"]] = added["content"] if added["special"] else added["content"].replace(_SPACE, " ")
        types[added["id"]] = int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    unknown = data["model"].get("unk_token")
    if is_bytes and unknown in data["model"]["vocab"]:
        types[data["model"]["vocab"][unknown]] = int(gguf.TokenType.UNKNOWN)
    if max(texts) >= size:
        raise Incompatible(refusal(base, f"it has the token {max(texts)}, its embeddings end at {size - 1}"))
    unused = int(gguf.TokenType.UNUSED)
    return [texts.get(i, f"[PAD{i}]") for i in range(size)], [types.get(i, unused) for i in range(size)]


def _joined(merge: tuple[str, ...]) -> str:
    """A merge in one string; spaces inside a part are written as the byte alphabet does."""
    return " ".join(part.replace(" ", "\u0120") for part in merge)


def split_name(data: dict[str, Any], base: BaseInfo) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits. Raises Incompatible for another rule."""
    if (data.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise Incompatible(refusal(base, f"it normalises by {data['normalizer']['type']}"))
    split = data.get("pre_tokenizer") or {}
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    rules = [_rule(step) for step in steps]
    if rules[-1:] == [""] and len(rules) > 1:  # patterns, then bytes without a rule of their own
        rules = rules[:-1]
    rule, takes_words = ", ".join(rules), bool(data["model"].get("ignore_merges"))
    composes = data.get("normalizer") is not None
    name = NAMES.get((rule, takes_words, composes)) or NAMES.get((rule, takes_words, not composes))
    if name is None:
        raise Incompatible(refusal(base, f"it splits text by a rule unknown there ({rule[:60] or 'none'})"))
    return name


def _rule(step: dict[str, Any]) -> str:
    """One step of a splitter in a word, or its pattern; "?" with its type for what llama.cpp has no form of."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex", True) else ""
    if kind == "Digits":
        return "digits" if step.get("individual_digits") else "numbers"
    if kind == "Punctuation" and str(step.get("behavior")).lower() == "contiguous":
        return "punctuation"
    pattern = step.get("pattern") or {}
    if kind == "Split" and not step.get("invert") and step.get("behavior") == "Isolated" and "Regex" in pattern:
        return str(pattern["Regex"])
    return f"?{kind}"


def _space_prefix(data: dict[str, Any], base: BaseInfo) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and what differs. Raises Incompatible for another normaliser."""
    normal = data.get("normalizer") or {}
    steps = normal["normalizers"] if normal.get("type") == "Sequence" else [normal] if normal else []
    kinds = [(step["type"], step.get("prepend") or (step.get("pattern") or {}).get("String")) for step in steps]
    split = data.get("pre_tokenizer") or {}
    if kinds == [("Prepend", _SPACE), ("Replace", " ")] and not split:
        return True, []
    gemmas = split.get("type") == "Split" and split.get("pattern") == {"String": " "}
    if kinds == [("Replace", " ")] and (not split or gemmas):
        return False, []
    if not kinds and split.get("type") == "Metaspace" and not split.get("split", True):
        scheme = split.get("prepend_scheme", "always")
        differs = "after each special token llama.cpp reads a space that this base's tokenizer does not"
        return scheme != "never", [differs] if scheme == "first" else []
    raise Incompatible(refusal(base, "it rewrites text before it splits it, in a way that is not known there"))


def scores(
    tokens: list[str], vocab: dict[str, int], merges: list[tuple[str, ...]], added: set[str], base: BaseInfo
) -> list[float]:
    """Sentencepiece's score of each token: the earlier a merge makes it, the higher.

    llama.cpp merges whatever two neighbours make a token, the best score first; our tokenizer only what is in its
    list. They are the same if each such pair is in it. Raises Incompatible if one is not.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    known = set(merges)
    for text in vocab.keys() - added:
        if text.startswith("<0x") and len(text) == 6:  # a byte
            continue
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab and (text[:cut], text[cut:]) not in known:
                raise Incompatible(refusal(base, f"{text[:cut]!r} and {text[cut:]!r} make a token that is not merged"))
    return [float(-ranks[text]) if text in ranks else -1e6 if len(text) > 1 else 0.0 for text in tokens]


def _write_special(writer: Any, base: BaseInfo, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids of special tokens, and whether a text begins or ends with one."""
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ids = tokenizer("x")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    path = base.folder / "generation_config.json"
    ends = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, tokenizer.eos_token_id)]
    if others:  # where a turn ends, if not where a text does
        writer.add_eot_token_id(others[-1])


def copy_vocabulary(writer: Any, path: Path, base: BaseInfo, size: int) -> None:
    """Add the vocabulary of the GGUF model `path` instead. Raises BadFile if it is none, Incompatible if its tokens are
    not those of the base.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        theirs = fields["tokenizer.ggml.tokens"].contents()
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise BadFile(f"{path} is not a GGUF model with a vocabulary: {error}") from None
    data = read_tokenizer(base)
    ours = {index: text for text, index in data["model"]["vocab"].items()}
    ours |= {added["id"]: added["content"] for added in data.get("added_tokens", [])}
    other = next((index for index, text in ours.items() if index >= len(theirs) or theirs[index] != text), None)
    if other is not None or len(theirs) != size:
        what = f"token {other} differs" if other is not None else f"it has {len(theirs)} tokens, not {size}"
        raise Incompatible(f"the vocabulary of {path} is not that of base '{base.name}': {what}")
    for field in fields.values():
        if field.name.startswith("tokenizer."):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)

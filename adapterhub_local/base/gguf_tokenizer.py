"""The tokenizer that a GGUF file describes: its vocabulary, how it splits and merges, its special tokens.

Byte-level tokenizers (`gpt2`) and sentencepiece's (`llama`) are built here, since what transformers builds splits most
of the former by GPT-2's rule whatever the file says, and puts no space before the latter where the file wants one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapterhub_local.base.gguf_split import BY_NAME, pre_tokenizer
from adapterhub_local.errors import BadFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens in the format
KINDS = ("gpt2", "llama")
_SPACE = "\u2581"  # what sentencepiece writes for a space
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>")


def gguf_tokenizer(fields: Mapping[str, Any], path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the settings `tokenizer.*` in `fields`, None for a kind that is transformers' to build.

    Raises BadFile for a rule of splitting that is not known, and for settings that do not fit together.
    """
    kind = fields.get("tokenizer.ggml.model")
    # Gemma's scores are not the order of its merges, and its blanks are spelled otherwise: transformers knows both
    if kind not in KINDS or str(fields.get("general.architecture", "")).startswith("gemma"):
        return None
    tokens = _texts(fields, "tokens", path)
    types = list(fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise BadFile(f"{path} is a GGUF file with a damaged vocabulary: {len(tokens):,} tokens, {len(types):,} types")
    tokenizer, begins = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens, types, path)
    for wanted, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [AddedToken(text, normalized=False, special=is_special)
                 for text, of_type in zip(tokens, types, strict=True) if of_type == wanted and text]  # fmt: skip
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    special = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := _token_id(fields, key, len(tokens), path)) is not None
    }
    tokenizer.post_processor = _ends_of_text(fields, special, tokens, begins=begins)
    template = fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip


def answer_ends(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which an answer ends: end of text, and those of a turn that the file names or its template writes."""
    named = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    template = str(tokenizer.chat_template or "")
    vocabulary = tokenizer.get_vocab()
    # gpt-oss ends its thoughts with <|end|> and goes on; its answers end with <|return|>
    marks = [mark for mark in _ENDS if mark in template and mark in vocabulary and "<|return|>" not in vocabulary]
    found = [*named, tokenizer.eos_token_id, *(vocabulary[mark] for mark in marks)]
    return list(dict.fromkeys(number for number in found if type(number) is int and 0 <= number < len(vocabulary)))


def _byte_level(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path
) -> tuple[Tokenizer, bool]:
    """The tokenizer of a vocabulary in the byte alphabet, and whether its texts begin with BOS by default."""
    name = fields.get("tokenizer.ggml.pre")
    split = BY_NAME.get(str(name))
    if split is None:
        what = f"by the rule '{str(name)[:40]}', which is not known" if name else "by a rule that it does not name"
        raise BadFile(
            f"{path} splits text {what}: another rule gives other tokens than the model was trained on; "
            "give the transformers folder or the Hub id that it was made from" + ("" if name else ", or a newer GGUF")
        )
    merges = [_pair(merge, path) for merge in _texts(fields, "merges", path)]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    if (wrong := next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None)) is not None:
        raise BadFile(
            f"{path} is a GGUF file with a damaged vocabulary: the merge {' '.join(wrong)[:60]!r} has no token"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.takes_words))
    tokenizer.normalizer = normalizers.NFC() if split.composes else None
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(split), decoders.ByteLevel()
    return tokenizer, split.begins


def _sentencepiece(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path
) -> tuple[Tokenizer, bool]:
    """Pieces with scores: what makes a token is merged, the best score first, as llama.cpp does."""
    scores = list(fields.get("tokenizer.ggml.scores") or ())
    if len(scores) != len(tokens):
        raise BadFile(
            f"{path} is a GGUF file with a damaged vocabulary: {len(tokens):,} tokens, {len(scores):,} scores"
        )
    vocabulary = {text: number for number, text in enumerate(tokens)}
    cuts = [
        (-scores[number], number, text[:cut], text[cut:])
        for text, number in vocabulary.items()
        if types[number] in (NORMAL, USER_DEFINED, UNUSED)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    merges = [(left, right) for _, _, left, right in sorted(cuts)]
    unknown = next((text for text, of_type in zip(tokens, types, strict=True) if of_type == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _ends_of_text(
    fields: Mapping[str, Any], special: Mapping[str, str], tokens: Sequence[str], *, begins: bool
) -> processors.TemplateProcessing:
    """What stands before and behind every text: BOS and EOS where the file wants them and names them."""
    begins = bool(fields.get("tokenizer.ggml.add_bos_token", begins))
    ends = bool(fields.get("tokenizer.ggml.add_eos_token", False))
    before = [special["bos_token"]] if begins and "bos_token" in special else []
    behind = [special["eos_token"]] if ends and "eos_token" in special else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in behind)],
        special_tokens=[(text, tokens.index(text)) for text in dict.fromkeys((*before, *behind))],
    )


def _texts(fields: Mapping[str, Any], name: str, path: Path) -> list[str]:
    found = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BadFile(f"{path} has no {name} of a tokenizer: give the transformers folder that it was made from")
    return found


def _pair(merge: str, path: Path) -> tuple[str, str]:
    """The two parts of a merge; the first may be a blank itself."""
    match = re.fullmatch(r"(.[^ ]*) (.+)", merge, re.DOTALL)
    if match is None:
        raise BadFile(f"{path} is a GGUF file with a damaged vocabulary: the merge {merge[:60]!r} is not a pair")
    return match[1], match[2]


def _token_id(fields: Mapping[str, Any], name: str, count: int, path: Path) -> int | None:
    number = fields.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and not (type(number) is int and 0 <= number < count):
        raise BadFile(f"{path} names token {number} as its {name} token, and has {count:,} tokens")
    return number

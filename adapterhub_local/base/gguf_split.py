"""How a byte-level tokenizer splits a text before it merges, by the name that a GGUF file has for it.

A GGUF stores tokens and merges, and of the splitting only a name (`tokenizer.ggml.pre`). What the names mean is in
llama.cpp's src/llama-vocab.cpp; the rules here are those of the models' own tokenizer.json, from which llama.cpp's are
adapted. A model that splits otherwise than it was trained reads other tokens, so a name that is not here is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O = rf"{_CASED}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PATHS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_TAIL}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK = (
    rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_BLANKS = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
_PHRASES = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"  # EXAONE's words may hold single blanks
_STOPS = "[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]"


@dataclass(frozen=True)
class Split:
    """The steps in order, each on the pieces of the one before; a word of the vocabulary may be taken unmerged.

    A step is a pattern whose matches stand alone, or `bytes` (GPT-2's rule), `digits` (each alone), `numbers` or
    `punctuation`. `composes` is whether the models of this name normalise text to NFC first, begins whether a text
    begins with BOS where the file does not say so.
    """

    names: tuple[str, ...]
    steps: tuple[str, ...]
    takes_words: bool = False
    composes: bool = False
    begins: bool = False


# The first of the names is the one that is written. Checked against llama.cpp, each name, by tests/base/test_gguf_split
SPLITS = (
    Split(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling",
           "exaone4"), ("bytes",)),
    Split(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), ("digits", "bytes")),
    Split(("command-r",), ("digits", "bytes"), composes=True),
    Split(("falcon",), ("punctuation", "bytes", "numbers", "[0-9][0-9][0-9]")),
    Split(("qwen2", "megrez"), (_QWEN2,), composes=True),
    Split(("stablelm2", "deepseek-r1-qwen", "kormo", "hunyuan", "solar-open", "grok-2"), (_QWEN2,)),
    Split(("qwen35",), (_QWEN35,), composes=True),
    Split(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), (_LLAMA3,),
          takes_words=True, begins=True),
    Split(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    Split(("tekken",), (rf"{_CASED}|{_UPPER}|\p{{N}}|{_PATHS}|{_TAIL}",), takes_words=True, begins=True),
    Split(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_GPT4O,)),
    Split(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), (r"\p{N}{1,3}", _HAN, _DEEPSEEK)),
    Split(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
                                r"\p{N}")),
    Split(("bailingmoe", "bailingmoe2", "llada-moe"),
          (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
    Split(("seed-coder",), (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
    Split(("minicpm5",), (r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SIGNS}|{_TAIL}"), takes_words=True),
    Split(("jais-2",),
          (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_BLANKS}|\s{{1,2}}(?!\S)|\s{{1}}",)),
    Split(("exaone-moe",),
          (rf"{_CONTRACTIONS}|{_PHRASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)),
    Split(("ufakzeka",), (rf"{_WORD}|\p{{N}}|{_SIGNS}|{_TAIL}",)),
    Split(("laguna",), (r"[^\n]+|[\n]+", _QWEN2)),
    Split(("bloom", "poro-chat", "gpt3-finnish"), (f" ?{_STOPS}+",)),
    Split(("viking",), (f" ?{_STOPS}+", r"\p{N}")),
)  # fmt: skip
BY_NAME = {name: split for split in SPLITS for name in split.names}


def pre_tokenizer(split: Split) -> pre_tokenizers.PreTokenizer:
    """The splitter of the `tokenizers` library, as the models' own tokenizer.json have it."""
    own: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "numbers": lambda: pre_tokenizers.Digits(individual_digits=False),
        "punctuation": lambda: pre_tokenizers.Punctuation("contiguous"),
    }
    steps = [own[step]() if step in own else pre_tokenizers.Split(Regex(step), "isolated") for step in split.steps]
    if "bytes" not in split.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)

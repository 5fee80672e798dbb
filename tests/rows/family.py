"""What a family's chat template is tested with: the template, its tokens, and pieces that several templates share."""

# ruff: noqa: E501 - a template is easier to read on one line
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A template with its special tokens; `stops` are those at which the family's generation config ends an answer.

    lacks: what it has no way to write (system, second system, thoughts, two users). divides: earlier turns are
    written differently once more follow.
    """

    template: str
    eos: str = "<|im_end|>"
    specials: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    divides: bool = False
    variables: tuple[tuple[str, bool], ...] = ()


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """One token a byte, the family's special tokens, and marks of thoughts and calls that are added but not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<s>", family.eos, *family.specials])
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<s>", eos_token=family.eos,
        chat_template=family.template,
    )  # fmt: skip


def stops_of(family: Family) -> frozenset[int]:
    """The ids of the family's stops, the end of text among them."""
    return frozenset(tokenizer_of(family).convert_tokens_to_ids([family.eos, *family.stops]))


def turns(written: str, prompt: str, *, before: str = "", after: str = "") -> str:
    """A template that writes every message as `written`, and `prompt` where the assistant is to speak."""
    return (
        f"{before}{{% for m in messages %}}{written}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% else %}}{after}{{% endif %}}"
    )


IM = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
IM_PROMPT = "'<|im_start|>assistant\\n'"
IM_TOKENS = ("<|im_start|>",)
SAID = "m.content.split('</think>')[-1].lstrip('\\n')"
THOUGHT = "m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else ''"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FIRST_SYSTEM = "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
DATE = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
CALL = "{'name': c.function.name, 'arguments': c.function.arguments} | tojson"
CALLS = "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' + " + CALL + " + '\\n</tool_call>' }}{% endfor %}"
SCHEMAS = "{% for t in tools or [] %}{{ '\\n' + t | tojson }}{% endfor %}"
PROMPTED = "{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}"
IM_TOOLS = (  # the schemas behind the first system message
    "{% if tools %}" + PROMPTED + "{{ '# Tools\\n<tools>' }}" + SCHEMAS + "{{ '\\n</tools><|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}" + PROMPTED + "{{ '<|im_end|>\\n' }}{% endif %}"
)
IS_FIRST_RESULT = "(loop.first or messages[loop.index0 - 1].role != 'tool')"
IS_LAST_RESULT = "(loop.last or messages[loop.index0 + 1].role != 'tool')"
IM_RESULTS = (  # all results of one turn in a turn of the user
    "{{ ('<|im_start|>user' if "
    + IS_FIRST_RESULT
    + " else '') + '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' + "
    "('<|im_end|>\\n' if " + IS_LAST_RESULT + " else '') }}"
)
LAST_QUERY = (  # found from the end, as Qwen 3 does
    "{% set ns = namespace(seen=false, last=0) %}{% for m in messages[::-1] %}{% if not ns.seen and m.role == 'user' %}"
    "{% set ns.seen = true %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
)
THINKS = "(m.reasoning_content or (" + THOUGHT + ")).strip('\\n')"
ALTERNATE = "{% if m.role in ('user', 'assistant') and (m.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if m.role in ('user', 'assistant') %}{% set ns.turns = ns.turns + 1 %}{% endif %}"

"""Reading prompts: as transformers reads them, in many threads at once, and nothing that cannot fit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from serve.errors import ContextTooLong
from serve.requests.messages import Message
from serve.text.encode import Encoder, characters
from serve.text.prompt import PromptReader, end_tokens
from tests.tiny import VOCABULARY, byte_tokenizer, llama_config


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: blanks are marked, every text begins with one, and with a special token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "unigram": unigram_tokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(max_size=60), st.booleans())
def test_ids_are_those_of_transformers(name: str, text: str, special: bool) -> None:
    """Every text has the ids that the tokenizer itself gives it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    tokenizer = TOKENIZERS[name]
    assert Encoder(tokenizer).encode(text, add_special_tokens=special) == tokenizer.encode(
        text, add_special_tokens=special
    )


def test_many_read_at_once() -> None:
    """Threads that read at the same time get what each gets alone."""
    encoder = Encoder(TOKENIZERS["bytes"])
    texts = [chr(97 + number) * (1000 + number) for number in range(20)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: encoder.encode(text, add_special_tokens=False), texts * 5))
    assert found == [encoder.encode(text, add_special_tokens=False) for text in texts] * 5


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_characters(value: object) -> None:
    """Every text in a value counts, wherever it stands."""

    def count(part: object) -> int:
        match part:
            case str():
                return len(part)
            case list():
                return sum(map(count, part))
            case dict():
                return sum(count(key) + count(one) for key, one in part.items())
        return 0

    assert characters(value) == count(value)


def test_what_cannot_fit_is_not_read() -> None:
    """More characters than all tokens of the context could have are refused, and what might fit is read."""
    tokenizer = TOKENIZERS["bytes"]
    reader = PromptReader(tokenizer, VOCABULARY, 100)
    longest = len("<|im_start|>")
    assert len(reader.plain("a" * (100 * longest))) == 100 * longest  # the engine counts tokens
    for prompt in ("a" * (100 * longest + 1), [1] * 101):
        with pytest.raises(ContextTooLong):
            reader.plain(prompt)
    with pytest.raises(ContextTooLong) as caught:
        reader.chat([Message(role="user", content="a" * 700)] * 2)
    assert caught.value.param == "messages"


SPELLED = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "<|pad|>", "<tag>", "system", "\n", " ", "x<|"]), max_size=5
)


def told() -> PreTrainedTokenizerFast:
    """A tokenizer with a token that its template writes and that it does not call special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tag>"])
    tokenizer.chat_template = tokenizer.chat_template + "{{ '<tag>' }}{{ note }}"
    return tokenizer


TAGGED = told()


@given(SPELLED.map("".join), st.sampled_from(["user", "system", "tool", "name", "note"]))
def test_control_tokens_in_texts_are_text(text: str, place: str) -> None:
    """No text brings a control token into the prompt, whoever says it; without any the ids are as they were."""
    reader = PromptReader(TAGGED, VOCABULARY + 1)
    role = place if place in ("user", "system") else "user"
    message = {"role": role, "content": text if place not in ("name", "note") else "x"}
    if place == "name":
        message["name"] = text
    if place == "tool":
        message = {"role": "tool", "content": text, "tool_call_id": "a"}
    variables = {"note": text} if place == "note" else {}
    control = set(TAGGED.all_special_ids) | {TAGGED.convert_tokens_to_ids("<tag>")}
    tokens = reader.chat([Message(**message)], variables=variables)
    empty = reader.chat([Message(**{**message, "content": "x", "name": None})])
    assert [token for token in tokens if token in control] == [token for token in empty if token in control]
    assert TAGGED.decode(tokens) == TAGGED.decode(
        reader.chat([Message(**message)], variables=variables, parse_special=True)
    )
    if not any(spelled in text for spelled in ("<|im_start|>", "<|im_end|>", "<|pad|>", "<tag>")):
        assert tokens == reader.chat([Message(**message)], variables=variables, parse_special=True)


def test_ends_that_are_no_tokens_of_the_base() -> None:
    """An end beyond the vocabulary, which nothing can answer, is left out: no request is refused for it."""
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(llama_config())
    model.generation_config.eos_token_id = [5, 5000, -7]
    assert end_tokens(model, tokenizer) == {5, tokenizer.eos_token_id}

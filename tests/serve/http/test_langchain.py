"""LangChain's OpenAI classes against the server over HTTP, called as LangChain's documentation shows."""

import asyncio
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.patience import PATIENCE
from tests.serve.conftest import Server

QUESTION = [SystemMessage("You are brief."), HumanMessage("Hello")]


class Mood(BaseModel):
    """How a text sounds."""

    mood: Literal["good", "bad"] = Field(description="the mood")
    score: Literal[1, 2, 3]


@tool
def weather(place: Literal["Rome", "Oslo"]) -> str:
    """The weather at a place."""
    return f"sunny in {place}"


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client that asks no proxy."""
    with httpx.Client(trust_env=False, timeout=PATIENCE) as client:
        yield client


def settings(server: Server, http: httpx.Client, model: str = "alpha", **changes: Any) -> dict[str, Any]:
    """What both classes are given."""
    common = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "http_client": http}
    return {"model": model, "temperature": 0, "max_tokens": 12, **common, **changes}


def test_invoke(server: Server, http: httpx.Client) -> None:
    """An answer is what the official client gets, with usage, the reason it ended and the adapter as its model."""
    answer = ChatOpenAI(**settings(server, http, "alpha@prod")).invoke(QUESTION)
    turns = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello"}]
    official = server.client.chat.completions.create(model="alpha", messages=turns, max_tokens=12, temperature=0)
    assert isinstance(answer, AIMessage)
    assert answer.content == official.choices[0].message.content
    assert answer.usage_metadata is not None
    assert official.usage is not None
    assert answer.usage_metadata["total_tokens"] == official.usage.total_tokens
    assert answer.response_metadata["finish_reason"] == official.choices[0].finish_reason
    assert answer.response_metadata["model_name"] == "alpha@prod"
    assert ChatOpenAI(**settings(server, http, "beta")).invoke(QUESTION).content != answer.content


def test_stream_batch_and_async(server: Server, http: httpx.Client) -> None:
    """Streams, batches and asynchronous calls say what a plain call says; a stream ends with usage."""
    model = ChatOpenAI(**settings(server, http))
    plain = model.invoke("Hello")
    chunks = list(model.stream("Hello", stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert len(chunks) > 3
    assert whole.content == plain.content
    assert whole.usage_metadata is not None
    assert plain.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == plain.usage_metadata["output_tokens"]
    assert [answer.content for answer in model.batch(["Hello", "Hello"])] == [plain.content] * 2

    async def later() -> tuple[Any, str]:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
            model = ChatOpenAI(**settings(server, http, http_async_client=client))
            streamed = [chunk.text async for chunk in model.astream("Hello")]
            return (await model.ainvoke("Hello")).content, "".join(streamed)

    assert asyncio.run(later()) == (plain.content, plain.content)


def test_a_chain_and_its_settings(server: Server, http: httpx.Client) -> None:
    """A prompt, a model and a parser in a chain; stop, seed and log-probabilities bound to the model have effect."""
    prompt = ChatPromptTemplate.from_messages([("system", "You translate to {language}."), ("human", "{text}")])
    model = ChatOpenAI(**settings(server, http, temperature=1.0, seed=3, max_tokens=20))
    asked = {"language": "German", "text": "Hello"}
    said = (prompt | model | StrOutputParser()).invoke(asked)
    assert said
    assert (prompt | model | StrOutputParser()).invoke(asked) == said
    cut = (prompt | model.bind(stop=[said[5:7]]) | StrOutputParser()).invoke(asked)
    assert cut == said[: said.index(said[5:7])]
    tokens = (prompt | model.bind(logprobs=True, top_logprobs=2)).invoke(asked).response_metadata["logprobs"]["content"]
    assert len(tokens) == 20
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_structured_output(server: Server, http: httpx.Client) -> None:
    """A class for an answer is held to in every answer, streamed too, also with the raw message beside it."""
    model = ChatOpenAI(**settings(server, http, temperature=1.5, max_tokens=100, seed=1))
    structured = model.with_structured_output(Mood, method="json_schema")
    assert isinstance(structured.invoke("Hello"), Mood)
    assert isinstance(list(structured.stream("Hello"))[-1], Mood)
    both = model.with_structured_output(Mood, method="json_schema", include_raw=True).invoke("Hello")
    assert isinstance(both, dict)
    assert both["parsing_error"] is None
    assert both["parsed"] == Mood.model_validate_json(both["raw"].content)


def test_structured_output_through_a_call(tool_server: Server, http: httpx.Client) -> None:
    """The way of older models, a forced call of one tool, gives the class too."""
    model = ChatOpenAI(**settings(tool_server, http, temperature=1.5, max_tokens=100))
    assert isinstance(model.with_structured_output(Mood, method="function_calling").invoke("Hello"), Mood)


def test_tools(tool_server: Server, http: httpx.Client) -> None:
    """Bound tools are called with arguments of their schema, whole or streamed, and their results go back."""
    plain = ChatOpenAI(**settings(tool_server, http, max_tokens=100, temperature=1.0, seed=1))
    model = plain.bind_tools([weather], tool_choice="any")
    answer = model.invoke("How is it in Rome?")
    assert answer.tool_calls
    call = answer.tool_calls[0]
    assert call["name"] == "weather"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content.startswith("sunny in ")
    streamed = None
    for chunk in model.stream("How is it in Rome?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [
        (one["name"], one["args"]) for one in answer.tool_calls
    ]
    results = [weather.invoke(one) for one in answer.tool_calls]
    after = plain.invoke([HumanMessage("How is it in Rome?"), answer, *results])
    assert after.content is not None


def test_completions(server: Server, http: httpx.Client) -> None:
    """The class for plain completions: an answer, a stream of it, and several prompts at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of its own dependencies are deprecated
        model = OpenAI(**settings(server, http, "beta"))
    expected = server.complete(model="beta", prompt="Once", max_tokens=12).json()["choices"][0]["text"]
    assert model.invoke("Once") == expected
    assert "".join(model.stream("Once")) == expected
    generations = model.generate(["Once", "Twice"]).generations
    assert generations[0][0].text == expected
    assert len(generations) == 2


def test_errors_say_what_is_wrong(server: Server, http: httpx.Client) -> None:
    """An unknown adapter is the client's NotFoundError, with our sentence in it."""
    with pytest.raises(openai.NotFoundError, match="there is no adapter 'nobody'"):
        ChatOpenAI(**settings(server, http, "nobody")).invoke("Hello")

"""Clients as people install them, each with its defaults, against one server. Run in an environment of their own:

python tests/clients/python_clients.py http://127.0.0.1:8000      # prints a line of JSON for each client
"""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version

URL = sys.argv[1]
V1 = f"{URL}/v1"
MODEL = "alpha"
USER = {"role": "user", "content": "Hello"}
WEATHER = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]}
os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": V1, "OPENAI_AGENTS_DISABLE_TRACING": "1", "NO_PROXY": "*"}
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "ANTHROPIC_API_KEY": "none"}


def openai_client() -> str:
    import openai

    client = openai.OpenAI(max_retries=0)
    said = client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=8)
    turns = [USER, said.choices[0].message.model_dump(), USER]
    assert client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8).usage.completion_tokens
    assert [*client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=8, stream=True)]
    first = client.responses.create(model=MODEL, input="Hello", max_output_tokens=8)
    assert client.responses.create(model=MODEL, input=[*first.output, USER], max_output_tokens=8).output
    stored = {"previous_response_id": first.id, "input": "More", "max_output_tokens": 8}
    assert client.responses.create(model=MODEL, **stored).previous_response_id == first.id
    assert len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2
    return "chat, two turns, stream, responses and going on from one, embeddings"


def anthropic_client() -> str:
    import anthropic

    client = anthropic.Anthropic(base_url=URL, max_retries=0)
    tool = {"name": "weather", "input_schema": WEATHER}
    ask = {"model": MODEL, "messages": [USER], "max_tokens": 90}
    said = client.messages.create(**ask, tools=[tool], tool_choice={"type": "any"})
    assert said.content[0].input["place"] in ("Rome", "Oslo")
    with client.messages.stream(**ask) as stream:
        assert stream.get_final_message().usage.output_tokens
    return "tools, stream"


def ollama_client() -> str:
    import ollama

    client = ollama.Client(host=URL)
    assert client.chat(MODEL, [USER], options={"num_predict": 8}).done
    assert [*client.generate(MODEL, "Hello", options={"num_predict": 8}, stream=True)][-1].done
    return "chat, generate, stream"


def litellm_client() -> str:
    import litellm

    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}]
    for model, base in ((f"openai/{MODEL}", V1), (f"hosted_vllm/{MODEL}", V1), (f"ollama_chat/{MODEL}", URL)):
        said = litellm.completion(model=model, api_base=base, messages=messages, max_tokens=8)
        turns = [*messages, said.choices[0].message.model_dump(), USER]
        assert litellm.completion(model=model, api_base=base, messages=turns, max_tokens=8).usage.completion_tokens
        assert [*litellm.completion(model=model, api_base=base, messages=messages, max_tokens=8, stream=True)]
    said = litellm.completion(model=f"anthropic/{MODEL}", api_base=URL, messages=messages, max_tokens=8)
    assert said.usage.completion_tokens
    return "openai/, hosted_vllm/, ollama_chat/, anthropic/; two turns, stream, cache_control"


def instructor_client() -> str:
    import instructor
    import openai
    from pydantic import BaseModel

    class Point(BaseModel):
        is_open: bool

    client = instructor.from_openai(openai.OpenAI(max_retries=0))  # its default mode: a tool
    said = client.chat.completions.create(
        model=MODEL, messages=[USER], response_model=Point, max_tokens=90, max_retries=0
    )
    assert isinstance(said, Point)
    return "default mode (tools)"


def pydantic_ai_client() -> str:
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Point(BaseModel):
        is_open: bool

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key="none"))
    settings = {"max_tokens": 90}
    first = Agent(model, model_settings={"max_tokens": 8}).run_sync("Hello")
    more = Agent(model, model_settings={"max_tokens": 8}).run_sync("More", message_history=first.all_messages())
    assert more.usage
    assert isinstance(Agent(model, output_type=Point, model_settings=settings).run_sync("Hi").output, Point)
    return "text, history, default output (tools)"


def openai_agents_client() -> str:
    from agents import Agent, ModelSettings, Runner

    # a model of random weights ends nowhere by itself, which the client takes for a failure
    settings = ModelSettings(max_tokens=8, extra_body={"structured_outputs": {"choice": ["yes"]}})
    agent = Agent(name="a", instructions="Be brief", model=MODEL, model_settings=settings)

    async def two_turns() -> bool:
        said = await Runner.run(agent, "Hello")
        more = await Runner.run(agent, "More", previous_response_id=said.last_response_id)
        return bool(more.raw_responses and (await Runner.run(agent, [*said.to_input_list(), USER])).raw_responses)

    assert asyncio.run(two_turns())
    return "two turns over /v1/responses, and one that goes on from a stored answer"


def langchain_client() -> str:
    from langchain_anthropic import ChatAnthropic
    from langchain_ollama import ChatOllama
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    assert ChatOpenAI(model=MODEL, max_tokens=8).invoke("Hello").usage_metadata
    assert [*ChatOllama(model=MODEL, base_url=URL, num_predict=8).stream("Hello")]
    assert ChatAnthropic(model=MODEL, base_url=URL, max_tokens=8).invoke("Hello").usage_metadata
    assert OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False).embed_query("Hello")
    return "ChatOpenAI, ChatOllama, ChatAnthropic, OpenAIEmbeddings"


def llama_index_client() -> str:
    from llama_index.llms.openai_like import OpenAILike

    for is_chat in (True, False):
        model = OpenAILike(model=MODEL, api_base=V1, api_key="none", is_chat_model=is_chat, max_tokens=8)
        assert model.complete("Hello") is not None
        assert [*model.stream_complete("Hello")]
    return "chat, completion, streams"


def dspy_client() -> str:
    import dspy

    model = dspy.LM(f"openai/{MODEL}", api_base=V1, api_key="none", max_tokens=8, cache=False, num_retries=0)
    assert isinstance(model("Hello")[0], str | dict)
    return "LM"


def llm_client() -> str:
    import llm
    from llm.default_plugins.openai_models import Chat

    model = Chat("here", model_name=MODEL, api_base=V1)
    model.key = "none"
    conversation = llm.Conversation(model=model)
    for text in ("Hello", "More"):
        assert conversation.prompt(text, max_tokens=8).text() is not None
    return "two turns"


def smolagents_client() -> str:
    from smolagents import OpenAIModel

    model = OpenAIModel(MODEL, api_base=V1, api_key="none", max_tokens=8)
    assert model.generate([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).role == "assistant"
    return "generate"


CLIENTS: dict[str, Callable[[], str]] = {
    "openai": openai_client,
    "anthropic": anthropic_client,
    "ollama": ollama_client,
    "litellm": litellm_client,
    "instructor": instructor_client,
    "pydantic-ai-slim": pydantic_ai_client,
    "openai-agents": openai_agents_client,
    "langchain-openai": langchain_client,
    "llama-index-llms-openai-like": llama_index_client,
    "dspy": dspy_client,
    "llm": llm_client,
    "smolagents": smolagents_client,
}

if __name__ == "__main__":
    failed = 0
    for name, run in CLIENTS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        try:
            told = {"client": name, "version": version(name), "passes": True, "what": run()}
        except Exception as error:  # whatever a client raises is a line of the table
            traceback.print_exc()
            told = {
                "client": name,
                "version": version(name),
                "passes": False,
                "what": f"{type(error).__name__}: {error}",
            }
            failed += 1
        sys.stdout.write(f"{json.dumps(told)}\n")
        sys.stdout.flush()
    sys.exit(bool(failed))

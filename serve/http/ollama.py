"""The endpoints that Ollama's clients ask, over the same engine: answers, and what there is to ask."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response

from adapterhub_local.keys import Key
from serve.access import Scope, access
from serve.answers.models import Target, list_models
from serve.answers.ollama import LineAnswer, loaded
from serve.auth import allowed_by
from serve.http.front import key_of
from serve.http.translate import answer
from serve.requests.ollama import NAMES, GenerateRequest, OllamaChatRequest, ShowRequest, plain_name
from serve.service import Service
from serve.services import Services


def add_ollama(app: FastAPI, services: Services) -> None:
    """Add /api/chat, /api/generate, /api/tags, /api/show, /api/ps and /api/version."""

    @app.post("/api/chat")
    @access(Scope.INFER, counted=True)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        """Answer a conversation in Ollama's way."""
        service = await services.of(plain_name(body.model), key_of(request))
        return await answer(service, body.chat, request, LineAnswer, NAMES)

    @app.post("/api/generate")
    @access(Scope.INFER, counted=True)
    async def generate(body: GenerateRequest, request: Request) -> Any:
        """Answer, or continue, one text in Ollama's way."""
        service = await services.of(plain_name(body.model), key_of(request))
        if not body.prompt and not body.system:
            service.find(service.read(plain_name(body.model)), key_of(request))
            return loaded(body.model)
        return await answer(service, body.asked, request, lambda chat: LineAnswer(chat, is_chat=False), NAMES)

    @app.get("/api/tags")
    @access(Scope.ANY)
    def tags(request: Request) -> dict[str, Any]:
        """The base and every name, version and alias of its adapters, as far as the request's key allows them."""
        key = key_of(request)
        return {"models": [model for service in services for model in _known(service, key)]}

    @app.post("/api/show")
    @access(Scope.ANY)
    def show(body: ShowRequest, request: Request) -> dict[str, Any]:
        """One model: its template, what it can do, how long its context is."""
        service = services.of_now(plain_name(body.model), key_of(request))
        base = service.base.info
        target = service.find(service.read(plain_name(body.model)), key_of(request))
        thinks = service.reader.prompts.thoughts((), target.chat_settings) is not None
        template = service.base.tokenizer.chat_template
        family = str(type(service.base.model.config).model_type)
        facts = {"general.architecture": family, "general.basename": base.name,
                 f"{family}.context_length": service.engine.max_length}  # fmt: skip
        return {
            "modelfile": f"FROM {base.name}\n",
            "parameters": "",
            "template": template if isinstance(template, str) else "",
            "details": _details(service, target),
            "model_info": facts,
            "capabilities": ["completion", "tools", *(["thinking"] if thinks else [])],
            "adapter": target.adapter,
        }

    @app.get("/api/ps")
    @access(Scope.ANY)
    def running(request: Request) -> dict[str, Any]:
        """The base, and the adapters in memory that the request's key may ask."""
        allows = allowed_by(key_of(request))
        return {"models": [model for service in services for model in _in_memory(service, allows)]}

    @app.get("/api/version")
    @access(Scope.ANY)
    def version() -> dict[str, str]:
        """The version of this server, which is not Ollama's."""
        return {"version": app.version}


def _known(service: Service, key: Key | None) -> Iterator[dict[str, Any]]:
    """The base, and every name, version and alias of its adapters that a key may ask."""
    for model in list_models(service.base.info, service.registry, allowed_by(key), service.router()):
        created = datetime.fromtimestamp(model["created"], UTC).isoformat()
        target = service.find(service.read(model["id"]), key)
        yield _entry(service, model["id"], model["root"], created, target)


def _in_memory(service: Service, allows: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    base = service.base.info
    if allows(base.name):
        yield _entry(service, base.name, base.fingerprint, base.created_at, Target(base.name, base, None))
    for status in service.adapters():
        if status.num_bytes and status.label.text and all(map(allows, status.label.names)):
            target = Target(status.label.text, base, None)
            yield _entry(service, status.label.text, status.digest, base.created_at, target) | {
                "size": status.num_bytes,
                "size_vram": status.num_bytes,
            }


def _entry(service: Service, name: str, digest: str, created_at: str, target: Target) -> dict[str, Any]:
    size = target.version.size if target.version is not None and hasattr(target.version, "size") else 0
    return {"name": name, "model": name, "modified_at": created_at, "size": size,
            "digest": digest.removeprefix("sha256:"), "details": _details(service, target)}  # fmt: skip


def _details(service: Service, target: Target) -> dict[str, Any]:
    base, model = service.base.info, service.base.model
    family = str(type(model.config).model_type)
    parent = base.name if target.version is not None else ""
    size = f"{sum(each.numel() for each in model.parameters()) / 1e6:.0f}M"
    return {"parent_model": parent, "format": "safetensors", "family": family, "families": [family],
            "parameter_size": size, "quantization_level": base.kind.title}  # fmt: skip

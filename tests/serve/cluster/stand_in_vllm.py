"""Stands for vLLM, which needs an environment of its own: its options, socket and endpoints, without a model.

It answers with what it was asked. `python -m tests.vllm` runs the real one.
"""

import argparse
import json
import os
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

parser = argparse.ArgumentParser()
parser.add_argument("model")
for name in ("--served-model-name", "--uds", "--max-lora-rank"):
    parser.add_argument(name)
parser.add_argument("--enable-lora", action="store_true")
given = parser.parse_args()
app = FastAPI()


@app.get("/health")
def health() -> Response:
    return Response()


@app.get("/metrics")
def metrics() -> Response:
    return Response("# HELP vllm:running Requests\n# TYPE vllm:running gauge\nvllm:running 1\n")


@app.get("/v1/models")
def models() -> dict:
    return {"data": [{"id": given.served_model_name, "max_model_len": 77}]}


@app.post("/v1/completions", response_model=None)
async def completions(request: Request) -> Response | dict:
    body = await request.json()
    if body.get("prompt") == "end":
        os._exit(3)
    if body.get("stream"):
        return StreamingResponse(_events(body), media_type="text/event-stream")
    seen = {name: value for name, value in os.environ.items() if "VLLM" in name}
    return {"asked": body, "options": vars(given), "seen": seen, "headers": dict(request.headers)}


async def _events(body: dict) -> AsyncIterator[bytes]:
    for number in range(3):
        yield f"data: {json.dumps({'number': number, 'model': body['model']})}\n\n".encode()
    yield b"data: [DONE]\n\n"


uvicorn.run(app, uds=given.uds, log_level="warning")

"""Embeddings and the scores of given answers, as their endpoints give them. Plain dictionaries."""

import base64
import math
from array import array
from typing import Any

from serve.answers.models import Target
from serve.requests.probes import EmbeddingsRequest, ScoreRequest
from serve.text.generate import Generation


def embeddings(target: Target, generation: Generation, asked: EmbeddingsRequest) -> dict[str, Any]:
    """The body of POST /v1/embeddings."""
    data = []
    for index, prompt in enumerate(generation.prompts):
        assert prompt.vector is not None
        vector = normalized(prompt.vector) if asked.normalize else prompt.vector
        encoded = list(vector) if asked.encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": encoded})
    return {"object": "list", "data": data, **_common(target, generation)}


def scores(target: Target, generation: Generation, asked: ScoreRequest) -> dict[str, Any]:
    """The body of POST /v1/score: log-likelihoods of the answers, and their probabilities among themselves."""
    logprobs = [[value for part in prompt.scores for value in part.logprobs] for prompt in generation.prompts]
    sums = [math.fsum(each) for each in logprobs]
    most = max(sums)
    total = math.fsum(math.exp(each - most) for each in sums)
    data = [
        {"object": "score", "index": index, "choice": choice, "logprob": value, "token_logprobs": each,
         "probability": math.exp(value - most) / total}
        for index, (choice, value, each) in enumerate(zip(asked.choices, sums, logprobs, strict=True))
    ]  # fmt: skip
    best = asked.choices[sums.index(most)]
    return {"object": "list", "data": data, "best": best, **_common(target, generation)}


def normalized(vector: "array[float]") -> "array[float]":
    """A vector of length 1 in the same direction; zero stays zero."""
    length = math.sqrt(math.fsum(each * each for each in vector)) or 1.0
    return array("f", [each / length for each in vector])


def _common(target: Target, generation: Generation) -> dict[str, Any]:
    counts = generation.usage(1)
    return {
        "model": target.model,
        "system_fingerprint": target.fingerprint,
        "adapter": target.adapter,
        "usage": {
            "prompt_tokens": counts["prompt_tokens"],
            "total_tokens": counts["prompt_tokens"],
            "prompt_tokens_details": counts["prompt_tokens_details"],
        },
    }

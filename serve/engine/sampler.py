"""Choosing the next token of one request from its logits. Pure but for the generator's state."""

import secrets

import torch

from adapterhub_local.errors import QhubError
from serve.engine.request import Sampled, SamplingParams


class NotFinite(QhubError):
    """The model gave NaN or infinity instead of logits."""


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A generator of the request's own, so that its tokens do not depend on its neighbours; None if greedy.

    On the CPU wherever the model is: the same seed then gives the same tokens on every device.
    """
    if params.is_greedy:
        return None
    seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
    return torch.Generator().manual_seed(seed)


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> Sampled:
    """The next token from logits (vocabulary,) in float32. Raises NotFinite.

    Log-probabilities are of the model's own distribution, before temperature and cuts.
    """
    top = int(logits.argmax())
    # argmax finds NaN before any number, and minus infinity only if there is nothing else
    if not torch.isfinite(logits[top]):
        raise NotFinite("the model gave no finite logits for this request: the adapter may be damaged")
    token = top if generator is None else _draw(logits, params, generator)
    if params.logprobs is None:
        return Sampled(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(params.logprobs, len(logprobs)))
    alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs[token]), alternatives)


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token at random: temperature first, then the `top_k` likeliest, then the `top_p` nucleus of those."""
    logits = logits.cpu().double() / params.temperature
    tokens = None
    if params.top_k is not None and params.top_k < len(logits):
        logits, tokens = logits.topk(params.top_k)
    probabilities = torch.softmax(logits, dim=-1)
    if params.top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        tokens = order if tokens is None else tokens[order]
        # a token stays if those before it do not fill the nucleus yet; the first always stays
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
        probabilities[0] = max(float(probabilities[0]), torch.finfo(torch.float64).tiny)
    choice = int(torch.multinomial(probabilities, 1, generator=generator))
    return choice if tokens is None else int(tokens[choice])

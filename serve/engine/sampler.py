"""Choosing the next token of one request from its logits.

In this order: bias, penalties and what the answer may look like; temperature; then the cuts min_p, top_k and top_p.
"""

import secrets

import torch

from adapterhub_local.errors import InputError, QhubError
from serve.engine.request import Request, Sampled, SamplingParams


class NotFinite(QhubError):
    """The model gave NaN or infinity instead of logits."""


class NothingAllowed(InputError):
    """No token may come next: the answer cannot be completed in the form that was asked for."""


class Sampler:
    """One request's choices. Tokens that came are read from the request, so choosing again changes nothing but luck."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._generator = make_generator(request.params)
        self._num_seen = 0  # tokens of the answer that are counted below
        self._counts: torch.Tensor | None = None  # (vocabulary,) how often each token is in the answer
        self._in_prompt: torch.Tensor | None = None  # (vocabulary,)

    def sample(self, logits: torch.Tensor) -> Sampled:
        """The next token from logits (vocabulary,) in float32. Raises NotFinite, NothingAllowed.

        Log-probabilities are of the model's own distribution, before everything that is done to it here.
        """
        params = self.request.params
        top = int(logits.argmax())
        # argmax finds NaN before any number, and minus infinity only if there is nothing else
        if not torch.isfinite(logits[top]):
            raise NotFinite("the model gave no finite logits for this request: the adapter may be damaged")
        adjusted = self._adjust(logits)
        if self._generator is not None:
            token = draw(adjusted, params, self._generator)
        else:
            token = top if adjusted is logits else int(adjusted.argmax())
        if params.logprobs is None:
            return Sampled(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = logprobs.topk(min(params.logprobs, len(logprobs)))
        alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Sampled(token, float(logprobs[token]), alternatives)

    def _adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with bias, penalties and constraint; the very same tensor if there are none."""
        request, params = self.request, self.request.params
        is_short = len(request.output) < params.min_tokens and params.stop_token_ids
        if not (params.logit_bias or params.is_penalised or request.constraint or is_short):
            return logits
        logits = logits.clone()
        new = request.output[self._num_seen :]
        self._num_seen = len(request.output)
        if params.is_penalised:
            self._penalise(logits, new)
        for token, bias in params.logit_bias:
            logits[token] += bias
        if is_short:
            logits[list(params.stop_token_ids)] = -torch.inf
        if request.constraint is not None:
            for token in new:
                request.constraint.advance(token)
            allowed = torch.frombuffer(bytearray(request.constraint.allowed()), dtype=torch.uint8).bool()
            logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
            logits[len(allowed) :] = -torch.inf
        if not torch.isfinite(logits.max()):
            raise NothingAllowed("no token may come next in this answer: response_format and logit_bias exclude all")
        return logits

    def _penalise(self, logits: torch.Tensor, new: list[int]) -> None:
        params = self.request.params
        if self._counts is None or self._in_prompt is None:
            self._counts = torch.zeros_like(logits)
            self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
            self._in_prompt[list(set(self.request.prompt))] = True
        for token in new:
            self._counts[token] += 1
        if params.repetition_penalty != 1:
            repeated = (self._counts > 0) | self._in_prompt
            scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(repeated, scaled, logits))
        logits -= params.presence_penalty * (self._counts > 0) + params.frequency_penalty * self._counts


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A generator of the request's own, so that its tokens do not depend on its neighbours; None if greedy.

    On the CPU wherever the model is: the same seed then gives the same tokens on every device.
    """
    if params.is_greedy:
        return None
    seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
    return torch.Generator().manual_seed(seed)


def draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token at random from logits (vocabulary,): temperature, then min_p, top_k, and top_p of what is left."""
    logits = logits.cpu().double() / params.temperature
    tokens = None
    if params.min_p > 0:
        # of probabilities: p < min_p * p_max; a few likeliest that tie for the first place all stay
        logits = logits.masked_fill(logits - logits.max() < torch.tensor(params.min_p).double().log(), -torch.inf)
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

"""Choosing the next token of every request in the batch from its logits.

In this order: bias, penalties and what the answer may look like; then the likeliest, or one drawn at random.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence

import torch

from adapterhub_local.errors import InputError, QhubError
from serve.engine.draw import draw, likeliest
from serve.engine.form import Trail
from serve.engine.request import Request, Sampled


class NotFinite(QhubError):
    """The model gave NaN or infinity instead of logits."""


class NothingAllowed(InputError):
    """No token may come next: the answer cannot be completed in the form that was asked for."""


def choose(
    samplers: Sequence["Sampler"], logits: torch.Tensor, ahead: Sequence[Sequence[int]] | None = None
) -> list[Sampled | Exception]:
    """The next token of each request from logits (n, vocabulary) in float32, or NotFinite, NothingAllowed.

    `ahead`: tokens of each that come after its answer so far, and before the one that is chosen. What one request gets
    does not depend on the others. Log-probabilities are of the model's own distribution, before everything that is
    done to it here.
    """
    values, best = (each.tolist() for each in likeliest(logits))  # finds NaN before any number
    results: list[Sampled | Exception | None] = [None] * len(samplers)
    tokens: dict[int, int] = {}
    drawn: dict[int, torch.Tensor] = {}
    ahead = ahead or [()] * len(samplers)
    for row, (sampler, value) in enumerate(zip(samplers, values, strict=True)):
        if sampler.is_plain and math.isfinite(value):  # a tensor less a row: of many rows it is felt
            results[row] = Sampled(best[row])
            continue
        try:
            if not math.isfinite(value):
                raise NotFinite("the model gave no finite logits for this request: the adapter may be damaged")
            own = logits[row]
            adjusted = sampler.adjust(own, ahead[row])
        except (QhubError, RuntimeError) as error:
            results[row] = error
            continue
        if not sampler.request.params.is_greedy:
            drawn[row] = adjusted
        else:
            tokens[row] = best[row] if adjusted is own else int(adjusted.argmax())
    if drawn:
        params = [samplers[row].request.params for row in drawn]
        uniforms = [samplers[row].uniform(len(ahead[row])) for row in drawn]
        tokens |= zip(drawn, draw(torch.stack(list(drawn.values())), params, uniforms), strict=True)
    for row, token in tokens.items():
        results[row] = sampled(token, logits[row], samplers[row].request.params.logprobs)
    return [result for result in results if result is not None]


def sampled(token: int, logits: torch.Tensor, num_alternatives: int | None) -> Sampled:
    """The token with its log-probability and the likeliest alternatives, if they are wanted."""
    if num_alternatives is None:
        return Sampled(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(num_alternatives, len(logprobs)))
    alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs[token]), alternatives)


class Sampler:
    """What one request's choices depend on. Asking for one again changes nothing: what came is in the request.

    `ahead` are tokens that come after the answer so far, and before the one that is chosen.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        seed = request.params.seed if request.params.seed is not None else request.seed
        self._seed = secrets.randbits(63) if seed is None else seed
        params = request.params
        is_adjusted = params.logit_bias or params.is_penalised or params.min_tokens or request.form
        self.is_plain = params.is_greedy and params.logprobs is None and not is_adjusted  # the likeliest token, always
        self._counted = Trail()
        self._counts: torch.Tensor | None = None  # (vocabulary,) how often each token is in the answer
        self._in_prompt: torch.Tensor | None = None  # (vocabulary,)

    def uniform(self, num_ahead: int = 0) -> float:
        """The random number from [0, 1) for the token at that place of the answer, however often it is asked for.

        Of the request's own seed, so that its tokens depend neither on its neighbours nor on the device.
        """
        digest = hashlib.sha256(f"{self._seed} {len(self.request.output) + num_ahead}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def adjust(self, logits: torch.Tensor, ahead: Sequence[int] = ()) -> torch.Tensor:
        """Logits (vocabulary,) with bias, penalties and form; the very same tensor if there are none.

        Raises NothingAllowed.
        """
        request, params = self.request, self.request.params
        is_short = len(request.output) + len(ahead) < params.min_tokens and params.stop_token_ids
        if not (params.logit_bias or params.is_penalised or request.form or is_short):
            return logits
        logits = logits.clone()
        if params.is_penalised:
            self._penalise(logits, ahead)
        for token, bias in params.logit_bias:
            logits[token] += bias
        if is_short:
            logits[list(params.stop_token_ids)] = -torch.inf
        if request.form is not None:
            allowed = torch.frombuffer(bytearray(request.form.allowed(request.output, ahead)), dtype=torch.uint8).bool()
            logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
            logits[len(allowed) :] = -torch.inf
        if not torch.isfinite(logits.max()):
            raise NothingAllowed("no token may come next in this answer: response_format and logit_bias exclude all")
        return logits

    def _penalise(self, logits: torch.Tensor, ahead: Sequence[int]) -> None:
        params = self.request.params
        if self._counts is None or self._in_prompt is None:
            self._counts = torch.zeros_like(logits)
            self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
            self._in_prompt[list(set(self.request.prompt))] = True
        back, new = self._counted.move(self.request.output, ahead)
        for token in back:
            self._counts[token] -= 1
        for token in new:
            self._counts[token] += 1
        if params.repetition_penalty != 1:
            repeated = (self._counts > 0) | self._in_prompt
            scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(repeated, scaled, logits))
        logits -= params.presence_penalty * (self._counts > 0) + params.frequency_penalty * self._counts

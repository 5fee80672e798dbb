"""The loss of a packed row: cross-entropy over the answer tokens, whose logits are never all in memory.

Logits of 8,000 answer tokens over a vocabulary of 128,256 take 4 GB, and their gradient as much again. So
the output head is applied to a chunk of tokens at a time, and applied again in the backward pass.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from adapterhub_local.base.model import CausalModel, inner_model
from adapterhub_local.rows.bounds import LOGITS_BYTES
from adapterhub_local.rows.examples import Example
from adapterhub_local.rows.packing import Packed, forward, inputs, label_positions, pack

Head = Callable[[torch.Tensor], torch.Tensor]


def answer_loss(model: CausalModel, packed: Packed, head: Head | None, max_bytes: int = LOGITS_BYTES) -> torch.Tensor:
    """The negative log-likelihood of a row's answer tokens in nats: a float32 scalar, summed over the tokens.

    `head` is what `output_head` gave; None, or logits within `max_bytes`, and the model computes them at once.
    """
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, max_bytes // (4 * vocabulary))
    if head is None or packed.num_labels <= size:
        logits, targets, _ = forward(model, packed)
        return cross_entropy(logits.float(), targets, reduction="sum")
    positions = label_positions(packed)
    targets = packed.labels[0, positions].to(model.device)
    states = _states(model, packed)[positions.to(model.device) - 1]

    def chunk_loss(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(some).float(), wanted, reduction="sum")

    chunks = zip(states.split(size), targets.split(size), strict=True)
    losses = [checkpoint(chunk_loss, some, wanted, use_reentrant=False) for some, wanted in chunks]
    return torch.stack(losses).sum()


def answer_log_probs(
    model: CausalModel, packed: Packed, head: Head | None, count: int, max_bytes: int = LOGITS_BYTES
) -> torch.Tensor:
    """The log-probability in nats of the answer of each of a row's `count` examples: (count,) float32.

    Summed over its tokens, end of turn included. `head` and `max_bytes` as for `answer_loss`.
    """
    size = max(1, max_bytes // (4 * model.config.get_text_config().vocab_size))
    if head is None or packed.num_labels <= size:
        logits, targets, owner = forward(model, packed)
        losses = cross_entropy(logits.float(), targets, reduction="none")
    else:
        positions = label_positions(packed)
        targets, owner = packed.labels[0, positions].to(model.device), packed.segments[positions] - 1
        states = _states(model, packed)[positions.to(model.device) - 1]

        def chunk(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return cross_entropy(head(some).float(), wanted, reduction="none")

        chunks = zip(states.split(size), targets.split(size), strict=True)
        losses = torch.cat([checkpoint(chunk, some, wanted, use_reentrant=False) for some, wanted in chunks])
    sums = torch.zeros(count, device=losses.device)
    return sums.index_add(0, owner.to(losses.device), -losses)


def output_head(model: CausalModel, example: Example) -> Head | None:
    """What turns the model's last states (n, hidden) into logits (n, vocabulary), soft caps and scales included.

    Checked against the model's own logits of `example`: None where they differ, so that a model with
    something of its own after the head is computed by its own code.
    """
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    if layer is None:
        return None
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)

    def head(states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = layer(states)
        if scale != 1:
            logits = logits * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return logits

    packed = pack([example])
    with torch.inference_mode():
        wanted, _, _ = forward(model, packed)
        got = head(_states(model, packed)[label_positions(packed).to(model.device) - 1])
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 1e-2
    return head if torch.allclose(got.float(), wanted.float(), rtol=tolerance, atol=tolerance) else None


def _states(model: CausalModel, packed: Packed) -> torch.Tensor:
    """The body's last hidden states (T, hidden): what the output head is applied to."""
    states: torch.Tensor = inner_model(model).base_model(**inputs(model, packed))[0]
    return states[0]

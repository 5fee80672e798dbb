"""Mixed: the factors of a mixture. Apart from it, since only an engine loads torch."""

from collections.abc import Sequence

import torch

from serve.errors import BadParameter
from serve.lora.product import Factors
from serve.lora.rows import Embeddings, WithRows, rows_of


def mixed_factors(
    parts: Sequence[tuple[Factors, float]], dtype: torch.dtype, embeddings: Embeddings | None = None
) -> Factors:
    """The factors of a weighted sum: side by side, the weight in B, so that there are no cross terms.

    A (in_features, sum of ranks), B (sum of ranks, out_features); exact for any ranks and modules, and signs, and for
    DoRA too: W + sum of w_i (W_i - W), whose scales of W x are the weighted sum of those of the parts. Rows of
    `embeddings` are summed in the same way, a part without a row of a token having the base's. Raises
    BadParameter for a weight that overflows.
    """
    mixed: dict[str, tuple[torch.Tensor, ...]] = {}
    for module in dict.fromkeys(module for factors, _ in parts for module in factors):
        own = [(factors[module], weight) for factors, weight in parts if module in factors]
        a = torch.cat([each[0] for each, _ in own], dim=1)
        scaled = [(each[1].float() * weight).to(dtype) for each, weight in own]
        for part, (_, weight) in zip(scaled, own, strict=True):
            if not torch.isfinite(part).all():
                kind = str(dtype).removeprefix("torch.")
                raise BadParameter(f"the weight {weight!r} is too large: {module} overflows in {kind}", "model")
        b = torch.cat(scaled)
        scales = [each[2].float() * weight for each, weight in own if len(each) > 2]
        mixed[module] = (a, b, torch.stack(scales).sum(0).to(dtype)) if scales else (a, b)
    rows = embeddings.mixed([(rows_of(part), share) for part, share in parts]) if embeddings is not None else None
    if rows is None:
        return mixed
    if not all(bool(torch.isfinite(each.vectors).all()) for each in rows):
        raise BadParameter("a weight is too large: the rows of the embeddings overflow", "model")
    return WithRows(mixed, rows)

"""The losses of preferences as their papers have them: pure functions of log-probabilities, one value an item.

`chosen` and `rejected` are (n,) float32: the log-probability in nats of an answer given its prompt, summed over its
tokens, end of turn included; `lengths` (n, 2) int64 are their numbers of tokens; `reference` (n, 2) are the same
log-probabilities under the model that is compared with. Every function returns (n,) float32 losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from adapterhub_local.recipe.objectives import Preference


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs, (n, 2) each, chosen first; lengths in tokens; reference None where none is needed."""

    log_probs: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor | None

    @property
    def log_ratios(self) -> torch.Tensor:
        """log pi - log pi_ref (n, 2): a reward over beta."""
        assert self.reference is not None, "this loss has a reference"
        return self.log_probs - self.reference

    @property
    def means(self) -> torch.Tensor:
        """Log-probability a token (n, 2)."""
        return self.log_probs / self.lengths


Loss = Callable[[Pairs, float, Preference], torch.Tensor]


def smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): a share e of the labels is taken to be wrong (cDPO, arXiv
    2305.18290 with https://ericmitchell.ai/cdpo.pdf, Eq. 3)."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def dpo(pairs: Pairs, beta: float, given: Preference) -> torch.Tensor:
    """-log sigmoid(beta (r_w - r_l)), r = log pi(y|x) / pi_ref(y|x): arXiv 2305.18290, Eq. 7."""
    ratios = pairs.log_ratios
    return smoothed(beta * (ratios[:, 0] - ratios[:, 1]), given.label_smoothing)


def ipo(pairs: Pairs, beta: float, given: Preference) -> torch.Tensor:
    """(r_w - r_l - 1 / (2 beta))^2: arXiv 2310.12036, Eq. 17, beta being its tau; ratios a token, as its authors
    compute them and TRL does, so that long answers do not weigh more."""
    ratios = pairs.log_ratios / pairs.lengths
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2


def simpo(pairs: Pairs, beta: float, given: Preference) -> torch.Tensor:
    """-log sigmoid(beta (p_w - p_l) - margin), p = log-probability a token: arXiv 2405.14734, Eq. 6."""
    means = pairs.means
    return smoothed(beta * (means[:, 0] - means[:, 1]) - given.margin, given.label_smoothing)


def orpo(pairs: Pairs, beta: float, given: Preference) -> torch.Tensor:
    """-beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(log-probability a token): arXiv
    2403.07691, Eq. 7; the likelihood of the chosen answers, its Eq. 6, is added by the objective."""
    means = pairs.means.clamp(max=-1e-6)  # log(1 - p) of an answer that is certain
    odds = means - torch.log(-torch.expm1(means))
    return -beta * logsigmoid(odds[:, 0] - odds[:, 1])


def kto(
    ratios: torch.Tensor, is_good: torch.Tensor, divergence: torch.Tensor, beta: float, given: Preference
) -> torch.Tensor:
    """w (1 - sigmoid(beta (r - z))) of a good answer, w (1 - sigmoid(beta (z - r))) of a bad one: arXiv 2402.01306,
    Eq. 8. ratios (n,): r = log pi / pi_ref; divergence: z >= 0, the KL divergence from the reference, without gradient.
    """
    sign = torch.where(is_good, 1.0, -1.0)
    weights = torch.where(is_good, given.desirable_weight, given.undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * sign * (ratios - divergence)))


PAIRED: dict[str, Loss] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}

"""The classifier of a router: linear, with a temperature that makes its shares probabilities, and distances from what
it has seen.

Shares say which of the tasks a text is for, if it is for one. Whether it is for one at all depends on its distance to
the prompts of that task, measured in the directions in which prompts of one task differ among themselves (Lee et al.
2018, https://arxiv.org/abs/1807.03888): a text further away than nearly all held-out prompts is not of that task.
"""

from dataclasses import dataclass

import torch

PENALTY = 1e-4  # on the squares of the weights, for features of variance 1
STEPS = 300  # of L-BFGS, at most
DIRECTIONS = 32  # in which distances are measured
SHRINK = 1e-4  # of the mean variance, added to all: few prompts vary in few directions
NEVER = torch.finfo(torch.float32).max  # a distance that nothing is beyond


@dataclass(frozen=True)
class Classifier:
    """For `c` tasks, features of `h` numbers and `k` directions, all float32 on the CPU.

    weight (c, h), bias (c)       logits of a text's features
    directions (h, k)             in which distances are measured
    centres (c, k)                where each task's prompts are, in them
    limits (c)                    the squared distance beyond which a text is not of that task
    """

    weight: torch.Tensor
    bias: torch.Tensor
    directions: torch.Tensor
    centres: torch.Tensor
    limits: torch.Tensor
    temperature: float

    @property
    def columns(self) -> torch.Tensor:
        """What the embeddings are multiplied with (h, c + k): all that is asked of a text is linear."""
        return torch.cat([self.weight.T, self.directions], dim=1)

    def judge(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of features times `columns` (n, c + k): the shares of the tasks (n, c), and whether each text is near enough
        to each task's prompts (n, c)."""
        logits, places = outputs.split([len(self.bias), outputs.shape[1] - len(self.bias)], dim=1)
        shares = torch.softmax((logits + self.bias) / self.temperature, dim=1)
        return shares, _distances(places, self.centres) <= self.limits


def fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    held: torch.Tensor,
    held_labels: torch.Tensor,
    num_tasks: int,
    *,
    coverage: float,
    unbounded: int | None = None,
) -> Classifier:
    """Learn from `features` (n, h) of `labels` (n); temperature and limits from those held back.

    `coverage` is the share of held prompts that lie within the limits; the task `unbounded`, the base's, has none.
    Every task weighs the same, however many prompts it has.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    weight, bias = _regress((features - mean) / deviation, labels, num_tasks)
    weight = weight / deviation
    bias = bias - weight @ mean
    temperature = _temperature(held @ weight.T + bias, held_labels)
    centres = torch.stack([features[labels == task].mean(0) for task in range(num_tasks)])
    directions = _whitening(features - centres[labels])
    places = held @ directions
    distances = _distances(places, centres @ directions).gather(1, held_labels[:, None])[:, 0]
    limits = _limits(distances, held_labels, num_tasks, coverage, unbounded)
    return Classifier(weight, bias, directions, centres @ directions, limits, temperature)


def _regress(features: torch.Tensor, labels: torch.Tensor, num_tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression with a penalty, whose minimum is the only one."""
    weight = torch.zeros(num_tasks, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_tasks, requires_grad=True)
    counts = torch.bincount(labels, minlength=num_tasks).float()
    share = len(labels) / (num_tasks * counts)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ weight.T + bias
        value = torch.nn.functional.cross_entropy(logits, labels, weight=share) + PENALTY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature under which the held prompts are the likeliest (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    The right task is wanted with the certainty that so many examples give, not with all (Platt 1999): else a task that
    is never mistaken would be certain beyond what was seen.
    """
    num_tasks = logits.shape[1]
    if num_tasks == 1:
        return 1.0
    doubt = 1 / (len(labels) + 2)
    wanted = torch.full(logits.shape, doubt / (num_tasks - 1), dtype=torch.float64)
    wanted[torch.arange(len(labels)), labels] = 1 - doubt
    tried = torch.logspace(-1, 1, 201, dtype=torch.float64)
    losses = [-(wanted * (logits.double() / each).log_softmax(1)).sum() for each in tried]
    return float(tried[int(torch.stack(losses).argmin())])


def _whitening(differences: torch.Tensor) -> torch.Tensor:
    """The directions (h, k) in which prompts of one task differ the most, each scaled to variance 1."""
    size = differences.shape[1]
    covariance = differences.T @ differences / len(differences)
    covariance += SHRINK * covariance.trace().clamp_min(1e-12) / size * torch.eye(size)
    values, vectors = torch.linalg.eigh(covariance)
    kept = min(DIRECTIONS, size)
    scaled: torch.Tensor = vectors[:, -kept:] / values[-kept:].sqrt()
    return scaled


def _limits(
    distances: torch.Tensor, labels: torch.Tensor, num_tasks: int, coverage: float, unbounded: int | None
) -> torch.Tensor:
    """For each task the larger of its own quantile and that of all: a task whose prompts are all alike is not taken to
    be as narrow as they are."""
    bounded = labels != unbounded if unbounded is not None else torch.ones_like(labels, dtype=torch.bool)
    common = distances[bounded].quantile(coverage)
    limits = torch.full((num_tasks,), NEVER)
    for task in range(num_tasks):
        if task != unbounded:
            limits[task] = torch.maximum(distances[labels == task].quantile(coverage), common)
    return limits


def _distances(places: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, c) of places (n, k) to centres (c, k)."""
    return (places[:, None] - centres[None]).square().sum(-1)

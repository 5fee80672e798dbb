"""A router at work: a text, or a conversation, becomes the adapter that answers it, or the base.

router = Router(read_router(version.path, version), embeddings)
router.choose(["Is the sentiment of this text positive or negative? ..."])  # Choice(sentiment@prod, 0.998, "sure")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapterhub_local.errors import Incompatible
from adapterhub_local.refs import Reference
from adapterhub_local.router.features import Embeddings, Encode, clipped, projected
from adapterhub_local.router.files import RouterFiles

MAX_MESSAGES = 8  # of a conversation, from its beginning, that are looked at
MAX_IDS = 1000  # of a prompt that comes as token ids
Allows = Callable[[str], bool]
SURE, BASE, UNSURE, UNLIKE, EMPTY = "sure", "base", "unsure", "unlike", "empty"


@dataclass(frozen=True)
class Choice:
    """What answers a text: an adapter, or the base if `reference` is None.

    confidence   the probability that it is right: of an adapter its own, of the base that no adapter is meant
    reason       sure: the adapter is likely enough. The base answers what it was taught to (base), what no adapter is
                 likely enough for (unsure), what is unlike all that the router has seen (unlike) or empty (empty)
    """

    reference: Reference | None
    confidence: float
    reason: str


class Router:
    """A router over the embeddings of its base, which are kept as a table of a few numbers a token. Thread-safe."""

    def __init__(self, files: RouterFiles, embeddings: Embeddings) -> None:
        """Raises Incompatible if the embeddings are not those of its base."""
        size = files.classifier.directions.shape[0]
        if embeddings.weight.shape[1] != size:
            raise Incompatible(
                f"the router was made for a base with {size} numbers a token, this one has {embeddings.weight.shape[1]}"
            )
        self.files = files
        self._encode: Encode = embeddings.encode
        self._table = projected(embeddings.weight, files.classifier.columns)

    def choose(
        self, asked: Sequence[str | Sequence[int]], allows: Allows = lambda _: True, threshold: float | None = None
    ) -> Choice:
        """What answers a conversation of which the user said `asked`, texts or token ids, in this order.

        The first message that an adapter is found for decides, so that later messages do not change who answers;
        the base answers while there is none. Only adapters whose names are allowed are chosen. `threshold` counts
        instead of the router's own.
        """
        least = self.files.threshold if threshold is None else threshold
        last = Choice(None, 1.0, EMPTY)
        for text in asked[:MAX_MESSAGES]:
            ids = self._encode(clipped(text)) if isinstance(text, str) else text[:MAX_IDS]
            if ids and max(ids) < len(self._table):  # what is not a token is refused where prompts are read
                last = self.choose_row(self._table[torch.as_tensor(ids)].mean(0), allows, least)
                if last.reference is not None:
                    break
        return last

    def choose_row(self, outputs: torch.Tensor, allows: Allows, threshold: float) -> Choice:
        """The same of one text's features times the classifier's columns (c + k)."""
        shares, near = (part[0].tolist() for part in self.files.classifier.judge(outputs[None]))
        return decide(self.files, shares, near, allows, threshold)


def decide(
    files: RouterFiles, shares: Sequence[float], near: Sequence[bool], allows: Allows, threshold: float
) -> Choice:
    """The choice by the shares of the routes and whether the text is near enough to the prompts of each."""
    open_to = [index for index, route in enumerate(files.routes) if route is None or allows(route.name)]
    if not open_to:
        return Choice(None, 1.0, UNSURE)
    best = max(open_to, key=lambda index: shares[index])
    route, share = files.routes[best], shares[best]
    if route is None:
        return Choice(None, share, BASE)
    if not near[best]:  # as few of its own prompts are
        return Choice(None, 1.0 - share * (1.0 - files.coverage), UNLIKE)
    if share < threshold:
        return Choice(None, 1.0 - share, UNSURE)
    return Choice(route, share, SURE)

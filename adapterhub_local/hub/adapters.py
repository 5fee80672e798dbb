"""The adapters of a merge, wherever they are: files, versions of this home, or repositories on the Hub."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.layers import Weight
from adapterhub_local.merge.plan_file import WrittenPlan
from adapterhub_local.registry import Registry

if TYPE_CHECKING:
    from adapterhub_local.merge.parent import Opener
    from adapterhub_local.merge.plan import MergePlan

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


class Opened(Protocol):
    """Makes the plan of weights, by the written formula or another."""

    def __call__(self, weights: Sequence[Weight], formula: Formula | None = None) -> "MergePlan": ...


@contextmanager
def opening(
    written: WrittenPlan, registry: Registry, *, fetch: bool = True, note: Callable[[str], None] | None = None
) -> Iterator[Opened]:
    """A function that makes the plan of a written merge for given weights; what it converts is there in this block.

    References are resolved once; what is on the Hub only is pulled first and named to `note`, unless `fetch` is false.
    """
    from adapterhub_local.base.bases import find_base
    from adapterhub_local.durable import staging
    from adapterhub_local.merge.parent import is_path
    from adapterhub_local.merge.plan import make_plan

    base = find_base(written.with_base, registry.home) if written.with_base is not None else None
    if len(written.labels) == len(written.weights):  # else refused below, before anything is fetched
        labels = [label if is_path(label) else find(label, registry, fetch, note) for label in written.labels]
    else:
        labels = list(written.labels)

    def make(weights: Sequence[Weight], formula: Formula | None = None) -> "MergePlan":
        return make_plan(
            labels,
            weights,
            registry,
            alpha=written.alphas,
            force=written.force,
            formula=formula or written.formula,
            opener=opener,
        )

    opener: Opener | None = None
    if base is None:
        yield make
        return
    from adapterhub_local.merge.dora import through_base

    with staging(registry.home.scratch) as folder:
        opener = through_base(base, written.dora_rank, folder, force=written.force)
        yield make


def find(label: str, registry: Registry, fetch: bool = True, note: Callable[[str], None] | None = None) -> str:
    """The exact reference of a version, pulled first if `label` is a Hub id that names none here.

    Raises NotFound if it is neither here nor there, or would have to be fetched though `fetch` is false.
    """
    try:
        return str(registry.resolve(label))
    except (BadReference, NotFound) as error:
        if not HUB_ID.fullmatch(label):
            raise
        if not fetch:
            raise NotFound(
                f"{label} is not here, and a dry run fetches nothing: `qhub pull {label}` if it is a Hub id"
            ) from None
        from adapterhub_local.hub import pull

        repo_id, _, revision = label.partition("@")
        try:
            result = pull(registry, repo_id, revision=revision or None)
        except NotFound as missing:
            raise NotFound(f"{error}. Nor on the Hub: {missing}") from None
        if note is not None:
            note(f"{result.version} {'pulled' if result.is_new else 'here already'} from {repo_id}")
        return str(result.version)

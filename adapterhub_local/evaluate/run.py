"""Score a base or a registered version on a file of held-out chats, and keep the result with the version."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterhub_local.base.load import LoadedBase, import_bitsandbytes
from adapterhub_local.base.store import BaseInfo, find_by_fingerprint
from adapterhub_local.durable import digest_file
from adapterhub_local.errors import Incompatible
from adapterhub_local.evaluate.metrics import Score, evaluate
from adapterhub_local.registry import Version
from adapterhub_local.settings import Home
from adapterhub_local.train.examples import Example, read_chats, tokenise
from adapterhub_local.train.progress import Counting


def base_of(version: Version, home: Home) -> BaseInfo:
    """The base a version was made for. Raises Incompatible if this home does not have it."""
    fingerprint = version.base_fingerprint
    found = find_by_fingerprint(fingerprint, home) if fingerprint else None
    if found is None:
        entry = version.lineage.get("base", {})
        name = entry.get("hub_id") or entry.get("name") or "an unknown model"
        raise Incompatible(
            f"{version} was made for {name} ({(fingerprint or 'no fingerprint')[:19]}): add it with `qhub base add`"
        )
    return found


def read_tests(base: LoadedBase, data: Path, limit: int | None, max_length: int) -> list[Example]:
    """The tokenised examples of a held-out file, see `train.examples`."""
    return tokenise(read_chats(data, limit), base.tokenizer, max_length, data)


def score(
    base: LoadedBase,
    version: Version | None,
    tests: Sequence[Example],
    batch_size: int,
    progress: Counting | None = None,
) -> Score:
    """Score the base, or the base with a version's adapter on it, applied by plain PEFT."""
    if version is None:
        return evaluate(base.model, tests, batch_size, progress)
    return score_folder(base, version.path, tests, batch_size, progress)


def score_folder(
    base: LoadedBase, folder: Path, tests: Sequence[Example], batch_size: int, progress: Counting | None = None
) -> Score:
    """Score the base with the adapter in a PEFT folder on it."""
    import_bitsandbytes()  # before peft imports it
    from peft import PeftModel

    model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    try:
        return evaluate(model, tests, batch_size, progress)
    finally:
        model.unload()


def entry(scores: dict[str, Score], data: Path) -> dict[str, Any]:
    """The form in which a task's scores are kept."""
    return {who: score.to_json() for who, score in scores.items()} | {"data": digest_file(data)}

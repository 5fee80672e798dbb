"""Does this adapter belong to this base: one function, four answers, the same at every door."""

from dataclasses import replace

import pytest

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.origin import Origin, belongs, best
from adapterhub_local.lora.config import is_hub_id

OURS, THEIRS = "sha256:" + "1" * 64, "sha256:" + "2" * 64
ANSWERS: list[tuple[Origin, str]] = [
    (Origin(OURS), "exact"),
    (Origin(OURS, "someone/other"), "exact"),
    (Origin(THEIRS), "other"),
    (Origin(THEIRS, "Meta/Tiny-1B"), "other"),
    (Origin(None, "Meta/Tiny-1B"), "named"),
    (Origin(None, "meta/tiny-1b"), "named"),
    (Origin(None, "unsloth/Tiny-1B"), "named"),
    (Origin(None, "unsloth/tiny-1b-bnb-4bit"), "named"),
    (Origin(None, "unsloth/Tiny-1B-unsloth-bnb-4bit"), "named"),
    (Origin(None, "mlx-community/Tiny-1B-4bit"), "named"),
    (Origin(None, "unsloth/Tiny-3B-bnb-4bit"), "other"),
    (Origin(None, "someone/Tiny-1B"), "other"),
    (Origin(None, "someone/tiny-1b-bnb-4bit"), "other"),
    (Origin(None, "Meta/Tiny-1B", "abc"), "named"),
    (Origin(None, "Meta/Tiny-1B", "def"), "shapes"),
    (Origin(None, "/home/me/Tiny-1B"), "shapes"),
    (Origin(None, "./Tiny-1B"), "shapes"),
    (Origin(None, "C:\\models\\Tiny-1B"), "shapes"),
    (Origin(None, "outputs/checkpoint-100"), "shapes"),
    (Origin(None, "run/checkpoint-7"), "shapes"),
    (Origin(None, "models/tiny"), "shapes"),
    (Origin(None, "Tiny-1B"), "shapes"),
    (Origin(), "shapes"),
]


@pytest.fixture
def base(tiny_base: BaseInfo) -> BaseInfo:
    """A base that knows its id and revision."""
    return replace(tiny_base, fingerprint=OURS, hub_id="Meta/Tiny-1B", revision="abc")


@pytest.mark.parametrize(("said", "level"), ANSWERS, ids=lambda value: str(value))
def test_answers(base: BaseInfo, said: Origin, level: str) -> None:
    """The fingerprint decides where there is one, then the id in any spelling; a path of a machine decides nothing."""
    answer = belongs(said, base)
    assert answer.level == level
    assert bool(answer) is (level != "other")
    assert answer.reason.startswith("made for") is (level == "other")


def test_base_without_an_id_is_told_by_shapes(base: BaseInfo) -> None:
    """Where the base itself has no id on the Hub, nothing said by name is against it."""
    assert belongs(Origin(None, "someone/other"), replace(base, hub_id=None)).level == "shapes"


def test_best_of_several_bases(base: BaseInfo) -> None:
    """An exact base before a named one, and of named ones that with the revision."""
    other = replace(base, name="other", fingerprint=THEIRS, revision="def")
    assert best(Origin(THEIRS, "Meta/Tiny-1B"), [base, other]) is other
    assert best(Origin(None, "meta/tiny-1b"), [base, other]) is base
    assert best(Origin(None, "Meta/Tiny-1B", "def"), [base, other]) is other
    assert best(Origin(None, "someone/else"), [base, other]) is None
    assert best(Origin(), [base, other]) is None


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("org/model", True), ("a/b/c", False), ("model", False), ("../a", False), ("~/a", False), ("output/x", False),
     (None, False)],
)  # fmt: skip
def test_what_is_an_id_on_the_hub(name: str | None, is_id: bool) -> None:
    """Two words with a slash, of which the first is not what people call their folders."""
    assert is_hub_id(name) is is_id

"""A lineage from elsewhere either has the form in which it is read, or is refused at the door."""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_local.cli.main import run
from adapterhub_local.registry import Registry
from adapterhub_local.registry.lineage_form import check_lineage
from tests.stores import files

WHOLE: dict[str, Any] = {
    "kind": "merge", "task": "t", "description": "says yes or no", "recipe": {"train": {"seed": 1}},
    "base": {"name": "tiny", "fingerprint": "sha256:" + "0" * 64, "hub_id": None, "revision": None},
    "adapter": {"rank": 2, "alpha": 4.0, "num_parameters": 8, "target_modules": ["q_proj"]},
    "merge": {"method": "ties"},
    "parents": [{"reference": "b@1", "weight": 0.5, "manifest_digest": "sha256:" + "1" * 64}],
    "data": [{"role": "train", "file": "d.jsonl", "rows": 7, "digest": "sha256:" + "1" * 64}],
    "metrics": {"t": {"adapter": {"exact_match": 0.5, "loss": 1.0, "rows": 2, "intervals": {"loss": [0.9, 1.1]}},
                      "base": {"exact_match": 0.5, "loss": 1.0, "rows": 2}, "data": "sha256:0"}},
    "compatibility": {"level": "shapes", "base_fingerprint": None, "base_model": "someone/tiny"},
    "imported_from": {"reference": "a@7", "manifest_digest": "sha256:" + "2" * 64},
}  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """Where the parts of a nested value are; metrics that every score has stay, as evaluations write them."""
    found = [here] if here and here[-1] not in ("exact_match", "loss", "rows") else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += paths(part, (*here, key))
    return found


@given(path=st.sampled_from(paths(WHOLE)), value=VALUES)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_what_is_let_in_can_be_shown(path: tuple, value: Any) -> None:
    """Any part of a lineage replaced by anything: it is refused, or every verb that shows versions still works."""
    lineage = copy.deepcopy(WHOLE)
    place = lineage
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        check_lineage(lineage)
    except ValueError:
        return
    registry = Registry()
    reference = str(registry.publish("a", files(1), lineage))
    for line in ("list", "list a --json", f"show {reference}", f"show {reference} --json", f"lineage {reference}",
                 f"lineage {reference} --dot", "list --sort loss", "search says", "list --base tiny"):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run(line.split())
        assert caught.value.code in (0, None) or line in ("search says", "list --sort loss")


def test_our_own_lineage_is_let_in() -> None:
    """The whole of it, the least of it, and what a later version adds."""
    check_lineage(WHOLE)
    check_lineage({})
    check_lineage({"description": "größer\u00a0als\u3000日本 👩‍💻"})
    check_lineage({**WHOLE, "new": {"x": [1]}, "base": {**WHOLE["base"], "new": 1}})


@pytest.mark.parametrize(
    "part",
    [{"parents": None}, {"parents": [{}]}, {"parents": ["a@1"]}, {"data": {}}, {"metrics": []}, {"metrics": {"t": 1}},
     {"metrics": {"t": {"adapter": 5}}}, {"metrics": {"t": {"adapter": {"x": [1]}}}}, {"base": "tiny"},
     {"base": {"fingerprint": 7}}, {"adapter": {"alpha": "4"}}, {"adapter": {"alpha": True}}, {"description": ["x"]},
     {"metrics": {"t": {"adapter": {"intervals": {"loss": [1]}}}}}, {"imported_from": "b@1"},
     {"description": "\x1b[31mred"}, {"metrics": {"\x1b[2J": {"adapter": {}}}}, {"base": {"name": "a\nb"}}],
    ids=str,
)  # fmt: skip
def test_another_form_is_refused(part: dict[str, Any]) -> None:
    """What would be read as something else is named."""
    with pytest.raises(ValueError, match="another form") as caught:
        check_lineage({**WHOLE, **part})
    assert str(caught.value).isprintable()

"""Records of a remote's log: what is read as one of ours, whatever else lies there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_local.registry.remote_kinds import KINDS, parse

SOUND = {
    "version": {"name": "a", "number": 1, "manifest": "sha256:" + "0" * 64, "origin": None},
    "alias": {"name": "a", "alias": "prod", "number": 1, "old": None},
    "split": {"name": "a", "shares": [["prod", 1]]},
    "tag": {"name": "a", "number": 1, "tag": "x", "is_set": True},
    "evaluation": {"name": "a", "number": 1, "task": "t", "digest": "sha256:" + "0" * 64},
    "key": {
        "id": "00000000",
        "key": {
            "id": "00000000", "digest": "0" * 64, "scopes": ["infer"], "created_at": "2026-01-01T00:00:00Z",
            "adapters": [], "rate": "1/min", "concurrency": 1, "expires_at": "2026-01-01T00:00:00Z", "note": "n",
        },
    },
    "revocation": {"id": "00000000"},
}  # fmt: skip
WHO = {"by": "ada@laptop", "at": "2026-01-01T00:00:00Z"}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from(["../../x", "a\0", "A" * 300, "v1", "latest", "sha256:zz"]), st.lists(st.none(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2), st.just([["prod", 0]]), st.just([["prod", 1]] * 2),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sound_records_are_read(kind: str) -> None:
    """Each kind has an example that is read, and says what it is about."""
    record = parse(7, {"kind": kind, **WHO, **SOUND[kind]})
    assert (record.number, record.subject[0], record.by) == (7, kind, WHO["by"])


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_field_may_be_hostile(kind: str, data: st.DataObject) -> None:
    """A record with any field replaced, missing or added is either read as one of ours, or refused with a reason."""
    value = {"kind": kind, **WHO, **json.loads(json.dumps(SOUND[kind]))}
    where = value["key"] if kind == "key" and data.draw(st.booleans()) else value
    name = data.draw(st.sampled_from([*sorted(where), "more"]))
    where[name] = data.draw(VALUES)
    try:
        record = parse(1, value)
    except ValueError:
        return
    assert hash(record.subject) is not None
    assert record.kind in KINDS

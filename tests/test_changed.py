"""What `make check-fast` runs: the tests of the rooms that changed."""

from tests.changed import related_tests


def test_a_file_stands_for_the_related_tests_its_room() -> None:
    """Rooms become their folders of tests, files at the root their file, tests themselves; nothing is run twice."""
    paths = [
        "adapterhub_local/merge/rank.py",
        "tests/merge/test_merge_rank.py",
        "adapterhub_local/refs.py",
        "serve/engine/scheduler.py",
        "serve/service.py",
        "README.md",
    ]

    assert related_tests(paths) == ["tests/merge", "tests/test_refs.py", "tests/serve/engine", "tests/serve/http"]

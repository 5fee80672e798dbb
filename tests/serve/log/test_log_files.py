"""The files of the request log: whole lines, bounded together, private, and no disk that is full breaks anything."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub_local.data.answer_log import heads, line, log_files, read_log
from adapterhub_local.errors import InputError
from serve.errors import TooLarge
from serve.log.files import PARTS, LogFiles
from serve.log.index import Index
from serve.log.log import MAX_WAITING, RequestLog
from tests.patience import PATIENCE

SIZE = 8 << 10


def answer(number: int, key: str | None = None, text: str = "x" * 100) -> dict:
    """A record as the server writes it."""
    message = {"role": "assistant", "content": text}
    return {
        "kind": "answer", "id": f"chatcmpl-{number}", "key": key, "num_choices": 1, "time": "2026-01-01T00:00:00.000Z",
        "base": {"name": "tiny"}, "messages": [{"role": "user", "content": "Hi"}], "tools": [],
        "choices": [{"message": message, "finish_reason": "stop"}],
    }  # fmt: skip


def ids(folder: Path) -> list[str]:
    """The answers that a folder's log holds; everything in it is a record."""
    entries = list(read_log(folder))
    assert not [entry for entry in entries if entry.record is None]
    return [entry.record["id"] for entry in entries]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_oldest_go_and_the_whole_stays_below_its_size(tmp_path: Path) -> None:
    """However much is written, by a server that is started again and again: the newest are there, for their owner."""
    for start in range(0, 400, 50):
        files = LogFiles(tmp_path / "log", SIZE)
        for number in range(start, start + 50):
            files.append(line(answer(number)))
            assert sum(path.stat().st_size for path in log_files(files.folder)) <= SIZE
        files.close()
    found = ids(tmp_path / "log")
    assert found == [f"chatcmpl-{number}" for number in range(400 - len(found), 400)]
    assert len(found) * len(line(answer(399))) > SIZE * (PARTS - 2) / PARTS
    modes = {stat.S_IMODE(path.stat().st_mode) for path in log_files(tmp_path / "log")}
    assert (modes, stat.S_IMODE((tmp_path / "log").stat().st_mode)) == ({0o600}, 0o700)


def test_several_servers_share_a_folder(tmp_path: Path) -> None:
    """Each writes files of its own, none removes what another is writing to, each sees the answers of all."""
    several = [LogFiles(tmp_path, SIZE) for _ in range(3)]
    several[2].append(line(answer(7, "0000000a")))
    for number in range(100, 300):
        several[number % 2].append(line(answer(number)))
    assert sum(path.stat().st_size for path in log_files(tmp_path)) <= SIZE
    found = ids(tmp_path)
    assert {"chatcmpl-7", "chatcmpl-298", "chatcmpl-299"} <= set(found)
    index = Index(tmp_path)
    assert index.find("0000000a", "chatcmpl-7").num_choices == 1
    assert index.find(None, "chatcmpl-7") is None
    several[0].append(line(answer(300)))
    assert index.find(None, "chatcmpl-300") is not None
    assert index.find(None, "chatcmpl-100") is None  # its file is gone
    many = [LogFiles(tmp_path, SIZE) for _ in range(PARTS)]
    for files in many[: PARTS - len(several)]:
        files.append(line(answer(1)))
    with pytest.raises(OSError, match="too many servers"):
        many[-1].append(line(answer(1)))
    for files in (*several, *many):
        files.close()


WRITER = """
import sys
from pathlib import Path
from adapterhub_local.data.answer_log import line
from serve.log.files import LogFiles
files = LogFiles(Path(sys.argv[1]), int(sys.argv[2]))
for number in range(300):
    record = {"kind": "answer", "id": f"{sys.argv[3]}-{number}", "time": "", "messages": [MESSAGE], "tools": []}
    files.append(line({**record, "base": {}, "choices": [{"message": MESSAGE}], "padding": "x" * (number % 7) * 40}))
""".replace("MESSAGE", '{"role": "user", "content": ""}')


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """At the same time: nothing is lost but what is oldest, and the lines of each are whole and in order."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "log"), str(32 << 10)]
    both = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "ab"]
    for process in both:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors.decode()
    assert sum(path.stat().st_size for path in log_files(tmp_path / "log")) <= 32 << 10
    found = ids(tmp_path / "log")
    for name in "ab":
        own = [int(each[2:]) for each in found if each[0] == name]
        assert own == list(range(300 - len(own), 300))
    assert sum(path.stat().st_size for path in log_files(tmp_path / "log")) > 16 << 10


def test_a_log_that_is_removed_begins_anew(tmp_path: Path) -> None:
    """Who deletes the log while the server runs deletes what is in it, and loses nothing that comes later."""
    files = LogFiles(tmp_path / "log", SIZE)
    files.append(line(answer(1)))
    for path in log_files(files.folder):
        path.unlink()
    files.append(line(answer(2)))
    assert ids(files.folder) == ["chatcmpl-2"]
    for path in log_files(files.folder):
        path.unlink()
    shutil.rmtree(files.folder)
    files.append(line(answer(3)))
    assert ids(files.folder) == ["chatcmpl-3"]
    files.close()


def test_links_and_other_files_are_left_alone(tmp_path: Path) -> None:
    """What is not a file of the log is neither read, written through nor removed, whatever it is called."""
    (tmp_path / "mine.txt").write_text("x" * SIZE)
    (tmp_path / "answers-20000101T000000.000000Z-00000000.jsonl").symlink_to(tmp_path / "mine.txt")
    os.mkfifo(tmp_path / "answers-20000101T000000.000000Z-00000001.jsonl")
    files = LogFiles(tmp_path, SIZE)
    for number in range(100):
        files.append(line(answer(number)))
    files.close()
    assert (tmp_path / "mine.txt").read_text() == "x" * SIZE
    assert Index(tmp_path).find(None, "chatcmpl-99") is not None


@pytest.mark.parametrize("folder", ["file", "file/below", "closed"])
def test_a_folder_that_cannot_be_used_is_refused_at_once(folder: str, tmp_path: Path) -> None:
    """Not only when the first answer is lost."""
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    if folder == "closed" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(InputError, match="name another folder"):
        LogFiles(tmp_path / folder, SIZE)


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a line: the half of it is taken back, and later lines are whole."""
    files = LogFiles(tmp_path, SIZE)
    files.append(line(answer(1)))
    (path,) = log_files(tmp_path)
    with full_disk(path.stat().st_size + 50):
        for _ in range(3):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                files.append(line(answer(2)))
    files.append(line(answer(3)))
    with pytest.raises(TooLarge, match="--request-log-size"):
        files.append(line(answer(4, text="x" * SIZE)))
    files.close()
    assert ids(tmp_path) == ["chatcmpl-1", "chatcmpl-3"]


def test_what_is_lost_is_counted_and_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk, a record that cannot be made, and more answers than can be written break nothing."""
    counts: list[tuple[str, bool]] = []
    log = RequestLog(tmp_path, SIZE, note=lambda kind, is_written: counts.append((kind, is_written)))
    go = threading.Event()
    log.append(10, lambda: go.wait(PATIENCE) and answer(1))
    log.append(10, lambda: 1 / 0)
    log.append(10, lambda: answer(2, text="x" * SIZE))
    log.append(10, lambda: answer(3))
    log.append(MAX_WAITING - 40, lambda: answer(4))
    assert not caplog.records
    for number in (5, 6):
        log.append(1, lambda number=number: answer(number))  # no room: it never waits
    assert "more answers come than can be written" in caplog.text
    assert len(caplog.records) == 1
    go.set()
    log.close()
    log.append(10, lambda: answer(7))  # nor fails when the server stops
    assert ids(tmp_path) == ["chatcmpl-1", "chatcmpl-3", "chatcmpl-4"]
    assert sorted(counts) == [("answer", False)] * 5 + [("answer", True)] * 3
    assert "division by zero" in caplog.text
    assert len(caplog.records) == 3  # one for each time that it began to fail


def test_a_line_that_is_being_written_is_not_known_yet(tmp_path: Path) -> None:
    """The index takes whole lines alone, and reads on where it was."""
    path = tmp_path / "log"
    whole = [line(answer(number, "0000000a")) for number in range(3)]
    path.write_bytes(whole[0] + whole[1][:40])
    with open(path, "rb") as file:
        assert [head.id for head in heads(file)] == ["chatcmpl-0"]
        assert file.tell() == len(whole[0])
        path.write_bytes(b"".join(whole))
        assert [(head.id, head.owner) for head in heads(file)] == [
            ("chatcmpl-1", "0000000a"),
            ("chatcmpl-2", "0000000a"),
        ]


def test_many_threads_hand_over_whole_records(tmp_path: Path) -> None:
    """Whoever hands over an answer, lines are whole and each is there once."""
    log = RequestLog(tmp_path, 8 << 20)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: log.append(1, lambda: answer(number)), range(200)))
    log.close()
    assert sorted(ids(tmp_path)) == sorted(f"chatcmpl-{number}" for number in range(200))

"""Threads that compute: as many as other work leaves cores for, and the same bits whatever their number."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from adapterhub_local.base.bases import read_record
from adapterhub_local.base.load import leave_cores, load_base
from adapterhub_local.cores import FIRST, SPARE, STALE, WINDOW, Cores, Use, measure, most_threads
from adapterhub_local.machine import core_quota, usable_cores
from tests.patience import PATIENCE

COUNT = 8
WORK = "while True: pass"


@pytest.fixture(autouse=True)
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores whose user has not said how many threads compute; tests run with one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)


class Machine:
    """Clock and counters of a machine on which others take so many cores, and this process so many."""

    def __init__(self) -> None:
        self.now = self.everything = self.own = 0.0

    def run(self, seconds: float, others: float, own: float = 1.0) -> None:
        self.now += seconds
        self.everything += (others + own) * seconds
        self.own += own * seconds

    def use(self) -> Use:
        return Use(self.everything, self.own)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("adapterhub_local.cores.usable_cores", lambda: list(range(COUNT)))
    return Machine()


def made(machine: Machine, most: int = COUNT, note: Callable[[str], None] = str) -> Cores:
    return Cores(most, note=note, use=machine.use, clock=lambda: machine.now)


def test_follows_what_others_take(machine: Machine) -> None:
    """One thread less for each core that is taken, at least one, and all again once the cores are free."""
    cores = made(machine)
    assert cores.threads() == COUNT
    taken = []
    for others in (0.0, SPARE - 0.05, 0.5, 1.0, 3.2, 7.9, 40.0, 0.0):
        machine.run(WINDOW, others)
        taken.append(cores.threads())
    assert taken == [8, 8, 7, 7, 5, 1, 1, 8]


def test_changes_after_a_whole_window_only(machine: Machine) -> None:
    """What is measured over a moment says nothing."""
    cores = made(machine)
    for _ in range(4):
        machine.run(WINDOW / 8, 6.0)
        assert cores.threads() == COUNT
    machine.run(WINDOW / 2, 6.0)
    assert cores.threads() == 2


@pytest.mark.parametrize("rest", [0.2, 2 * WINDOW, STALE])
def test_what_others_did_while_it_rested_does_not_count(rest: float, machine: Machine) -> None:
    """Two servers that answer by turns: each computes with all cores, for the other rests meanwhile."""
    cores = made(machine)
    for _ in range(5):
        for _ in range(3):
            machine.run(WINDOW, 0.0)
            assert cores.threads() == COUNT
        machine.run(rest, 8.0, own=0.0)
        cores.resume()
        assert cores.threads() == COUNT


def test_what_was_found_before_a_rest_holds_for_a_while(machine: Machine) -> None:
    """Under steady work of others each answer begins with few threads, and soon sees that they have gone."""
    cores = made(machine)
    machine.run(WINDOW, 6.0)
    assert cores.threads() == 2
    machine.run(STALE / 2, 6.0, own=0.0)
    cores.resume()
    assert cores.threads() == 2
    machine.run(2 * FIRST, 0.0)
    assert cores.threads() == COUNT
    machine.run(WINDOW, 6.0)
    assert cores.threads() == 2
    machine.run(STALE + WINDOW, 0.0, own=0.0)
    cores.resume()
    assert cores.threads() == COUNT


def test_never_more_than_it_was_given(machine: Machine) -> None:
    """A process with two threads of eight cores keeps both until seven are taken."""
    cores = made(machine, most=2)
    taken = []
    for others in (0.0, 5.0, 6.2, 7.0, 0.0):
        machine.run(WINDOW, others, own=2.0)
        taken.append(cores.threads())
    assert taken == [2, 2, 2, 1, 2]


def test_says_so_once(machine: Machine) -> None:
    """A user who sees fewer tokens a second reads why, and not every half second."""
    notes: list[str] = []
    cores = made(machine, note=notes.append)
    for others in (3.0, 0.0, 7.0, 0.0):
        machine.run(WINDOW, others)
        cores.threads()
    assert notes == [
        "other work takes 3.0 of 8 cores: computing with 5 threads while it does (OMP_NUM_THREADS sets a fixed number)"
    ]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_given_number_stays(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets the number of threads has it."""
    monkeypatch.setenv(name, "8")
    cores = made(machine)
    machine.run(WINDOW, 6.0)
    assert cores.threads() == COUNT


def test_a_system_that_does_not_say(machine: Machine) -> None:
    """Where nothing can be measured, at the start or later, the number stays as it is."""
    answers: Iterator[Use | None] = iter([Use(0, 0), Use(7, 0), None])
    cores = Cores(COUNT, use=lambda: next(answers), clock=lambda: machine.now)
    machine.run(1.0, 0.0)
    assert cores.threads() == 1
    for _ in range(3):
        machine.run(1.0, 0.0)
        assert cores.threads() == 1
    assert Cores(COUNT, use=lambda: None, clock=lambda: machine.now).threads() == COUNT


def test_another_process_is_seen() -> None:
    """Real processes that never sleep, one for each core: one thread is left."""
    count = len(usable_cores())
    others = [subprocess.Popen([sys.executable, "-c", WORK]) for _ in range(count)]
    try:
        cores = Cores(count + 1)
        end = time.monotonic() + PATIENCE
        while cores.threads() > 1 and time.monotonic() < end:
            time.sleep(0.05)
        assert cores.threads() == 1
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_own_work_is_not_others() -> None:
    """All that this process uses is in its own part, whatever the machine does beside it."""
    first = measure()
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass
    second = measure()
    assert first is not None
    assert second is not None
    assert second.own - first.own >= 0.3
    assert second.everything - first.everything >= 0.3 - 0.05  # the system counts in hundredths


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
    ],
)
def test_quota_of_a_container(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both generations of control groups; a container with time for 1.5 cores starts two threads, not 64."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("adapterhub_local.machine.CGROUP", tmp_path)
    assert core_quota() == quota
    assert most_threads(64) == (64 if quota is None else {1.5: 2, 4.0: 4}[quota])
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert most_threads(64) == 64


def test_bits_do_not_depend_on_threads(built_base: Path) -> None:
    """Loss and gradients are the same bits with one thread, and with another number at every block."""

    class Numbers:
        def __init__(self, *numbers: int) -> None:
            self.each = itertools.cycle(numbers)
            self.taken: list[int] = []

        def threads(self) -> int:
            self.taken.append(next(self.each))
            return self.taken[-1]

    before = torch.get_num_threads()
    tokens = torch.arange(700)[None] % 97
    found = []
    try:
        for numbers in (Numbers(1), Numbers(1, 2, 3)):
            base = load_base(read_record(built_base), device="cpu")
            leave_cores(base.model, numbers)
            embeddings = base.model.get_input_embeddings()
            inputs = embeddings(tokens).detach().requires_grad_()
            loss = base.model(inputs_embeds=inputs, labels=tokens).loss
            loss.backward()
            assert len(numbers.taken) == base.model.config.num_hidden_layers
            found.append((loss.detach(), inputs.grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None
    assert torch.equal(found[0][1], found[1][1])


def test_a_model_on_the_cpu_leaves_cores(built_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is loaded there watches what others take, and says it where its user reads."""
    before = torch.get_num_threads()
    answers = itertools.count(0, 1000)
    use = partial(Cores, use=lambda: Use(next(answers), 0))
    monkeypatch.setattr("adapterhub_local.base.load.Cores", use)
    notes: list[str] = []
    try:
        torch.set_num_threads(2)
        base = load_base(read_record(built_base), device="cpu", note=notes.append)
        time.sleep(WINDOW)
        base.model(input_ids=torch.tensor([[1, 2, 3]]))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert len(notes) == 1
    assert "computing with one thread" in notes[0]

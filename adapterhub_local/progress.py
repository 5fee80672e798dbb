"""What a run shows while it works: nothing, or bars on a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from adapterhub_local.visible import visible, visible_line

Counting = Callable[[int, int], None]  # (done, total)


class Stepping(Protocol):
    """Told of each step: its number, its loss, and what else is worth a look."""

    def __call__(self, step: int, loss: float, more: str = "") -> None: ...


class Reporter(Protocol):
    """Told of a run's stages."""

    def note(self, text: str) -> None: ...

    def counting(self, what: str) -> AbstractContextManager[Counting]: ...

    def training(self, steps: int, tokens_a_step: float) -> AbstractContextManager[Stepping]: ...


class Quiet:
    """Shows nothing."""

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def counting(self, what: str) -> Iterator[Counting]:
        yield lambda done, total: None

    @contextmanager
    def training(self, steps: int, tokens_a_step: float) -> Iterator[Stepping]:
        yield lambda step, loss, more="": None


class Lines:
    """Plain lines on standard error, for logs: every note, and how far the work is every `interval` seconds."""

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval

    def note(self, text: str) -> None:
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()

    @contextmanager
    def counting(self, what: str) -> Iterator[Counting]:
        begun = last = time.monotonic()

        def count(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= self.interval and done:
                last = now
                self.note(f"{what}: {done:,} of {total:,}, {_left(now - begun, done, total)} left")

        yield count

    @contextmanager
    def training(self, steps: int, tokens_a_step: float) -> Iterator[Stepping]:
        begun = last = time.monotonic()
        first: int | None = None

        def report(step: int, loss: float, more: str = "") -> None:
            nonlocal first, last
            now = time.monotonic()
            first = step - 1 if first is None else first
            if now - last >= self.interval or step == steps:
                last = now
                rate = (step - first) * tokens_a_step / max(now - begun, 1e-9)
                left = _left(now - begun, step - first, steps - first)
                self.note(f"step {step:,} of {steps:,}: loss {loss:.4f}{more}, {rate:,.0f} tokens/s, {left} left")

        yield report


def _left(seconds: float, done: int, total: int) -> str:
    """The time that is left at the speed so far: 1:02:03."""
    left = round(seconds / max(done, 1) * max(total - done, 0))
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


class Keeping:
    """Passes everything on to another reporter, and keeps the notes, for what a run leaves behind."""

    def __init__(self, other: Reporter) -> None:
        self.other = other
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.other.note(text)

    def counting(self, what: str) -> AbstractContextManager[Counting]:
        return self.other.counting(what)

    def training(self, steps: int, tokens_a_step: float) -> AbstractContextManager[Stepping]:
        return self.other.training(steps, tokens_a_step)


class Terminal:
    """Bars on standard error: loss, tokens per second and time left."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def note(self, text: str) -> None:
        # file names may hold [/x]
        self.console.print(visible(text), style="dim", highlight=False, markup=False, emoji=False)

    @contextmanager
    def counting(self, what: str) -> Iterator[Counting]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(visible_line(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def training(self, steps: int, tokens_a_step: float) -> Iterator[Stepping]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        numbers = TextColumn("loss {task.fields[loss]:.4f}{task.fields[more]}  {task.fields[rate]:.0f} tokens/s")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=steps, loss=float("nan"), rate=0.0, more="")

            def report(step: int, loss: float, more: str = "") -> None:
                rate = (bar.tasks[0].speed or 0.0) * tokens_a_step
                bar.update(task, completed=step, loss=loss, rate=rate, more=more)

            yield report

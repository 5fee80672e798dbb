"""What a run shows while it works: nothing, or bars on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from adapterhub_local.visible import visible, visible_line

Counting = Callable[[int, int], None]  # (done, total)
Stepping = Callable[[int, float], None]  # (step, loss)


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
        yield lambda step, loss: None


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

        numbers = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} tokens/s")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), numbers, TimeRemainingColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=steps, loss=float("nan"), rate=0.0)

            def report(step: int, loss: float) -> None:
                rate = (bar.tasks[0].speed or 0.0) * tokens_a_step
                bar.update(task, completed=step, loss=loss, rate=rate)

            yield report

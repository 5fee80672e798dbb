"""What looks at a run while it goes: reports steps, evaluates and saves on schedule, and stops a run gone wrong."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub_local.errors import QhubError

SAVE_SECONDS = 300.0  # between checkpoints where the recipe does not say: what a killed run loses at most
WINDOW = 10  # steps whose mean loss is compared
Report = Callable[[dict[str, Any]], None]


class Diverged(QhubError):
    """The loss has become far worse than it was at the start."""


class Watch(TrainerCallback):
    """Reports each step, stops cleanly when asked to, evaluates and saves on schedule, and guards the loss.

    evaluate: () -> {"eval_loss": ..., ...}, every `eval_every` steps; the factors of the lowest loss go to
    `keep_best`. Without a better one `patience` times in a row the run ends. `good` is a copy of the factors
    where the mean loss of ten steps was lowest.
    """

    def __init__(
        self,
        report: Report,
        *,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        eval_every: int | None = None,
        patience: int | None = None,
        save_every: int | None = None,
        keep_best: Callable[[], None] | None = None,
        factors: Mapping[str, torch.nn.Parameter] | None = None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.report = report
        self.evaluate, self.eval_every, self.patience = evaluate, eval_every, patience
        self.save_every, self.keep_best, self.factors = save_every, keep_best, factors or {}
        self.is_asked_to_stop = is_asked_to_stop  # by a page, or another process; a signal sets `stop_asked`
        self.stop_asked = self.stopped_early = False
        self.losses: list[float] = []
        self.best: tuple[float, int] | None = None  # loss, step
        self.worse = 0  # evaluations in a row that were no better
        self.good: dict[str, torch.Tensor] | None = None
        self._lowest, self._copied_at = math.inf, 0
        self._saved = time.monotonic()

    def restore(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Take up what the log of a stopped run says."""
        for entry in entries:
            if "loss" in entry:
                self.losses.append(entry["loss"])
            if "eval_loss" in entry:
                self._judge(entry["eval_loss"], entry["step"])
        self.stopped_early = bool(self.patience and self.worse >= self.patience)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self.report({"step": state.global_step, "epoch": state.epoch, **logs})
        self.losses.append(logs["loss"])
        if len(self.losses) < 2 * WINDOW:
            return
        first, last = (sum(part) / WINDOW for part in (self.losses[:WINDOW], self.losses[-WINDOW:]))
        if last > first + 0.5 * abs(first) + 0.5:  # losses that are rewards lie below zero
            rise = f"from {first:.3f} to {last:.3f} (means of {WINDOW} steps)"
            raise Diverged(f"the loss has risen {rise} at step {state.global_step}")
        if last < self._lowest and state.global_step - self._copied_at >= WINDOW:
            self._lowest, self._copied_at = last, state.global_step
            self.good = {name: factor.detach().cpu().clone() for name, factor in self.factors.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        if self.evaluate and self.eval_every and (step % self.eval_every == 0 or last):
            scores = self.evaluate()
            self.report({"step": step, "epoch": state.epoch, **scores})
            if self._judge(scores["eval_loss"], step):
                # saved as well, so that the state to resume from is never older than the best
                control.should_save = not last
                if self.keep_best:
                    self.keep_best()
            elif self.patience and self.worse >= self.patience and not last:
                self.stopped_early = control.should_training_stop = True
                return
        if self.save_every and step % self.save_every == 0 and not last:
            control.should_save = True
        # several processes would have to agree on the time
        if not self.save_every and not last and args.world_size == 1 and time.monotonic() - self._saved > SAVE_SECONDS:
            control.should_save = True
        if control.should_save:
            self._saved = time.monotonic()
        if last and args.world_size > 1:  # nobody can save it any more once the other processes have gone
            control.should_save = True
        if args.world_size == 1 and self.is_asked_to_stop():  # several processes would have to agree when
            self.stop_asked = True
        if self.stop_asked and not last:
            control.should_save = control.should_training_stop = True

    def _judge(self, loss: float, step: int) -> bool:
        """Whether an evaluation is the best so far."""
        if self.best is None or loss < self.best[0]:
            self.best, self.worse = (loss, step), 0
            return True
        self.worse += 1
        return False

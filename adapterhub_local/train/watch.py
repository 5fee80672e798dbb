"""What looks at a run while it goes: reports each step, and stops cleanly when asked to."""

from collections.abc import Callable

from transformers import TrainerCallback

Report = Callable[[dict[str, float]], None]


class Watch(TrainerCallback):
    """Reports each step, and stops cleanly when asked to."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.stop_asked = False

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.report({"step": state.global_step, "epoch": state.epoch, **logs})

    def on_step_end(self, args, state, control, **_):
        if self.stop_asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

"""Compute: what comes of a batch. Forward, score, choose; a batch that fails is tried one request at a time."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch

from serve.adapters.slots import Slots
from serve.engine.embed import pool
from serve.engine.request import Scheduled
from serve.engine.runner import Runner, in_segments
from serve.engine.sampler import Sampler
from serve.engine.score import score_prompts
from serve.engine.speculate import Costs
from serve.engine.verify import Run, verify
from serve.errors import DeviceLost, GenerationFailed

logger = logging.getLogger(__name__)


class Compute:
    """Runs batches with the adapters in `slots`; `samplers` are all requests' by id, `costs` learns of steps."""

    def __init__(
        self, runner: Runner, slots: Slots, samplers: Mapping[str, Sampler], costs: Costs | None = None
    ) -> None:
        self.runner = runner
        self.slots = slots
        self.samplers = samplers
        self.costs = costs
        self.num_failed = 0  # steps

    def results(self, batch: Sequence[Scheduled]) -> dict[str, Run]:
        """The next tokens of every request of the batch, if it wants any; or why there are none.

        Whatever fails, it takes no other request with it. Raises DeviceLost.
        """
        try:
            with self.costs.timed(batch) if self.costs is not None else nullcontext():
                return self._forward(batch)
        except Exception as error:
            self.num_failed += 1
            if self._is_lost():
                raise DeviceLost(f"the GPU no longer answers ({error}): start the server again") from error
            if len(batch) == 1:
                logger.error("request %s failed", batch[0].request.id, exc_info=error)
                if isinstance(error, torch.OutOfMemoryError):
                    return {batch[0].request.id: GenerationFailed("the GPU's memory is full: try again later")}
                return {batch[0].request.id: error}
            logger.warning("a step with %d requests failed (%s): trying them one by one", len(batch), error)
        # out here, where the error no longer holds the tensors of the step that failed
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        return {key: result for item in batch for key, result in self.results([item]).items()}

    def _clear_drafts(self, batch: Sequence[Scheduled], results: Mapping[str, Run]) -> None:
        """Zero what guesses that are not kept have left, or a NaN there would reach those that read the page later."""
        for item in batch:
            run = results[item.request.id]
            kept = len(run) - 1 if isinstance(run, list) else 0
            self.runner.cache.clear_places(item.request.pages, range(item.end - len(item.draft) + kept, item.end))

    def _is_lost(self) -> bool:
        """Whether the GPU is of no use to this process any more: an error like an illegal address stays forever."""
        if self.runner.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.runner.device)
        except RuntimeError:
            return True
        return False

    def _forward(self, batch: Sequence[Scheduled]) -> dict[str, Run]:
        slots = self.slots.find(item.request.adapter for item in batch if item.request.adapter is not None)
        batch = in_segments(batch, slots)
        scores, logits = score_prompts(batch, self.runner.forward(batch, slots))
        if self.runner.hidden is not None:
            pool(batch, self.runner.hidden)
        results: dict[str, Run] = {item.request.id: [] for item in batch}
        wanting = [item for item in batch if item.wants_token]
        samplers = [self.samplers[item.request.id] for item in wanting]
        runs = verify(samplers, [item.draft for item in wanting], logits)
        results.update(zip([item.request.id for item in wanting], runs, strict=True))
        if any(item.draft for item in wanting) and not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            self._clear_drafts(wanting, results)
        for item in batch:  # nothing can fail any more, so nothing is noted twice
            found = scores.get(item.request.id)
            if isinstance(found, Exception):
                results[item.request.id] = found
            elif found is not None:
                item.request.scores.append(found)
        return results

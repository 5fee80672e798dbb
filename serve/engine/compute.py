"""Compute: what comes of a batch. Forward, score, choose; a batch that fails is tried one request at a time."""

import logging
from collections.abc import Mapping, Sequence

import torch

from serve.adapters.slots import Slots
from serve.engine.embed import pool
from serve.engine.request import Sampled, Scheduled
from serve.engine.runner import Runner, in_segments
from serve.engine.sampler import Sampler, choose
from serve.engine.score import score_prompts
from serve.errors import DeviceLost, GenerationFailed

logger = logging.getLogger(__name__)
Result = Sampled | Exception | None  # a token, an error, or no token yet


class Compute:
    """Runs batches with the adapters in `slots`. `samplers` are those of all requests, by id."""

    def __init__(self, runner: Runner, slots: Slots, samplers: Mapping[str, Sampler]) -> None:
        self.runner = runner
        self.slots = slots
        self.samplers = samplers
        self.num_failed = 0  # steps

    def results(self, batch: Sequence[Scheduled]) -> dict[str, Result]:
        """What came of every request of the batch. Whatever fails, it takes no other request with it.

        Raises DeviceLost.
        """
        try:
            return self._forward(batch)
        except Exception as error:
            self.num_failed += 1
            if self._is_lost():
                raise DeviceLost(f"the GPU gives no answers any more ({error}): start the server again") from error
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

    def _is_lost(self) -> bool:
        """Whether the GPU is of no use to this process any more: an error like an illegal address stays for ever."""
        if self.runner.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.runner.device)
        except RuntimeError:
            return True
        return False

    def _forward(self, batch: Sequence[Scheduled]) -> dict[str, Result]:
        slots = self.slots.find(item.request.adapter for item in batch if item.request.adapter is not None)
        batch = in_segments(batch, slots)
        scores, logits = score_prompts(batch, self.runner.forward(batch, slots))
        results: dict[str, Result] = {item.request.id: None for item in batch}
        wanting = [item.request.id for item in batch if item.wants_token]
        results.update(zip(wanting, choose([self.samplers[key] for key in wanting], logits), strict=True))
        if self.runner.hidden is not None:
            pool(batch, self.runner.hidden)
        for item in batch:  # nothing can fail any more, so nothing is noted twice
            found = scores.get(item.request.id)
            if isinstance(found, Exception):
                results[item.request.id] = found
            elif found is not None:
                item.request.scores.append(found)
        return results

"""RayEngines: the replicas through a handle of Ray Serve, with its errors in our words."""

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.cluster.call import Call, Lost, Message, Whole
from serve.cluster.wire import fetch
from serve.errors import Busy

logger = logging.getLogger("serve.cluster")
ASK_SECONDS = 10.0  # in which every replica must have answered what all are asked


class RayEngines:
    """See Engines."""

    def __init__(self, handle: DeploymentHandle) -> None:  # type: ignore[type-arg]
        self._every = handle
        self._stream = handle.options(stream=True, method_name="answer")

    async def answer(self, call: Call) -> AsyncIterator[Sequence[Message]]:
        """See Engines."""
        response, is_over = None, False
        try:
            response = self._stream.remote(call)
            async for ticket in response:
                async with contextlib.aclosing(fetch(ticket)) as batches:
                    async for batch in batches:
                        yield batch
            is_over = True
        except BackPressureError:
            is_over = True
            raise Busy("all replicas are busy, and their queue is full: try again later") from None
        except (RayError, RayServeException) as error:
            is_over = True
            raise Lost(f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}") from None
        finally:
            if response is not None and not is_over:  # nobody listens any more
                response.cancel()

    async def answers(self, call: Call) -> list[Whole]:
        """See Engines."""
        try:
            response = self._every.broadcast("whole", call)
            found = await response.results_async(timeout_s=ASK_SECONDS, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("replicas were not reached", extra={"fields": {"reason": str(error)}})
            return []
        return [each for each in found if isinstance(each, Whole)]

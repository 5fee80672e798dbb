"""What an administrator holds in memory by hand, for the endpoints of the API and for an adapter's page."""

import asyncio
from typing import Any

from anyio.from_thread import run

from adapterhub_local.keys import Key
from adapterhub_local.registry import Version
from serve.adapters.source import Source
from serve.answers.models import adapter_entry
from serve.auth import allowed_by, check_models
from serve.service import Service
from serve.services import Services

SOON = 2.0  # seconds that a page waits for an adapter to be freed


class Hands:
    """The adapters of one server, as far as a key may have a hand in them."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._going_on: set[asyncio.Task[int]] = set()

    def state(self, version: Version, key: Key | None) -> dict[str, Any]:
        """How a version is kept now: in memory, in a slot, pinned, used; and the names under which it is held."""
        allows, digest = allowed_by(key), version.content_digest
        found: dict[str, Any] = {}
        names: list[str] = []
        for service in self.services:
            found |= next((adapter_entry(each) for each in service.adapters() if each.digest == digest), {})
            held = service.loaded.sources().items()
            names += [name for name, source in held if source.content_digest == digest]
            names = [name for name in names if all(map(allows, service.names(name)))]
        return {**found, "held_as": sorted(names)}

    def load(
        self, name: str, key: Key | None, *, replace: bool = False, pinned: bool = False
    ) -> tuple[Service, Source]:
        """Hold a reference in memory, in a slot if pinned. Raises Forbidden, NotFound, BadParameter, Busy."""
        service = self.services.of_now(name, key)
        check_models(key, service.names(name))
        service.bring(name)
        return service, service.loaded.load(name, None, replace=replace, pinned=pinned)

    async def unload(self, name: str, key: Key | None, *, force: bool = False) -> int:
        """Hold a name no longer, and free it when the requests that use it are done; the bytes that were freed."""
        service = await self.services.of(name, key)
        check_models(key, service.names(name))
        return await service.unload(name, force=force)

    def release(self, name: str, key: Key | None) -> None:
        """The same, from a thread of the application: what takes longer, for answers are being written, goes on."""
        run(self._release, name, key)

    async def _release(self, name: str, key: Key | None) -> None:
        task = asyncio.ensure_future(self.unload(name, key))
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        done, _ = await asyncio.wait({task}, timeout=SOON)
        for one in done:
            one.result()

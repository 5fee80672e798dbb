"""Adapters that an administrator holds in memory: versions of the registry, or folders below a configured root."""

import threading
from pathlib import Path
from typing import Protocol

from adapterhub_local.errors import BadFile, BadReference, InUse, NotFound, QhubError
from adapterhub_local.refs import check_name
from adapterhub_local.registry import Registry
from adapterhub_local.registry.kinds import check_adapter
from adapterhub_local.registry.rows import now
from serve.adapters.pool import Hold
from serve.adapters.source import FILES, Folder, Source
from serve.errors import BadParameter, Forbidden


class Keeper(Protocol):
    """Who keeps adapters in memory: an engine."""

    def acquire(self, source: Source) -> Hold: ...

    def release(self, digest: str) -> None: ...

    def keep(self, digest: str, name: str, *, pinned: bool) -> None: ...

    def unkeep(self, digest: str, name: str) -> None: ...


class Loaded:
    """Names that were loaded by hand. Each keeps its adapter in memory until it is unloaded, in a slot if pinned."""

    def __init__(self, registry: Registry, keeper: Keeper, root: Path | None) -> None:
        self.registry = registry
        self.keeper = keeper
        self.root = root.resolve() if root is not None else None
        self._held: dict[str, Source] = {}
        self._numbers: dict[str, int] = {}  # how often each name was ever loaded from a folder
        self._lock = threading.Lock()

    def find(self, name: str | None) -> Folder | None:
        """The folder that is held under this name, if it is one."""
        held = self._held.get(name) if name is not None else None
        return held if isinstance(held, Folder) else None

    def sources(self) -> dict[str, Source]:
        """Name -> what is held under it."""
        return dict(self._held)

    def load(self, name: str, path: str | None, *, replace: bool = False, pinned: bool = False) -> Source:
        """Hold the adapter `name`: a reference of the registry, or, with `path`, a folder below the root.

        Raises BadParameter if the name is taken and `replace` is not set, Forbidden and NotFound about the
        path, Busy if so much is held or pinned already, and what reading an adapter raises.
        """
        with self._lock:
            before = self._held.get(name)
            if before is not None and not replace:
                raise BadParameter(
                    f"the lora adapter '{name}' has already been loaded: unload it first, or set load_inplace",
                    "lora_name",
                )
            source = check_adapter(self.registry.resolve(name)) if path is None else self._from_folder(name, path)
            digest = self.keeper.acquire(source).digest
            try:
                self.keeper.keep(digest, name, pinned=pinned)
            except QhubError:
                self.keeper.release(digest)
                raise
            if isinstance(source, Folder):
                self._numbers[name] = source.number
            self._held[name] = source
            if before is not None and before.content_digest != digest:
                self.keeper.unkeep(before.content_digest, name)
        return source

    def unload(self, name: str) -> str:
        """Hold `name` no longer; its content digest. Raises NotFound."""
        with self._lock:
            held = self._held.pop(name, None)
            if held is None:
                raise NotFound(f"the lora adapter '{name}' cannot be found: /v1/adapters lists what is held")
            self.keeper.unkeep(held.content_digest, name)
        return held.content_digest

    def _from_folder(self, name: str, path: str) -> Folder:
        """The folder below the root, if it may be read. Raises as `load`."""
        try:
            check_name(name)
        except BadReference as error:
            raise BadParameter(str(error), "lora_name") from None
        if self.root is None:
            raise Forbidden("adapters are not loaded from folders here: start the server with --lora-root FOLDER")
        if self.registry.versions(name):
            raise InUse(f"'{name}' is an adapter of the registry: load the folder under another name")
        try:
            folder = (self.root / path).resolve()  # symbolic links included
            is_folder = folder.is_dir()
        except (OSError, ValueError):  # longer than a path may be, or with a NUL in it
            raise NotFound("lora_path is not the path of a folder") from None
        if not folder.is_relative_to(self.root):
            raise Forbidden("lora_path lies outside of the folder that --lora-root allows")
        if not is_folder:
            raise NotFound(f"there is no folder {path} below the root of adapters")
        missing = [file for file in FILES if not (folder / file).is_file()]
        if missing:
            raise BadFile(f"{path} has no {' and no '.join(missing)}: it is not an adapter that PEFT saved")
        if any(not (folder / file).resolve().is_relative_to(self.root) for file in FILES):
            raise Forbidden(f"a file in {path} is a link out of the folder that --lora-root allows")
        return Folder.read(name, self._numbers.get(name, 0) + 1, now(), folder)

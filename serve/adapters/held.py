"""Adapters that an administrator holds in memory: versions of the registry, or folders below a configured root."""

import threading
from collections.abc import Callable
from pathlib import Path

from adapterhub_local.durable import canonical_json, digest_file
from adapterhub_local.errors import BadFile, BadReference, InUse, NotFound, QhubError
from adapterhub_local.refs import check_name
from adapterhub_local.registry import File, Registry, Version
from adapterhub_local.registry.registry import now
from serve.adapters.pool import AdapterPool
from serve.errors import BadParameter, Busy, Forbidden

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Loaded:
    """Names that were loaded by hand. Each holds its adapter in the pool until it is unloaded.

    Those that are pinned hold a slot too: `pin` is told their digests whenever they change, at most `max_pins`.
    """

    def __init__(
        self,
        registry: Registry,
        pool: AdapterPool,
        root: Path | None,
        pin: Callable[[frozenset[str]], None],
        max_pins: int,
    ) -> None:
        self.registry = registry
        self.pool = pool
        self.root = root.resolve() if root is not None else None
        self.pin = pin
        self.max_pins = max_pins
        self._held: dict[str, Version] = {}
        self._folders: set[str] = set()  # names whose version is a folder's, of which the registry knows nothing
        self._pinned: set[str] = set()  # names
        self._numbers: dict[str, int] = {}  # of names that were ever loaded from folders, how often
        self._lock = threading.Lock()

    def find(self, model: str) -> Version | None:
        """The version that is held under this name and came from a folder."""
        return self._held.get(model) if model in self._folders else None

    def versions(self) -> dict[str, Version]:
        """Name -> what is held under it."""
        return dict(self._held)

    def pinned(self) -> frozenset[str]:
        """Digests of what is pinned."""
        return frozenset(self._held[name].content_digest for name in self._pinned)

    def load(self, name: str, path: str | None, *, replace: bool = False, pinned: bool = False) -> Version:
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
            version = self.registry.resolve(name) if path is None else self._from_folder(name, path)
            digest = self.pool.acquire(version).digest
            try:
                self._check_room(digest)
                if pinned:
                    self._check_pins(digest, name)
            except QhubError:
                self.pool.release(digest)
                raise
            if path is not None:
                self._numbers[name] = version.number
            self._held[name] = version
            (self._folders.discard if path is None else self._folders.add)(name)
            self._note_pin(name, pinned=pinned)
        if before is not None:
            self.pool.release(before.content_digest)
        return version

    def unload(self, name: str) -> str:
        """Hold `name` no longer; its content digest. Raises NotFound."""
        with self._lock:
            version = self._held.get(name)
            if version is None:
                raise NotFound(f"the lora adapter '{name}' cannot be found: /v1/adapters lists what is held")
            self._note_pin(name, pinned=False)
            self._folders.discard(name)
            del self._held[name]
        self.pool.release(version.content_digest)
        return version.content_digest

    def _note_pin(self, name: str, *, pinned: bool) -> None:
        before = self.pinned()
        (self._pinned.add if pinned else self._pinned.discard)(name)
        if self.pinned() != before:
            self.pin(self.pinned())

    def _from_folder(self, name: str, path: str) -> Version:
        """The folder as a version that is in no registry; its content is its identity, as everywhere."""
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
            raise NotFound("lora_path is no path of a folder") from None
        if not folder.is_relative_to(self.root):
            raise Forbidden("lora_path lies outside of the folder that --lora-root allows")
        if not is_folder:
            raise NotFound(f"there is no folder {path} below the root of adapters")
        missing = [file for file in FILES if not (folder / file).is_file()]
        if missing:
            raise BadFile(f"{path} has no {' and no '.join(missing)}: it is no adapter that PEFT saved")
        if any(not (folder / file).resolve().is_relative_to(self.root) for file in FILES):
            raise Forbidden(f"a file in {path} is a link out of the folder that --lora-root allows")
        files = tuple(File(file, digest_file(folder / file), (folder / file).stat().st_size) for file in FILES)
        number = self._numbers.get(name, 0) + 1
        lineage = {"kind": "load", "source": {"folder": path}}
        return Version(
            name, number, now(), files, File.of("lineage.json", canonical_json(lineage)), lineage, lambda _: folder
        )

    def _check_pins(self, digest: str, name: str) -> None:
        """One slot must stay free, or no other adapter could answer."""
        others = {self._held[other].content_digest for other in self._pinned - {name}}
        if len(others | {digest}) > self.max_pins:
            raise BadParameter(
                f"'{name}' cannot be pinned: {len(others)} are, of {self.max_pins + 1} slots, and one must stay free "
                "for all others. Unload a pinned one, or start the server with more --max-adapters",
                "pinned",
            )

    def _check_room(self, digest: str) -> None:
        """What is held for good may take half of the memory, or nothing else could be served."""
        held = {version.content_digest for version in self._held.values()} | {digest}
        if sum(self.pool.bytes_of(one) for one in held) > self.pool.max_bytes // 2:
            raise Busy("adapters that are held would take more than half of the memory for adapters: unload some first")

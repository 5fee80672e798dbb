"""What a page needs of a server that has a model, to keep an adapter in memory: the server's own is in serve/http."""

from typing import Any, Protocol

from adapterhub_local.keys import Key
from adapterhub_local.registry import Version


class Hands(Protocol):
    """Who keeps adapters in memory for as long as an administrator says."""

    def state(self, version: Version, key: Key | None) -> dict[str, Any]:
        """How a version is kept now, empty but for `held_as` if it is not."""
        ...

    def load(self, name: str, key: Key | None, *, replace: bool = False, pinned: bool = False) -> Any:
        """Keep a reference in memory."""
        ...

    def release(self, name: str, key: Key | None) -> None:
        """Keep a name no longer."""
        ...

"""The inference server: one base in memory, the adapter chosen by every request. Importing this loads no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.http.app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from serve.http.app import create_app

        return create_app
    raise AttributeError(f"module 'serve' has no attribute '{name}'")

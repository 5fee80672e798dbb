"""Public names that are loaded when they are first asked for, so that importing a package stays light."""

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What `package` lists as `name`: taken from the module that `homes` gives for it. Raises AttributeError.

    It is what a package's `__getattr__` (PEP 562) returns.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)

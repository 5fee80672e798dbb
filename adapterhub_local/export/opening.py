"""What most formats begin with: the version's adapter, opened, and the base it is for."""

from adapterhub_local.base.bases import BaseInfo, base_of, find_base
from adapterhub_local.base.shapes import check_shapes
from adapterhub_local.export.formats import Request
from adapterhub_local.lora.adapter import AdapterFile, open_adapter


def open_request(request: Request) -> tuple[AdapterFile, BaseInfo]:
    """The adapter and its base (or the one named). Raises NotFound or Incompatible if they do not belong together."""
    base = find_base(request.base, request.home) if request.base else base_of(request.version, request.home)
    adapter = open_adapter(request.version.path, dora=True, tokens=True)
    check_shapes(adapter, base)
    return adapter, base


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

"""The two files of a router: `router.json` says what it chooses among and how, `router.safetensors` holds its numbers.

They are read strictly, wherever they come from: shapes that fit each other, numbers that are finite, references that
are references.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapterhub_local.durable import canonical_json
from adapterhub_local.errors import BadFile, InputError
from adapterhub_local.lora.header import read_header
from adapterhub_local.lora.write import write_safetensors
from adapterhub_local.refs import Reference
from adapterhub_local.registry.kinds import ROUTER_FILES
from adapterhub_local.router.classifier import Classifier

SETTINGS, NUMBERS = ROUTER_FILES
FORMAT = 1
FEATURES = "mean_token_embedding"
MAX_ROUTES = 512
MAX_SETTINGS = 1 << 20  # bytes
_TENSORS = ("weight", "bias", "directions", "centres", "limits")


@dataclass(frozen=True)
class RouterFiles:
    """What a router is: `routes` are the adapters it chooses among, None where it was taught what the base answers."""

    routes: tuple[Reference | None, ...]
    classifier: Classifier
    threshold: float  # the least probability with which an adapter is chosen
    coverage: float  # the share of an adapter's held-out prompts that are near enough to its others
    base_fingerprint: str

    def write(self, folder: Path) -> dict[str, Path | bytes]:
        """Write both files into `folder` and return them by name; equal routers give equal bytes."""
        settings = {
            "format": FORMAT,
            "features": FEATURES,
            "base_fingerprint": self.base_fingerprint,
            "routes": [None if route is None else str(route) for route in self.routes],
            "temperature": self.classifier.temperature,
            "threshold": self.threshold,
            "coverage": self.coverage,
        }
        tensors = {name: getattr(self.classifier, name).contiguous() for name in _TENSORS}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(folder / NUMBERS, shapes, tensors.items(), {"format": "pt"})
        return {NUMBERS: folder / NUMBERS, SETTINGS: canonical_json(settings)}


def read_router(folder: Path, name: object) -> RouterFiles:
    """The router `name` whose files lie in `folder`. Raises BadFile."""
    try:
        settings = _settings(folder / SETTINGS)
        routes = tuple(None if text is None else Reference.parse(text) for text in settings["routes"])
        numbers = ("temperature", "threshold", "coverage")
        if not all(isinstance(settings[key], float | int) and math.isfinite(settings[key]) for key in numbers):
            raise ValueError(f"one of {', '.join(numbers)} is not a number")
        if settings["temperature"] <= 0 or not 0 <= settings["coverage"] <= 1:
            raise ValueError("its temperature is not positive, or its coverage is not a share")
        if not isinstance(settings["base_fingerprint"], str):
            raise ValueError("it does not say which base it is for")
        names = [route.name if route is not None else None for route in routes]
        if not 1 <= len(routes) <= MAX_ROUTES or len(set(names)) < len(names):
            raise ValueError(f"a router has 1 to {MAX_ROUTES} routes, each to another adapter")
        classifier = _classifier(folder / NUMBERS, len(routes), float(settings["temperature"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise BadFile(f"{name} cannot be read as a router: {str(error)[:200]}") from None
    shares = (float(settings["threshold"]), float(settings["coverage"]))
    return RouterFiles(routes, classifier, *shares, settings["base_fingerprint"])


def _settings(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > MAX_SETTINGS:
        raise ValueError(f"{SETTINGS} is too large")
    settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict) or not isinstance(settings.get("routes"), list):
        raise ValueError(f"{SETTINGS} has no routes")
    if (settings.get("format"), settings.get("features")) != (FORMAT, FEATURES):
        raise ValueError("it was made by a newer version of qhub: install that version or newer")
    return settings


def _classifier(path: Path, num_routes: int, temperature: float) -> Classifier:
    entries = read_header(path).tensors
    if set(entries) != set(_TENSORS) or any(entry.dtype != "F32" for entry in entries.values()):
        raise ValueError(f"{NUMBERS} has other tensors than a router")
    size, num_directions = (*entries["directions"].shape, 0, 0)[:2]
    wanted = {
        "weight": (num_routes, size),
        "bias": (num_routes,),
        "directions": (size, num_directions),
        "centres": (num_routes, num_directions),
        "limits": (num_routes,),
    }
    if not size or any(tuple(entries[name].shape) != shape for name, shape in wanted.items()):
        raise ValueError(f"the tensors of {NUMBERS} do not fit each other")
    tensors = load_file(path)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{NUMBERS} has NaN or infinity in it")
    return Classifier(**{name: tensors[name] for name in _TENSORS}, temperature=temperature)

"""cluster.toml: what a cluster serves, on how many replicas, and where. Every mistake at once, each with its line."""

import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, InputError, NotFound
from adapterhub_local.options import options_of
from adapterhub_local.recipe.field import keys
from adapterhub_local.recipe.kinds import convert
from adapterhub_local.recipe.layers import Layer
from adapterhub_local.recipe.reader import all_problems, nearest
from adapterhub_local.recipe.toml import read_toml, short
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.sizes import parse_size
from adapterhub_local.visible import visible_line
from serve.cluster.tables import MAX_REPLICAS, OWN_ENGINE, RESERVED, TABLES, Gateway, Replicas, Router, Vllm
from serve.engine.options import EngineOptions

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
APPLICATION, REPLICAS, GATEWAYS = "qhub", "replicas", "gateways"  # what Ray Serve knows them as


@dataclass(frozen=True)
class ClusterConfig:
    """One cluster.toml. `engine` are options of `qhub serve` by their field names, for every replica.

    `remote` is the name or URL of what all follow; `followed` where that is, which `qhub cluster up` finds out, so
    that other machines need not know it by that name.
    """

    base: str
    remote: str | None = None
    followed: Remote | None = None
    replicas: Replicas = field(default_factory=Replicas)
    gateway: Gateway = field(default_factory=Gateway)
    router: Router = field(default_factory=Router)
    engine: Mapping[str, Any] = field(default_factory=dict)
    vllm: Vllm = field(default_factory=Vllm)

    def scaled(self, low: int, high: int | None = None) -> "ClusterConfig":
        """The same with other numbers of replicas. Raises InputError."""
        high = low if high is None else high
        if not 1 <= low <= high <= MAX_REPLICAS:
            raise InputError(f"from {low} to {high} replicas: at least 1, at most {MAX_REPLICAS}, and the least first")
        return replace(self, replicas=replace(self.replicas, min=low, max=high))

    def to_json(self) -> dict[str, Any]:
        """As plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ClusterConfig":
        """What `to_json` gave."""
        followed = found["followed"]
        return cls(
            found["base"],
            found["remote"],
            Remote(**followed) if followed is not None else None,
            _restored(Replicas, found["replicas"]),
            _restored(Gateway, found["gateway"]),
            _restored(Router, found["router"]),
            found["engine"],
            _restored(Vllm, found["vllm"]),
        )


def _restored(table: Any, found: Mapping[str, Any]) -> Any:
    """A table of what JSON made of it."""
    return table(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def load_config(path: Path) -> ClusterConfig:
    """The cluster in the TOML file at `path`.

    Raises NotFound if there is no file, BadRecipe with a line for each thing that is wrong.
    """
    try:
        text, tables = read_toml(path)
    except FileNotFoundError:
        raise NotFound(f"there is no {path}: `qhub cluster init {path}` writes one to begin with") from None
    except OSError as error:
        raise BadRecipe(f"{path} cannot be read as text: {error.strerror or error}") from None
    except ValueError as error:
        raise BadRecipe(f"{path}: not TOML: {error}") from None
    reading = _Reading(Layer(str(path), path, tables, text))
    config = reading.config()
    if reading.problems:
        raise BadRecipe(all_problems(reading.problems))
    assert config is not None
    return config


class _Reading:
    """One pass over a file: values, and every problem with its line."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.problems: list[str] = []

    def problem(self, table: str, key: str | None, message: str) -> None:
        self.problems.append(visible_line(f"{self.layer.place(table, key)}: {message}"))

    def config(self) -> ClusterConfig | None:
        """What the file says; None if something is wrong that leaves nothing to work with."""
        given = self.layer.tables
        known = {"base": None, "remote": None, **TABLES}
        for name, value in given.items():
            if name not in known:
                self.problem(name, None, f"unknown {'table' if isinstance(value, Mapping) else 'key'} "
                                         f"'{short(name)}'{nearest(name, known)}")  # fmt: skip
            elif name in TABLES and not isinstance(value, Mapping):
                self.problem(name, None, f"'{name}' must be a table: write [{name}]")
        base = given.get("base")
        if not isinstance(base, str) or not base:
            self.problem("base", None, "'base' is needed: the name of a base, as `qhub base list` shows it")
        remote = given.get("remote")
        if remote is not None and (not isinstance(remote, str) or not remote):
            self.problem(
                "remote", None, "'remote' must be the name of a remote, as `qhub remote list` shows it, or a URL"
            )
        replicas, gateway = self.table("replicas", Replicas), self.table("gateway", Gateway)
        router = self.table("router", Router)
        if router is not None and router.name is None and (router.threshold is not None or router.allow):
            self.problem("router", None, "router.threshold and router.allow are of a router: give router.name")
        engine, vllm = self.engine(), self.table("vllm", Vllm)
        self._check_vllm(vllm)
        if replicas is not None and replicas.max is not None and replicas.max < replicas.min:
            self.problem("replicas", "max", f"replicas.max = {replicas.max}: must be at least replicas.min")
        if self.problems:
            return None
        return ClusterConfig(str(base), remote, None, replicas, gateway, router, engine, vllm)

    def _check_vllm(self, vllm: Vllm | None) -> None:
        """What does not go together with vLLM in the place of our engine, or without it."""
        if vllm is None or "vllm" not in self.layer.tables:
            return
        if vllm.model is None:
            self.problem("vllm", None, "vllm.model is needed: the 16-bit model that the base was made of")
        if not vllm.command:
            self.problem("vllm", "command", "vllm.command must name a program")
        if reserved := [each for each in vllm.options if each.partition("=")[0] in RESERVED]:
            self.problem("vllm", "options", f"vllm.options has {reserved[0]}: the replica gives that itself")
        for table, names in {**OWN_ENGINE, "engine": tuple(self.layer.tables.get("engine") or ())}.items():
            for name in names:
                if name in (self.layer.tables.get(table) or {}):
                    self.problem(table, name, f"{table}.{name} is for our engine, and [vllm] takes its place")

    def table(self, name: str, kind: Any) -> Any:
        """The values of a table as its dataclass; None if one of them is wrong."""
        known = keys(kind)
        hints = typing.get_type_hints(kind)
        values = {each: self._value(name, each, value, known, hints) for each, value in self._items(name)}
        values = {each: value for each, value in values.items() if value is not None}
        return kind(**values) if not self.problems else None

    def _items(self, name: str) -> list[tuple[str, Any]]:
        given = self.layer.tables.get(name)
        return list(given.items()) if isinstance(given, Mapping) else []

    def _value(self, table: str, name: str, value: Any, known: Mapping[str, Any], hints: Mapping[str, Any]) -> Any:
        if name not in known:
            self.problem(table, name, f"unknown key '{short(name)}' in [{table}]{nearest(name, known)}")
            return None
        found = convert(value, _kinds(hints[name]))
        if found is None:
            self.problem(table, name, f"{table}.{name} must be {_wanted(hints[name])}, not {short(repr(value))}")
            return None
        check: Callable[[Any], str | None] | None = known[name].metadata["check"]
        if check is not None and (wrong := check(found)):
            self.problem(table, name, f"{table}.{name} = {short(repr(value))}: {wrong}")
        return found

    def engine(self) -> dict[str, Any]:
        """[engine]: options of `qhub serve`, sizes as text or numbers."""
        known = options_of(EngineOptions)
        hints = typing.get_type_hints(EngineOptions)
        found: dict[str, Any] = {}
        for name, value in self._items("engine"):
            if name not in known:
                self.problem("engine", name, f"unknown key '{short(name)}' in [engine]{nearest(name, known)}")
                continue
            unit = known[name][1].unit
            try:
                if unit is not None and isinstance(value, str | int) and not isinstance(value, bool):
                    found[name] = parse_size(str(value), unit)
                else:
                    found[name] = convert(value, _kinds(hints[name]))
                if found[name] is None:
                    raise InputError(f"engine.{name} must be {_wanted(hints[name])}, not {short(repr(value))}")
                EngineOptions(**{name: found[name]})
            except InputError as error:
                self.problem("engine", name, str(error))
        return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union but None; of another type itself."""
    parts = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    return tuple(part for part in parts if part is not type(None)) or (hint,)


def _wanted(hint: Any) -> str:
    return " or ".join(NAMES.get(kind, "a list of names") for kind in _kinds(hint))

"""cluster.toml: what a cluster serves, on how many replicas, and where. Every mistake at once, each with its line."""

import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from adapterhub_local.errors import BadRecipe, InputError, NotFound
from adapterhub_local.options import options_of
from adapterhub_local.recipe.field import between, key, keys
from adapterhub_local.recipe.layers import Layer
from adapterhub_local.recipe.reader import all_problems, convert, nearest
from adapterhub_local.recipe.toml import read_toml, short
from adapterhub_local.registry.remotes import Remote
from adapterhub_local.sizes import parse_size
from adapterhub_local.visible import visible_line
from serve.engine.options import EngineOptions

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
MAX_REPLICAS = 1000
APPLICATION, REPLICAS, GATEWAYS = "qhub", "replicas", "gateways"  # what Ray Serve knows them as


@dataclass(frozen=True)
class Replicas:
    """[replicas]"""

    min: int = key("The least number of replicas.", 1, between(1, MAX_REPLICAS))
    max: int | None = key("The largest number of replicas, as the load changes; none: `min`.", None, between(1, 1000))
    cpus: float = key("CPU cores of each replica.", 1.0, between(0.0, 1024.0))
    gpus: float = key("GPUs of each replica.", 0.0, between(0.0, 64.0))
    requests: int = key("Requests at once in a replica, before the next one takes over.", 16, between(1, 10_000))
    drain: float = key("Seconds in which a replica that is removed may finish its answers.", 600.0, between(0.0, 1e5))
    pin: tuple[str, ...] = key("Adapters that every replica keeps in a slot.", ())
    dtype: str | None = key("As `qhub serve --dtype`.", None)


@dataclass(frozen=True)
class Gateway:
    """[gateway]"""

    host: str = key("Address to listen on.", "127.0.0.1")
    port: int = key("Port to listen on; 0 takes a free one.", 8000, between(0, 65535))
    replicas: int = key("Gateways, each on a machine of its own.", 1, between(1, 100))
    waiting: int = key("Requests that may wait for a replica; more are answered with 429.", 256, between(1, 100_000))
    hosts: tuple[str, ...] = key("Host names to answer to without API keys, besides localhost.", ())
    origins: tuple[str, ...] = key("Origins whose web pages may ask (CORS).", ())


@dataclass(frozen=True)
class Router:
    """[router]"""

    name: str | None = key(
        "Router that chooses the adapter where a request's model is auto, such as router@prod.", None
    )
    threshold: float | None = key("As `qhub serve --router-threshold`.", None, between(0.0, 1.0))
    allow: tuple[str, ...] = key("As `qhub serve --router-allow`.", ())


TABLES: Mapping[str, Any] = {"replicas": Replicas, "gateway": Gateway, "router": Router, "engine": EngineOptions}


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
        engine = self.engine()
        if replicas is not None and replicas.max is not None and replicas.max < replicas.min:
            self.problem("replicas", "max", f"replicas.max = {replicas.max}: must be at least replicas.min")
        if self.problems:
            return None
        return ClusterConfig(str(base), remote, None, replicas, gateway, router, engine)

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


def described() -> str:
    """A cluster.toml to begin with: every key with its meaning and default."""
    lines = [
        'base = "{base}"',
        f"{'# remote =':24} # Where versions, aliases, splits and keys come from: a name or a URL.",
    ]
    for name, table in (("replicas", Replicas), ("gateway", Gateway), ("router", Router)):
        lines += ["", f"[{name}]"]
        for item in fields(table):
            default = item.default
            text = f'"{default}"' if isinstance(default, str) else "[]" if default == () else str(default)
            shown = f"{item.name} = {text}" if default is not None else f"# {item.name} ="
            lines.append(f"{shown:24} # {item.metadata['meaning']}")
    return "\n".join([*lines, "", "[engine]                 # options of `qhub serve`, such as max_rows = 16", ""])

"""The bases of a home: `bases/<name>/` is a folder transformers loads, with a record of what it is. No torch here."""

import difflib
import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.base.quantisation import KINDS, OURS, Quantisation
from adapterhub_local.errors import BadReference, Corrupt, Incompatible, InputError, InUse, NotFound
from adapterhub_local.refs import check_name
from adapterhub_local.registry import Registry, Version
from adapterhub_local.settings import Home

RECORD = "qhub-base.json"


@dataclass(frozen=True)
class BaseInfo:
    """What is known of one base without loading it.

    `fingerprint` is a sha256 over tensors, config and tokenizer; every adapter records it.
    `bits_per_weight` counts the 4-bit linear weights with their quantisation constants;
    `bits_per_parameter` counts the whole file, 16-bit embeddings included.
    """

    name: str
    fingerprint: str
    architecture: str
    num_parameters: int
    num_quantised: int
    bits_per_weight: float
    bits_per_parameter: float
    size: int
    max_length: int | None
    has_chat_template: bool
    source: str
    hub_id: str | None
    revision: str | None
    created_at: str
    folder: Path = field(compare=False)
    is_private: bool = False  # on the Hub, when it was added
    licence: str | None = None  # as the Hub names it
    left_out: tuple[str, ...] = ()  # parts of the source that are not in it, such as a vision tower
    not_read_back: str | None = None  # why what was written was not compared with the source, None if it was
    chat_template: str | None = None  # the name or file of the one that it was given, None for the source's own
    quantisation: str = OURS.name  # how its linear layers are held

    @property
    def kind(self) -> Quantisation:
        """How its linear layers are held."""
        return KINDS[self.quantisation]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def within(self, length: int) -> int:
        """`length` in tokens, or what the base takes if that is less."""
        return min(length, self.max_length or length)

    def lineage(self) -> dict[str, Any]:
        """What an adapter records of its base: no path of this machine."""
        keys = ("name", "fingerprint", "hub_id", "revision", "architecture")
        known = {"private": self.is_private, "license": self.licence, "chat_template": self.chat_template}
        known["quantisation"] = None if self.kind == OURS else self.quantisation
        return {key: getattr(self, key) for key in keys} | {key: value for key, value in known.items() if value}


def check_base_name(name: str) -> str:
    """`name`, if it may name a base: as an adapter's name, without a namespace. Raises BadReference."""
    if "/" in check_name(name):
        raise BadReference(f"'{name}' cannot name a base: bases have no namespace, leave out the '/'")
    return name


def list_bases(home: Home) -> list[BaseInfo]:
    """All bases, by name."""
    if not home.bases.is_dir():
        return []
    return [read_record(folder) for folder in sorted(home.bases.iterdir()) if (folder / RECORD).is_file()]


def find_base(name: str, home: Home) -> BaseInfo:
    """The base called `name`. Raises NotFound with the nearest names."""
    folder = home.bases / check_base_name(name)
    if not (folder / RECORD).is_file():
        known = [base.name for base in list_bases(home)]
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"add it with `qhub base add {name} SOURCE`"
        raise NotFound(f"there is no base '{name}': {hint}")
    return read_record(folder)


def choose_base(name: str | None, home: Home, what: str) -> BaseInfo:
    """The base called `name`, or the only one there is; `what` it is for is named in errors.

    Raises NotFound if there is none, InputError if there are several.
    """
    if name is not None:
        return find_base(name, home)
    bases = list_bases(home)
    if not bases:
        raise NotFound(f"there is no base for {what}: add one with `qhub base add NAME SOURCE`")
    if len(bases) > 1:
        names = ", ".join(base.name for base in bases)
        raise InputError(f"there are several bases, say with --base which one {what} is for: {names}")
    return bases[0]


def find_by_fingerprint(fingerprint: str, home: Home) -> BaseInfo | None:
    """The base with this fingerprint, if the home has it."""
    return next((base for base in list_bases(home) if base.fingerprint == fingerprint), None)


def base_of(version: Version, home: Home) -> BaseInfo:
    """The base a version was made for. Raises Incompatible if this home does not have it."""
    fingerprint = version.base_fingerprint
    found = find_by_fingerprint(fingerprint, home) if fingerprint else None
    if found is None:
        entry = version.lineage.get("base", {})
        name = entry.get("hub_id") or entry.get("name") or "an unknown model"
        given = entry.get("chat_template")
        way = f"`qhub base add` and the same --chat-template, {given}" if given else "`qhub base add`"
        raise Incompatible(
            f"{version} was made for {name} ({(fingerprint or 'no fingerprint')[:19]}): add it with {way}"
        )
    return found


def read_record(folder: Path) -> BaseInfo:
    """The record of the base in `folder`. Raises Corrupt if it cannot be read."""
    try:
        fields = json.loads((folder / RECORD).read_bytes())
        fields["left_out"] = tuple(fields.get("left_out", ()))
        if (kind := fields.get("quantisation", OURS.name)) not in KINDS:
            raise ValueError(f"it is held as {kind}, which this version does not know")
        return BaseInfo(**fields, name=folder.name, folder=folder)
    except (OSError, ValueError, TypeError) as error:
        raise Corrupt(f"{folder / RECORD} cannot be read ({error}): remove the base and add it again") from None


def write_record(folder: Path, info: BaseInfo) -> None:
    """Write the record into a base's folder; the name is the folder's own."""
    left_out = {"name", "folder"} | ({"quantisation"} if info.kind == OURS else set())  # as versions before wrote it
    fields = {key: value for key, value in asdict(info).items() if key not in left_out}
    (folder / RECORD).write_text(json.dumps(fields, indent=2) + "\n")


def remove_base(name: str, home: Home, *, force: bool = False) -> BaseInfo:
    """Remove a base. Raises InUse while adapters were made for it and no other base has its fingerprint."""
    info = find_base(name, home)
    twins = [base for base in list_bases(home) if base.fingerprint == info.fingerprint and base.name != name]
    needing = [] if twins else Registry(home).versions_on_base(info.fingerprint)
    if needing and not force:
        shown = ", ".join(str(version) for version in needing[:3]) + (", ..." if len(needing) > 3 else "")
        raise InUse(f"base '{name}' is needed by {len(needing)} adapter versions ({shown}): --force removes it anyway")
    # renamed first, so that a base is either whole or gone
    home.tmp.mkdir(parents=True, exist_ok=True)
    doomed = home.tmp / uuid.uuid4().hex
    info.folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return info

"""Where a merge goes: the next version of a name, or a file or folder; every door checks it here."""

from dataclasses import dataclass
from pathlib import Path

from adapterhub_local.durable import check_absent
from adapterhub_local.errors import InputError
from adapterhub_local.refs import check_alias, check_name


@dataclass(frozen=True)
class Destination:
    """The next version of `name`, with an `alias` to point to it, or `path`: a .safetensors file or a PEFT folder.

    Neither of the two: nowhere yet. Raises InputError for both, or an alias without a name; BadReference for a name or
    an alias that cannot be one.
    """

    name: str | None = None
    alias: str | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.path is not None:
            raise InputError("--name and -o exclude each other: give one")
        if self.alias is not None and self.name is None:
            raise InputError("--alias needs --name: only a registered version can have an alias")
        if self.name is not None:
            check_name(self.name)
        if self.alias is not None:
            check_alias(self.alias)

    @property
    def is_given(self) -> bool:
        return self.name is not None or self.path is not None

    def beside(self, labels: tuple[str, ...]) -> "Destination":
        """This one, or else a+b.safetensors in the folder of work. Raises InUse if the path exists already."""
        if self.name is not None:
            return self
        stems = [Path(label).name.removesuffix(".safetensors").replace("@", "-") for label in labels]
        return Destination(path=check_absent(self.path or Path("+".join(stems) + ".safetensors")))

"""The library of C: compiled once for all processes, anew where it is damaged; where nothing compiles there is none."""

from pathlib import Path

import pytest
import torch

from adapterhub_local import settings as project_settings
from adapterhub_local.errors import InputError
from serve.kernels.choose import choose_kernels
from serve.kernels.compiled import CannotCompile, find_compiler
from serve.kernels.cpu import load_kernels

try:
    load_kernels()
except CannotCompile as error:
    pytest.skip(f"the kernels cannot be compiled: {error}", allow_module_level=True)


def _cut(library: Path) -> None:
    content = library.read_bytes()
    library.unlink()  # this process has it loaded
    library.write_bytes(content[:5000])


def _link(library: Path) -> None:
    library.unlink()
    library.symlink_to("/dev/null")


def _open_to_all(library: Path) -> None:
    library.chmod(0o777)
    library.parent.chmod(0o777)


def test_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels are compiled once for all processes; without a compiler, or with a broken one, `auto` is plain torch."""
    cpu, folder = torch.device("cpu"), tmp_path / "adapterhub-local"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("serve.kernels.compiled.FLAGS", ["-O0", "-fPIC", "-fopenmp"])  # quicker to compile
    for _ in range(2):
        kernels = choose_kernels("auto", cpu, torch.float32, (4, 2, 16))
        assert kernels is not None
        assert kernels.names == ["add_parts", "multiply", "paged_attention"]
        assert len(list(folder.iterdir())) == 1
    (library,) = folder.iterdir()
    for spoil in (_cut, _link, _open_to_all):  # what is damaged, or others may have written, is compiled anew
        spoil(library)
        assert choose_kernels("auto", cpu, torch.float32, (4, 2, 16)) is not None
        assert not library.is_symlink()
        assert library.stat().st_mode & 0o022 == folder.stat().st_mode & 0o022 == 0
    monkeypatch.setenv("CC", "false")  # a command that only fails
    assert choose_kernels("auto", cpu, torch.float32, (4, 2, 16)) is None
    with pytest.raises(InputError, match=r"--kernels c cannot be used here: .*false"):
        choose_kernels("c", cpu, torch.float32, (4, 2, 16))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompile, match="there is no C compiler"):
        find_compiler()
    assert len(list(folder.iterdir())) == 1  # nothing half-made


def test_a_relative_cache_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative XDG_CACHE_HOME names another folder at every start: what lies there is not run."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert project_settings.cache() == Path.home() / ".cache" / "adapterhub-local"

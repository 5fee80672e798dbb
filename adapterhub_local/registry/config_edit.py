"""Add a hook to `config.toml` and take one out, as text: what a person wrote beside it stays as it is."""

import json
import os
import re
import secrets
from dataclasses import replace
from typing import Any

from adapterhub_local.durable import alone, is_shared, replacing
from adapterhub_local.errors import InputError, InUse, NotFound
from adapterhub_local.registry.config import DEFAULT_EVENTS, HomeConfig, Hook, parse_config, read_config
from adapterhub_local.registry.hooks.state import State, newest, read_state, start, write_state
from adapterhub_local.registry.registry import Registry
from adapterhub_local.settings import Home, make_folder


def add_hook(registry: Registry, hook: Hook, *, is_signed: bool = True) -> Hook:
    """Add a hook, and return it; if `is_signed` and it has no secret, one is made for it.

    It is notified of what changes from now on. Raises InUse if the name is taken, InputError for what cannot be one.
    """
    home = registry.home
    make_folder(home.hooks)
    with alone(home.hooks / "config.lock"):
        before = read_config(home)
        if any(one.name == hook.name for one in before.hooks):
            raise InUse(f"there is a hook '{hook.name}' already: `qhub hook rm {hook.name}` removes it")
        path = home.hooks / f"{hook.name}.secret"
        makes_secret = is_signed and hook.url is not None and hook.secret_file is None
        if makes_secret:
            hook = replace(hook, secret_file=str(path.relative_to(home.root)))
        text = home.config.read_text(encoding="utf-8") if home.config.exists() else ""
        made = f"{text.rstrip()}\n\n{_table(hook)}" if text.strip() else _table(hook)
        _check(made, replace(before, hooks=(*before.hooks, hook)), home)
        if makes_secret:
            with replacing(path, 0o660 if is_shared(home.root) else 0o600) as staged:
                staged.write_text(secrets.token_urlsafe(32), encoding="utf-8")
        _keep_places(registry, before)
        write_state(home, hook.name, State(newest(registry)))
        _write(home, made)
    return hook


def remove_hook(registry: Registry, name: str) -> Hook:
    """Remove a hook, with what it was not notified of yet. Raises NotFound, InputError if the text cannot be cut so."""
    home = registry.home
    make_folder(home.hooks)
    with alone(home.hooks / "config.lock"):
        before = read_config(home)
        hook = find_hook(before, name)
        text = home.config.read_text(encoding="utf-8")
        starts = [match.start() for match in re.finditer(r"^[ \t]*\[\[[ \t]*hooks[ \t]*\]\]", text, re.MULTILINE)]
        start = starts[before.hooks.index(hook)] if len(starts) == len(before.hooks) else len(text)
        end = next((found for found in starts if found > start), len(text))
        _check(made := text[:start] + text[end:], replace(before, hooks=tuple(
            one for one in before.hooks if one is not hook)), home)  # fmt: skip
        _keep_places(registry, before)
        _write(home, made)
        for suffix in (".json", ".secret", ".log"):
            (home.hooks / f"{name}{suffix}").unlink(missing_ok=True)
    return hook


def find_hook(config: HomeConfig, name: str) -> Hook:
    """The hook of this name. Raises NotFound."""
    found = next((hook for hook in config.hooks if hook.name == name), None)
    if found is None:
        known = ", ".join(hook.name for hook in config.hooks)
        raise NotFound(f"there is no hook '{name}': {f'there is {known}' if known else '`qhub hook add` makes one'}")
    return found


def _table(hook: Hook) -> str:
    fields: dict[str, Any] = {"name": hook.name}
    if hook.url is not None:
        fields["url"] = hook.url
    else:
        fields["command"] = list(hook.command)
    if hook.events != DEFAULT_EVENTS:
        fields["events"] = list(hook.events)
    if hook.names:
        fields["names"] = list(hook.names)
    if hook.secret_file is not None:
        fields["secret_file"] = hook.secret_file
    if hook.timeout != Hook.timeout:
        fields["timeout"] = hook.timeout
    # TOML's basic strings and arrays of them are JSON's, but for DEL, which JSON leaves as it is
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f") for key, value in fields.items()
    ]
    return "\n".join(["[[hooks]]", *lines]) + "\n"


def _check(text: str, wanted: HomeConfig, home: Home) -> None:
    """Raise InputError unless `text` says what is wanted: nothing else may be changed by an edit."""
    if parse_config(text, str(home.config)) != wanted:
        raise InputError(f"{home.config} is written in a way that cannot be edited here: change it by hand")


def _keep_places(registry: Registry, config: HomeConfig) -> None:
    """Note where new hooks begin: the time of the file, which says so, is about to change."""
    for hook in config.hooks:
        if read_state(registry.home, hook.name) is None:
            write_state(registry.home, hook.name, start(registry))


def _write(home: Home, text: str) -> None:
    mode = home.config.stat().st_mode & 0o777 if home.config.exists() else 0o644
    with replacing(home.config, mode) as staged:
        staged.write_text(text, encoding="utf-8")
        os.chmod(staged, mode)

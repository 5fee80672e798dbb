"""The data of a recipe: every file read and recognised, weighted, and a part held out where no test file is given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.counts import counted
from adapterhub_local.data.calls import check_called, misfit
from adapterhub_local.data.chat import Chat
from adapterhub_local.data.columns import listed, recognise, renamed, unused_columns
from adapterhub_local.data.files import read_rows
from adapterhub_local.data.formats import read_chat
from adapterhub_local.data.requests import as_messages
from adapterhub_local.data.tables import class_names
from adapterhub_local.data.trouble import Troubles
from adapterhub_local.durable import canonical_json, digest_bytes, digest_file
from adapterhub_local.errors import BadData
from adapterhub_local.recipe.objectives import ANSWERS, OBJECTIVES
from adapterhub_local.recipe.recipe import Recipe
from adapterhub_local.recipe.schema import Data
from adapterhub_local.recipe.source import HubFiles, Source, local_files


@dataclass(frozen=True)
class Dataset:
    """What is trained and evaluated on. `records` is what a lineage keeps of each file, `notes` is for people."""

    train: list[Chat]
    test: list[Chat]
    records: list[dict[str, Any]]
    notes: list[str]

    @property
    def test_digest(self) -> str | None:
        """`sha256:<hex>` of what is evaluated on, by which scores can be compared."""
        digests = [record["digest"] for record in self.records if record["role"] == "test"]
        return digests[0] if len(digests) == 1 else digest_bytes(canonical_json(digests)) if digests else None


@dataclass(frozen=True)
class Part:
    """The chats of one file, its record, and which of the recipe's sources it belongs to."""

    chats: list[Chat]
    record: dict[str, Any]
    source: int = 0
    remarks: list[str] = field(default_factory=list)  # what became of columns and rows

    @property
    def notes(self) -> list[str]:
        """What a person must know of it, a sentence each."""
        role, file = self.record["role"], self.record["file"]
        first = f"{role}: {file}, {counted(len(self.chats), 'example')}, {self.record['format']}"
        return [first, *(f"{role}: {remark}" for remark in self.remarks)]


def read_data(recipe: Recipe) -> Dataset:
    """Read all data of a recipe. Raises BadData with file and line, HubError and NotFound for datasets of the Hub."""
    data = recipe.data
    shape = OBJECTIVES[recipe.train.objective].shape
    train = read_parts(data.train, "train", data, data.limit, shape)
    test = read_parts(data.test, "test", data, recipe.eval.limit, shape) if data.test else []
    kept, held_out = [part.chats for part in train], [chat for part in test for chat in part.chats]
    records = [part.record for part in (*train, *test)]
    notes = [note for part in (*train, *test) for note in part.notes]
    if not test and data.test_share:
        held_out = [chat for chats in kept for chat in chats if _fraction(chat, 0) < data.test_share]
        kept = [[chat for chat in chats if _fraction(chat, 0) >= data.test_share] for chats in kept]
        held_out = held_out[: recipe.eval.limit]
        if held_out:
            shown = f"{data.test_share:.0%} of {', '.join(part.record['file'] for part in train)}"
            contents = [_content(chat) for chat in held_out]
            digest = digest_bytes(canonical_json(contents))
            records.append({"role": "test", "file": shown, "digest": digest, "rows": len(held_out)})
            notes.append(f"held out: {counted(len(held_out), 'example')}, {shown}, chosen by a hash of the prompt")
        elif recipe.train.eval_every:
            raise BadData(
                f"train.eval_every needs examples to evaluate on, and the hash that holds out {data.test_share:.0%} "
                "chose none of so few: raise data.test_share, or name a file in data.test"
            )
        else:
            notes.append(
                f"held out: nothing, as the hash that holds out {data.test_share:.0%} chose none of so few examples; "
                "name a file in data.test to have the adapter scored"
            )
    if recipe.eval.tool_calls and not any(chat.tools for chat in held_out):
        raise BadData(
            f"{recipe.place('eval.tool_calls')} needs held-out examples that offer tools, in the column 'tools': "
            + ("none of them does" if held_out else "nothing is held out, name a file in data.test")
        )
    # of judged answers, which may all answer one prompt, it is the answers that must be others
    known = _digest if shape != ANSWERS else lambda chat: chat.prompt_digest
    asked = {known(chat) for chats in kept for chat in chats}
    if shared := sum(known(chat) in asked for chat in held_out):
        what = "test prompts" if shape == ANSWERS else "test examples"
        notes.append(
            f"{what} that are in the training data too: {shared:,} of {len(held_out):,}; scores on them look too good"
        )
    weights = [data.weights[part.source] if data.weights else 1.0 for part in train]
    weighted = [chat for chats, weight in zip(kept, weights, strict=True) for chat in _repeated(chats, weight)]
    if not weighted:
        raise BadData("no example is left to train on: lower data.test_share, or give more examples")
    if data.weights:
        notes.append(f"an epoch has {counted(len(weighted), 'example')}, by data.weights")
    return Dataset(weighted, held_out, records, notes)


def read_parts(
    sources: Sequence[Source], role: str, data: Data | None = None, limit: int | None = None, shape: str = ANSWERS
) -> list[Part]:
    """The chats of each file of these sources; `limit` counts in each file. `role` is train or test.

    shape: what a row must be, see `recipe.objectives`.

    Raises BadData with what is wrong with any row, counted by kind, unless the recipe leaves such rows out.
    """
    parts = []
    for number, source in enumerate(sources):
        files, known = (local_files(source, role), {}) if isinstance(source, Path) else _fetch(source, role)
        if not files:
            raise BadData(f"{source} has no data files")
        parts += [_read(path, role, data, limit, known, number, shape) for path in files]
    return parts


def _fetch(source: HubFiles, role: str) -> tuple[list[Path], dict[str, Any]]:
    from adapterhub_local.hub.dataset import fetch_dataset

    files, commit = fetch_dataset(source.repo, source.revision, source.path, role)
    return files, {"repo": source.repo, "revision": commit}


def _read(
    path: Path, role: str, data: Data | None, limit: int | None, known: dict[str, Any], source: int, shape: str
) -> Part:
    wanted = "columns" if data and data.prompt is not None else data.format if data else "auto"
    labels = class_names(path) if wanted == "columns" else {}
    by_first: str | None = None  # the format that the first example decided
    chats: list[Chat] = []
    troubles, unused = Troubles(path.name), Counter[str]()
    misfits: list[str] = []  # calls that the schema of their tool does not allow
    for where, row in read_rows(path, role):
        if limit is not None and len(chats) >= limit:
            break
        troubles.total += 1
        try:
            if isinstance(row, BadData):
                raise row
            row = renamed(as_messages(row, where, data), data)
            if wanted == "auto":
                wanted = recognise(row, where, shape)
                by_first = wanted
            elif by_first:
                _check_same(row, where, by_first, shape)
            chat = read_chat(row, where, wanted, data, labels)
            check_called(chat)
            chats.append(chat)
            if wrong := misfit(chat):
                misfits.append(f"{where}: {wrong}")
            unused.update(unused_columns(row, wanted, data))
        except BadData as error:
            troubles.add(where, error)
    troubles.raise_if(data.bad_rows if data else "error")
    if not chats:
        raise BadData(f"{path} has no examples")
    remarks = troubles.notes
    if misfits:
        remarks.append(
            f"calls that the schema of their tool does not allow are learned as they are: {len(misfits):,} of "
            f"{counted(len(chats), 'example')}, the first is {misfits[0]}"
        )
    if unused:
        columns = ", ".join(
            f"{listed([name])} ({count:,} of {len(chats):,} examples)" for name, count in sorted(unused.items())
        )
        remarks.append(
            f"columns that are not used: {columns}; data.prompt and data.answer make an example of any columns, "
            "data.columns says what they are called"
        )
    given = (data.labels if data else None) or {}
    for column in labels.keys() - given.keys():
        if data and "{" + column + "}" in f"{data.prompt}{data.answer}{data.system}":
            named = ", ".join(f"{number} is '{name}'" for number, name in enumerate(labels[column][:5]))
            more = ", ..." if len(labels[column]) > 5 else ""
            remarks.append(f"{column}: {named}{more}, as the file itself says; data.labels says otherwise")
    record = {
        "role": role,
        "file": path.name,
        "digest": digest_file(path),
        "rows": len(chats),
        "format": wanted,
        **({"left_out": troubles.count} if troubles.count else {}),
        **({"unused": sorted(unused)} if unused else {}),
        **known,
    }
    return Part(chats, record, source, remarks)


def _check_same(row: Any, where: str, format: str, shape: str) -> None:  # noqa: A002 - as in the recipe
    """Raise BadData for a row that has the columns of another format than the first example of its file."""
    try:
        found = recognise(row, where, shape)
    except BadData:
        return  # the reader of the format reports which columns are missing
    if found != format:
        raise BadData(
            f"{where}: it has the columns of {found}, and the first example of the file those of {format}: put them "
            "into files of their own"
        )


def _content(chat: Chat) -> Any:
    """All of a chat that is scored, by which test data are known again."""
    content: Any = list(chat.messages) or chat.text
    if chat.rejected is not None:
        return [content, chat.rejected]
    return content if chat.is_good else [content, False]


def _digest(chat: Chat) -> str:
    return digest_bytes(canonical_json(_content(chat)))


def _repeated(chats: list[Chat], weight: float) -> list[Chat]:
    """Each chat `weight` times; of a fraction, those that a hash chooses."""
    whole = int(weight)
    return chats * whole + [chat for chat in chats if _fraction(chat, 1) < weight - whole]


def _fraction(chat: Chat, draw: int) -> float:
    """A number from 0 to 1 that only the prompt decides; draws are independent of each other."""
    digits = chat.prompt_digest.removeprefix("sha256:")[13 * draw : 13 * draw + 13]
    return int(digits, 16) / 16**13

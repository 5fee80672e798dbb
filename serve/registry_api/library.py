"""What the API and the pages read: adapters, versions, lineage and runs, as far as a key may see them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterhub_local.base.bases import list_bases
from adapterhub_local.errors import BadReference, NotFound
from adapterhub_local.keys import Key, Keys
from adapterhub_local.refs import Mix
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.as_json import whole
from adapterhub_local.registry.differences import compare_lineages
from adapterhub_local.registry.graph import graph
from adapterhub_local.registry.kinds import check_adapter, is_router
from adapterhub_local.registry.listing import MAX_PAGE, Page, Wanted, bases_in, page
from adapterhub_local.registry.marks import description_of, tags_of
from adapterhub_local.registry.pointers import pointers_of
from adapterhub_local.registry.split import splits_in
from adapterhub_local.train.past_runs import PastRun, list_runs, run_at
from serve.auth import allowed_by, check_models, sees_keys_by
from serve.jobs import Job, Jobs
from serve.registry_api.hands import Hands
from serve.registry_api.places import read_place, write_place
from serve.registry_api.run_log import RunLogs

HIDDEN = "another adapter"
HEAVY = ("merge_report",)  # of a lineage: a line for each module


@dataclass(frozen=True)
class Library:
    """The registry, the jobs, what the engine does now, None where there is no engine, and how far a remote is
    followed, None where none is; who asked how much, None where nobody can ask; and who keeps adapters in memory."""

    registry: Registry
    jobs: Jobs
    engine: Callable[[], dict[str, Any]] | None = None
    remote: Callable[[], dict[str, Any]] | None = None
    usage: Callable[[Key | None], list[dict[str, Any]]] | None = None
    hands: Hands | None = None
    logs: RunLogs = field(default_factory=RunLogs)

    def adapters(self, key: Key | None, wanted: Wanted, *, after: str | None = None, limit: int = 50) -> Page:
        """A page of what the key may see. Raises as `listing.page`."""
        if (allowed := self.visible_names(key)) is not None:
            wanted = replace(wanted, allowed=allowed)
        return page(self.registry, wanted, after=after, limit=limit)

    def visible_names(self, key: Key | None) -> list[str] | None:
        """The names that the key may see, None for all."""
        if key is None or not key.adapters:
            return None
        return [name for name in self.registry.names() if key.allows(name)]

    def adapter(self, key: Key | None, name: str, *, limit: int = MAX_PAGE) -> dict[str, Any]:
        """One name: its newest versions, aliases with what protects them, approvals and their log, and its split.

        Who moved an alias is shown to those who may move one. Raises NotFound.
        """
        check_models(key, [name])
        found = page(self.registry, Wanted(name=name, every=True), limit=limit)
        if not found.entries:
            self.registry.resolve(name)  # which says what there is
        own = {} if key is None or "admin" in key.scopes else {"actor": None}
        pointers = pointers_of(self.registry, name)
        for part in ("protections", "approvals", "alias_log"):
            pointers[part] = [each | own for each in pointers[part]]
        return {"name": name, "versions": found.entries, "total": found.total, **pointers}

    def resolve(self, key: Key | None, reference: str) -> Version:
        """The version of a reference that the key may see. Raises BadReference, Forbidden, NotFound."""
        check_models(key, [reference.partition("@")[0]])
        return self.registry.resolve(reference)

    def version(self, key: Key | None, reference: str, *, with_report: bool = False) -> dict[str, Any]:
        """One version with tags, description and scores; with the report of its merge, if that is asked for."""
        version = self.resolve(key, reference)
        fields = whole(version)
        lineage = {name: part for name, part in version.lineage.items() if with_report or name not in HEAVY}
        aliases = [alias for alias, number in self.registry.aliases(version.name).items() if number == version.number]
        return {
            **fields,
            "lineage": _hide_parents(lineage, key),
            "aliases": aliases,
            "tags": tags_of(self.registry, version),
            "description": description_of(self.registry, version),
            "metrics": self.registry.metrics(version),
        }

    def lineage(self, key: Key | None, reference: str) -> dict[str, Any]:
        """Nodes and edges of what a version was made of; names that the key may not see are hidden."""
        found = graph(self.registry, self.resolve(key, reference))
        allows = allowed_by(key)
        for node in found.nodes:
            is_adapter = node["reference"] is not None or "@" in node["label"]
            if is_adapter and not allows(node["label"].partition("@")[0]):
                node |= {"label": HIDDEN, "reference": None}
        found.made_into = [made for made in found.made_into if allows(made.partition("@")[0])]
        return found.to_json()

    def compare(self, key: Key | None, left: str, right: str) -> dict[str, Any]:
        """What differs between two versions' recipes, data and scores."""
        sides = [self.resolve(key, reference) for reference in (left, right)]
        lineages = [
            {**_hide_parents(version.lineage, key), "metrics": self.registry.metrics(version)} for version in sides
        ]
        return {
            "left": str(sides[0]),
            "right": str(sides[1]),
            "same_content": sides[0].content_digest == sides[1].content_digest,
            "lineage": {name: list(pair) for name, pair in compare_lineages(*lineages).items()},
        }

    def compare_modules(self, key: Key | None, left: str, right: str) -> Job:
        """A job that measures norms and cosines of every module: what `qhub diff --json` prints. Raises Busy."""
        one, other = (check_adapter(self.resolve(key, reference)) for reference in (left, right))
        same = ("diff", one.content_digest, other.content_digest, str(one), str(other))
        command = ["diff", str(one), str(other), "--json"]
        return self.jobs.start("diff", command, (one.name, other.name), same=same)

    def all_jobs(self, key: Key | None) -> list[Job]:
        """The jobs about nothing but adapters that the key is for, the newest first."""
        return [job for job in self.jobs.all() if all(map(allowed_by(key), job.about))]

    def job(self, key: Key | None, identity: str) -> Job:
        """A job about adapters that the key is for. Raises Forbidden, NotFound."""
        found = self.jobs.find(identity)
        check_models(key, found.about)
        return found

    def names_in(self, text: str) -> tuple[str, ...]:
        """The names of adapters and bases that a reference or a mix speaks of."""
        try:
            return tuple(reference.name for reference, _ in Mix.parse(text.rpartition(":")[2]).terms)
        except BadReference:
            return (text,)

    def bases(self, key: Key | None) -> list[dict[str, Any]]:
        """The bases of this home, and those that versions which the key may see were made for and that are not here."""
        counts = {base["fingerprint"]: base for base in bases_in(self.registry, self.visible_names(key))}
        here = []
        for info in list_bases(self.registry.home):
            fields = {name: value for name, value in info.to_json().items() if name not in ("folder", "source")}
            used = counts.pop(info.fingerprint, None)
            here.append({**fields, "is_here": True, "num_versions": used["num_versions"] if used else 0})
        return here + [{**base, "is_here": False} for base in counts.values()]

    def keys(self, key: Key | None) -> list[dict[str, Any]]:
        """The keys that this one may see, revoked ones included, the newest first."""
        sees = sees_keys_by(key)
        return [each.to_json() for each in reversed(Keys(self.registry.home).all()) if sees(each.id)]

    def splits(self, key: Key | None) -> list[dict[str, Any]]:
        """The names whose traffic is split, and how."""
        allows = allowed_by(key)
        return [
            {"name": name, "split": [{"alias": alias, "share": share} for alias, share in split]}
            for name, split in splits_in(self.registry).items()
            if allows(name)
        ]

    def runs(self, key: Key | None, *, after: str | None = None, limit: int = 50) -> Page:
        """A page of the runs of names that the key may see, the newest first. Raises InputError."""
        found = [run for run in reversed(list_runs(self.registry.home)) if self._may_see(key, run)]
        total, place = len(found), read_place(after)
        if place is not None:
            found = [run for run in found if _place_of(run) < place]
        shown = found[:limit]
        following = write_place(_place_of(shown[-1])) if len(found) > limit else None
        return Page([self.run_entry(run) for run in shown], total, following)

    def run(self, key: Key | None, identity: str) -> PastRun:
        """One run by its whole id. Raises NotFound."""
        run = run_at(self.registry.home, identity)
        if run is None or not self._may_see(key, run):
            raise NotFound(f"there is no run '{identity}': `qhub runs list` shows them")
        return run

    def run_entry(self, run: PastRun) -> dict[str, Any]:
        """A run as the API lists it: without paths of this machine."""
        fields = run.to_json(self.logs.newest(run.folder))
        return {name: value for name, value in fields.items() if name not in ("folder", "report")}

    def _may_see(self, key: Key | None, run: PastRun) -> bool:
        return allowed_by(key)(str(run.record.get("name") or ""))


def _place_of(run: PastRun) -> tuple[str, str]:
    """Where a run stands in the list."""
    return run.record.get("started_at") or "", run.id


def _hide_parents(lineage: Mapping[str, Any], key: Key | None) -> dict[str, Any]:
    """A lineage without the names of parents that the key may not see."""
    allows = allowed_by(key)
    parents = lineage.get("parents")
    if not parents:
        return dict(lineage)
    shown = [
        entry if allows(str(entry.get("reference", "")).partition("@")[0]) else {**entry, "reference": HIDDEN}
        for entry in parents
    ]
    public = {**lineage, "parents": shown}
    if shown != list(parents):  # a router says more of those it chooses among
        for name in ("router", "data") if is_router(lineage) else ():
            public.pop(name, None)
    return public

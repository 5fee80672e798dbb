"""A merge, or what it would lose, as a job: what cannot be merged is refused before the job starts."""

from adapterhub_local.keys import Key
from adapterhub_local.merge.formula import Formula
from adapterhub_local.merge.rank_rule import parse_rule
from adapterhub_local.refs import check_alias, check_name
from adapterhub_local.registry.kinds import check_adapter
from serve.auth import check_models
from serve.errors import BadParameter
from serve.jobs import Job
from serve.registry_api.bodies import MergeBody
from serve.registry_api.library import Library


def start_merge(library: Library, key: Key | None, body: MergeBody) -> Job:
    """A job that merges what the key may see. Raises BadParameter, InputError, Forbidden, NotFound, Busy."""
    if len(body.weights) != len(body.adapters):
        raise BadParameter("there must be one weight for each adapter", "weights")
    versions = [check_adapter(library.resolve(key, reference)) for reference in body.adapters]
    names = [version.name for version in versions]
    rule = parse_rule(body.rank, body.energy, body.max_error)
    Formula(body.method, body.parameters, rule=rule).check(body.weights)
    weights = ",".join(f"{weight!r}" for weight in body.weights)
    command = ["merge", *map(str, versions), f"--weights={weights}", f"--method={body.method}", "--json"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in sorted(body.parameters.items())]
    rules = {"rank": body.rank, "energy": body.energy, "max-error": body.max_error}
    command += [f"--{name}={value}" for name, value in rules.items() if value is not None]
    if body.name is None:
        if body.alias is not None:
            raise BadParameter("an alias needs a name: say under which name the merge is registered", "alias")
        command += ["--dry-run", "--by-rank"]
        return library.jobs.start("preview", command, names, same=command)
    check_models(key, [check_name(body.name)])
    command.append(f"--name={body.name}")
    if body.alias is not None:
        command.append(f"--alias={check_alias(body.alias)}")
    return library.jobs.start("merge", command, [*names, body.name])

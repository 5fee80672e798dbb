"""Adapters and bases of one base scored on the same held-out data, compared, and kept with their versions."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_local.base.bases import BaseInfo, base_of, find_base, list_bases
from adapterhub_local.errors import Incompatible, InputError, NotFound, QhubError
from adapterhub_local.evaluate.preferences import AnyScore, evaluate_judged
from adapterhub_local.progress import Counting, Quiet, Reporter
from adapterhub_local.recipe.objectives import ANY, PAIRS
from adapterhub_local.recipe.reader import check_data_settings
from adapterhub_local.recipe.source import Source, local_problem, read_source
from adapterhub_local.registry import Registry, Version
from adapterhub_local.registry.kinds import check_adapter
from adapterhub_local.settings import Home, allows_code


@dataclass(frozen=True)
class Subjects:
    """What is scored: each reference as it was written, with its version, None for a base, and what they are for."""

    references: tuple[str, ...]
    others: tuple[str, ...]  # what each reference is compared with; `base` is its own
    versions: dict[str, Version | None]
    info: BaseInfo

    def shown(self, text: str) -> str:
        """The exact name of what was written as `text`."""
        return str(self.versions[text] or text)

    @property
    def compared(self) -> list[str]:
        """The keys of `versions` that `others` are."""
        return list(dict.fromkeys(self.info.name if text == "base" else text for text in self.others))

    @property
    def adapters(self) -> list[Version]:
        return [version for version in self.versions.values() if version is not None]


@dataclass(frozen=True)
class Comparison:
    """The scores of all that was scored, and for each reference what is kept: its differences are in there."""

    subjects: Subjects
    task: str
    scores: dict[str, AnyScore]
    kept: dict[str, dict[str, Any]]
    not_kept: dict[str, str] = field(default_factory=dict)  # reference -> why

    def to_json(self) -> dict[str, Any]:
        """Scores with their 95 % intervals, and the differences, by exact name."""
        shown = self.subjects.shown
        scores = {shown(text): score.to_json_with_intervals() for text, score in self.scores.items()}
        body = {"task": self.task, "scores": scores}
        if not self.subjects.others:
            return body
        differences = {
            shown(text): {
                who: part["difference"]
                for who, part in self.kept[text].items()
                if isinstance(part, dict) and "difference" in part
            }
            for text in self.subjects.references
        }
        return {**body, "differences": differences}


def what_to_score(references: Sequence[str], against: Sequence[str], registry: Registry) -> Subjects:
    """The versions and the base that the references name.

    Raises InputError for `base` as a reference, NotFound, and Incompatible if they are of several bases.
    """
    if "base" in references:
        raise InputError("name the base itself, as `qhub base list` shows it; `base` is for --against")
    names = {base.name for base in list_bases(registry.home)}
    named = dict.fromkeys((*references, *(text for text in against if text != "base")))
    versions = {text: None if text in names else check_adapter(registry.resolve(text)) for text in named}
    info = _one_base(versions, registry.home)
    if "base" in against:
        versions.setdefault(info.name, None)
    return Subjects(tuple(references), tuple(against), versions, info)


def compare(
    subjects: Subjects,
    source: str,
    registry: Registry,
    *,
    task: str | None = None,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    json_valid: bool = False,
    tool_calls: bool = False,
    max_new_tokens: int = 256,
    rewards: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int = 1024,
    reporter: Reporter | None = None,
    **settings: str | None,
) -> Comparison:
    """Score all of `subjects` on the held-out examples in `source`, and keep the scores of adapters as `task`.

    source     a file or Hub dataset, as `data.test` of a recipe, or one of pairs (chosen, rejected), whose scores are
               preference accuracy and margin; `settings` are format, template, prompt and answer,
               as in [data]; what is not given is as in the recipe of the first adapter
    choices    answers of which the most likely is the adapter's: accuracy
    regex, json_valid
               what answers, of at most `max_new_tokens` tokens, are checked for once they are written
    tool_calls for the calls in them, read as the server reads them, beside the reference's: form, tools, arguments
    rewards    a recipe whose [reward] says what written answers are worth; of adapters that were trained by rewards
               those of the first are scored without being asked for
    Mistakes raise before the base is loaded: NotFound, BadData, BadRecipe, InputError.
    """
    place = find_data(source)
    check_data_settings(settings)
    from adapterhub_local.base.chat_template import stop_tokens
    from adapterhub_local.base.load import compute_dtype, load_base
    from adapterhub_local.data.dataset import Dataset, read_parts
    from adapterhub_local.evaluate.choices import with_choices
    from adapterhub_local.evaluate.evaluate import Checks, adapted, data_settings, entry, read_tests, score
    from adapterhub_local.evaluate.reward_code import check_allowed
    from adapterhub_local.evaluate.rewards import declared, own_rewards, recipe_rewards
    from adapterhub_local.evaluate.tool_calls import offers_of
    from adapterhub_local.evaluate.written import read_pattern
    from adapterhub_local.rows.examples import settings_of
    from adapterhub_local.rows.judged import tokenise_judged

    pattern = read_pattern(regex) if regex is not None else None
    asked_for = recipe_rewards(Path(rewards)) if rewards is not None else None
    reward = asked_for or own_rewards(subjects.adapters)
    if asked_for:
        check_allowed(asked_for)
    elif reward and reward.python is not None and not allows_code():
        (reporter or Quiet()).note(
            "not scored: the reward, which is Python code kept with the version. Read it, then add --allow-code"
        )
        reward = None
    data = data_settings(subjects.adapters, **settings)
    max_length = subjects.info.within(max_length)
    parts = read_parts([place], "test", data, limit, ANY)
    dataset = Dataset([], [chat for part in parts for chat in part.chats], [part.record for part in parts], [])
    base = load_base(subjects.info, dtype=compute_dtype())
    if are_pairs := any(chat.rejected is not None for chat in dataset.test):
        if choices is not None or pattern is not None or json_valid or tool_calls or asked_for:
            raise InputError(f"{source} has pairs of answers, which are scored by themselves: leave out the checks")
        stops = stop_tokens(base.info.folder, base.tokenizer)
        tests = tokenise_judged(dataset.test, base.tokenizer, data, PAIRS, stops=stops, max_length=max_length)
    else:
        tests = read_tests(base, dataset.test, data, max_length)
    asked: tuple[Any, Any] = ((), ())
    if choices is not None:
        stops = stop_tokens(base.info.folder, base.tokenizer)
        asked = with_choices(dataset.test, list(choices), base.tokenizer, tests.template, settings_of(data), stops)
    offers = offers_of(tests.chats, base.tokenizer, settings_of(data)) if tool_calls else ()
    checks = Checks(*asked, pattern, json_valid, offers, max_new_tokens, reward)
    task = task or Path(source).name.partition(".")[0]
    scores: dict[str, AnyScore] = {}
    for text, version in subjects.versions.items():
        with _counting(reporter, text) as progress:
            if are_pairs:
                with adapted(base, version.path if version else None) as model:
                    scores[text] = evaluate_judged(model, tests.items, batch_size, progress)  # type: ignore[arg-type]
            else:
                scores[text] = score(base, version, tests.examples, batch_size, progress, checks)
    done = Comparison(subjects, task, scores, {})
    for text in subjects.references:
        ours = {"adapter": scores[text]} | {
            "base" if subjects.versions[other] is None else subjects.shown(other): scores[other]
            for other in subjects.compared
        }
        done.kept[text] = entry(
            ours, dataset.test_digest, template=tests.template, limit=limit,
            choices=None if choices is None else ",".join(choices), regex=regex,
            max_new_tokens=max_new_tokens if checks.need_text else None,
            rewards=declared(reward) if reward and not are_pairs else None,
            compute="bfloat16" if str(base.model.dtype) == "torch.bfloat16" else None,
        )  # fmt: skip
        if why := keep(registry, subjects.versions[text], task, done.kept[text]):
            done.not_kept[text] = why
    return done


def find_data(source: str) -> Source:
    """The file or Hub dataset that `source` names. Raises NotFound if it is a file that is not there."""
    place = read_source(source, Path())
    if isinstance(place, Path) and (wrong := local_problem(place)):
        raise NotFound(wrong.replace("no file", "no data file"))
    return place


def keep(registry: Registry, version: Version | None, task: str, scores: Mapping[str, Any]) -> str | None:
    """Keep scores with a version; why not, where nothing can be written: they are shown all the same."""
    if version is None:
        return None
    try:
        registry.add_evaluation(version, task, dict(scores))
    except (OSError, QhubError) as error:
        return str(error)
    return None


def _counting(reporter: Reporter | None, text: str) -> AbstractContextManager[Counting]:
    return (reporter or Quiet()).counting(f"scoring {text}")


def _one_base(versions: Mapping[str, Version | None], home: Home) -> BaseInfo:

    bases = {find_base(text, home) if version is None else base_of(version, home) for text, version in versions.items()}
    if len({base.fingerprint for base in bases}) > 1:
        raise Incompatible("these are for several bases: score those of one base at a time")
    return bases.pop()

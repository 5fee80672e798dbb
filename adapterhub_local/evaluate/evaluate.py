"""Score a base or a registered version on a file of held-out chats, and keep the result with the version."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_local.base.chat_template import stop_tokens
from adapterhub_local.base.load import LoadedBase, put_on
from adapterhub_local.base.model import CausalModel
from adapterhub_local.data.chat import Chat
from adapterhub_local.errors import InputError
from adapterhub_local.evaluate.choices import choose
from adapterhub_local.evaluate.metrics import REWARD, Score, evaluate
from adapterhub_local.evaluate.preferences import PreferenceScore
from adapterhub_local.evaluate.rewards import answer_worth, worth
from adapterhub_local.evaluate.tool_calls import Offer, call_hits
from adapterhub_local.evaluate.written import ends_of, is_json, matches, write_ids
from adapterhub_local.progress import Counting
from adapterhub_local.recipe.reward import Reward
from adapterhub_local.recipe.schema import MAX_NEW_TOKENS, Data
from adapterhub_local.registry import Version
from adapterhub_local.rows.examples import Example, Tokenised, scored_on, settings_of, tokenise_all
from adapterhub_local.rows.token_rows import use_token_rows


@dataclass(frozen=True)
class Checks:
    """What is asked beside loss and exact match; all for the same examples, in the same order."""

    questions: Sequence[Sequence[Example]] = ()  # each chat with every choice
    right: Sequence[int] = ()
    pattern: re.Pattern[str] | None = None
    wants_json: bool = False
    offers: Sequence[Offer | None] = ()  # the tools of each example, where calls are scored
    max_new_tokens: int = MAX_NEW_TOKENS
    reward: Reward | None = None  # what answers of at most its `max_tokens` are rewarded for

    @property
    def need_text(self) -> bool:
        """Whether answers of `max_new_tokens` are looked at."""
        return self.pattern is not None or self.wants_json or bool(self.offers)


def data_settings(versions: Sequence[Version], **given: str | None) -> Data:
    """How to read held-out examples: as the options say, else as the recipe of the first adapter read its own."""
    recipes = [version.lineage.get("recipe") or {} for version in versions]
    resolved = (recipe.get("resolved") or {} for recipe in recipes)
    known: dict[str, Any] = next((tables["data"] for tables in resolved if tables.get("data")), {})
    written = ("template_args", "chat_template", "system_role", "control_tokens", "left_out", "date", "roles")
    names: tuple[str, ...] = ("template", "loss_on", *written)
    names += () if given.get("format") else ("prompt", "answer", "system", "columns", "labels")
    settings = {name: known[name] for name in names if known.get(name) is not None}
    data = Data(train=(), **{**settings, **{name: value for name, value in given.items() if value is not None}})
    if (data.prompt is None) != (data.answer is None):
        raise InputError("--prompt and --answer need each other: an example is made of both")
    return data


def read_tests(base: LoadedBase, chats: Sequence[Chat], data: Data, max_length: int) -> Tokenised:
    """Held-out chats as tokens; one that is longer than `max_length` tokens is an error."""
    return tokenise_all(
        chats, base.tokenizer, max_length, loss_on=scored_on(data), template=data.template,
        settings=settings_of(data), stops=stop_tokens(base.info.folder, base.tokenizer), left_out=data.left_out,
    )  # fmt: skip


def score(
    base: LoadedBase,
    version: Version | None,
    tests: Sequence[Example],
    batch_size: int,
    progress: Counting | None = None,
    checks: Checks | None = None,
) -> Score:
    """Score the base, or the base with a version's adapter on it, applied by plain PEFT."""
    if version is None:
        return _score(base, base.model, tests, batch_size, progress, checks)
    return score_folder(base, version.path, tests, batch_size, progress, checks)


def score_folder(
    base: LoadedBase,
    folder: Path,
    tests: Sequence[Example],
    batch_size: int,
    progress: Counting | None = None,
    checks: Checks | None = None,
) -> Score:
    """Score the base with the adapter in a PEFT folder on it."""
    with adapted(base, folder) as model:
        return _score(base, model, tests, batch_size, progress, checks)


@contextmanager
def adapted(base: LoadedBase, folder: Path | None) -> Iterator[CausalModel]:
    """The base's model with the adapter in a PEFT folder on it, for as long as the block; without one as it is."""
    if folder is None:
        yield base.model
        return
    model = put_on(base.model, folder)
    use_token_rows(model)
    try:
        yield model
    finally:
        model.unload()


def _score(
    base: LoadedBase,
    model: CausalModel,
    tests: Sequence[Example],
    batch_size: int,
    progress: Counting | None,
    checks: Checks | None,
) -> Score:
    result = evaluate(model, tests, batch_size, progress)
    return checked(result, model, base.tokenizer, tests, checks, batch_size, progress) if checks else result


def checked(
    result: Score,
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[Example],
    checks: Checks,
    batch_size: int,
    progress: Counting | None = None,
) -> Score:
    """A score with what else is asked of the same examples. model: in evaluation mode."""
    hits = dict(result.hits)
    if checks.questions:
        chosen = choose(model, checks.questions, progress)
        hits["accuracy"] = tuple(ours == right for ours, right in zip(chosen, checks.right, strict=True))
    means = dict(result.means)
    if checks.need_text or checks.reward is not None:
        sizes = [checks.max_new_tokens] if checks.need_text else []
        sizes += [checks.reward.max_tokens] if checks.reward is not None else []
        written = write_ids(model, tokenizer, tests, max(sizes), batch_size, progress)
        wanted = [list(example.ids[slice(*example.spans[-1])]) for example in tests]
        if checks.reward is not None:
            rules, most, ends = worth(checks.reward), checks.reward.max_tokens, ends_of(model, tokenizer)
            prompts = [example.ids[: example.spans[-1][0]] for example in tests]
            means[REWARD] = tuple(
                answer_worth(rules, tokenizer, ours[:most], theirs, ends, prompt)
                for ours, theirs, prompt in zip(written, wanted, prompts, strict=True)
            )
        if checks.need_text:
            hits |= _looked_at(checks, tokenizer, [ids[: checks.max_new_tokens] for ids in written], wanted)
    return replace(result, hits=hits, means=means)


def _looked_at(
    checks: Checks, tokenizer: PreTrainedTokenizerBase, written: list[list[int]], wanted: list[list[int]]
) -> dict[str, tuple[bool, ...]]:
    """Shares of written answers, beside those of the data."""
    texts, references = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (written, wanted))
    hits: dict[str, tuple[bool, ...]] = {}
    if checks.pattern is not None:
        pairs = zip(texts, references, strict=True)
        hits["regex_match"] = tuple(matches(checks.pattern, ours, reference) for ours, reference in pairs)
    if checks.wants_json:
        hits["json_valid"] = tuple(is_json(text) for text in texts)
    if checks.offers:
        hits |= call_hits(texts, references, checks.offers)
    return hits


def entry(scores: Mapping[str, Any], digest: str | None, **how: Any) -> dict[str, Any]:
    """The form in which a task's scores are kept: the adapter's, those it was compared with, each with how much the
    adapter differs from it, and `how` they were asked for. All scores are of one kind, such as Score."""
    kept: dict[str, Any] = {}
    for who, score in scores.items():
        kept[who] = score.to_json_with_intervals()
        if who != "adapter" and "adapter" in scores:
            kept[who]["difference"] = scores["adapter"].differences(score)
            if isinstance(score, PreferenceScore) and score.margins:
                kept[who]["win_rate"] = scores["adapter"].wins(score)
    asked = {name: value for name, value in how.items() if value is not None}
    return kept | {"data": digest, **({"how": asked} if asked else {})}

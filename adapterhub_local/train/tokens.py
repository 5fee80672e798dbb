"""The tokens that a recipe trains rows of the embeddings for: which they are, and whether the data has them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.model import Modules
from adapterhub_local.counts import counted
from adapterhub_local.errors import Corrupt, InputError
from adapterhub_local.recipe import Recipe
from adapterhub_local.rows.example import Item, parts_of

# tokens that a base keeps for others to give a meaning to, as Llama 3, Gemma, Mistral, Phi, Qwen and T5 call them
RESERVED = re.compile(r"reserved|unused|placeholder|dummy|extra_(id|token)|<SPECIAL_\d|\[control_", re.IGNORECASE)
SHOWN = 4


def load_tokenizer(info: BaseInfo) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, without its model. Raises Corrupt."""
    try:
        return AutoTokenizer.from_pretrained(info.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Corrupt(f"base '{info.name}' has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from None


def embedding_rows(info: BaseInfo) -> int | None:
    """How many tokens the base has an embedding of, by its config; None if that does not say."""
    config = json.loads((info.folder / "config.json").read_bytes())
    rows = (config.get("text_config") or config).get("vocab_size")
    return rows if type(rows) is int else None


def ids_of(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: int | None, base: str) -> dict[str, int]:
    """Token -> its id in the tokenizer of `base`, whose embeddings have `rows`, None if that is not known.

    A token is given as the vocabulary spells it, or as text that is this one token. Raises InputError for text of
    several tokens, for a token without a row, and for two that are the same.
    """
    vocabulary = tokenizer.get_vocab()
    found: dict[str, int] = {}
    for token in tokens:
        number = vocabulary.get(token)
        if number is None:
            parts = tokenizer.encode(token, add_special_tokens=False)
            if len(parts) != 1:
                raise InputError(
                    f"'{token}' is {counted(len(parts), 'token')} of base '{base}', not one: {_way(vocabulary, rows)}"
                )
            number = parts[0]
        if rows is not None and number >= rows:
            raise InputError(f"'{token}' (id {number}) has no row in the embeddings of base '{base}' ({rows})")
        if number in found.values():
            other = next(each for each, known in found.items() if known == number)
            raise InputError(f"'{token}' and '{other}' are the same token of base '{base}': leave one out")
        found[token] = number
    return found


def _way(vocabulary: Mapping[str, int], rows: int | None) -> str:
    """What to do about a token that the base does not have."""
    reserved = sorted((token for token in vocabulary if RESERVED.search(token)), key=vocabulary.__getitem__)
    shown = ", ".join(f"'{token}'" for token in reserved[:SHOWN])
    if reserved:
        more = f" and {len(reserved) - SHOWN} more" if len(reserved) > SHOWN else ""
        return f"write one that the base keeps for such use in its place, in the data too ({shown}{more})"
    spare = (rows or 0) - 1 - max(vocabulary.values())
    which = (
        "belongs to no token, and no text becomes it" if spare == 1 else "belong to no token, and no text becomes one"
    )
    is_spare = f" ({counted(spare, 'row')} of its embeddings {which})" if spare > 0 else ""
    return f"the tokenizer is the shared base's, which keeps no tokens in reserve{is_spare}. Name a token that it has"


def check_seen(recipe: Recipe, ids: Mapping[str, int], items: Iterable[Item]) -> None:
    """Raise InputError for a token that no example has: its row would learn nothing but to be unlikely."""
    if recipe.train.objective == "grpo":  # whose answers are yet to be drawn
        return
    missing = dict(ids)
    for part in parts_of(list(items)):
        for token in [token for token, number in missing.items() if number in part.ids]:
            del missing[token]
        if not missing:
            return
    first = next(iter(missing))
    more = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
    raise InputError(
        f"{recipe.place('adapter.train_tokens')}: no example has '{first}' as a token{more}: leave it out, or have "
        "texts that spell control tokens read as these with data.control_tokens = 'tokens'"
    )


def trained_tokens(model: Modules) -> tuple[int, ...]:
    """The ids of the tokens that a PEFT model has rows of its own for."""
    tables = (getattr(layer, "token_indices", None) or {} for layer in model.modules())
    return tuple(
        sorted({each for table in tables if isinstance(table, dict) for ids in table.values() for each in ids})
    )

"""Where a base's tokens become vectors and its states logits, and which rows of that an adapter may have of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_local.base.bases import BaseInfo
from adapterhub_local.base.model import BaseModel
from adapterhub_local.base.shapes import skeleton
from adapterhub_local.errors import Incompatible
from adapterhub_local.lora.adapter import AdapterFile
from adapterhub_local.lora.names import fitted


@dataclass(frozen=True)
class Vocabulary:
    """The modules of a model that have a row (hidden,) for every token: input embeddings, and the output head.

    `is_tied`: the head's rows are those of the embeddings. `head_has_bias`: it adds a number to each logit.
    """

    embeddings: str
    head: str | None
    is_tied: bool
    rows: int
    hidden: int
    head_has_bias: bool

    @classmethod
    def of(cls, model: BaseModel) -> "Vocabulary":
        """That of a causal language model whose layers nothing is wrapped around."""
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        rows, hidden = embeddings.weight.shape
        return cls(
            names[id(embeddings)],
            None if head is None else names[id(head)],
            head is not None and head.weight is embeddings.weight,
            rows,
            hidden,
            getattr(head, "bias", None) is not None,
        )

    @classmethod
    def of_base(cls, base: BaseInfo) -> "Vocabulary":
        """That of a base, without loading its weights."""
        return cls.of(skeleton(base))

    def of_head(self, tokens: Mapping[str, Any]) -> str | None:
        """Whose rows the head has where an adapter has rows of the modules `tokens`: its own, or the embeddings'."""
        if self.head in tokens:
            return self.head
        return self.embeddings if self.is_tied and self.embeddings in tokens else None


def fit_rows(adapter: AdapterFile, vocabulary: Vocabulary, base: str) -> AdapterFile:
    """The adapter with the base's names of what it has rows of. `base` is the base's name, for messages.

    Raises Incompatible for rows of anything else, or of another size, and for a head that PEFT computes otherwise.
    """
    if not adapter.tokens:
        return adapter
    known = [name for name in (vocabulary.embeddings, vocabulary.head) if name is not None]
    names = fitted(tuple(adapter.tokens), known)
    for module, rows in adapter.tokens.items():
        if names[module] not in known or list(names.values()).count(names[module]) > 1:
            raise Incompatible(
                f"{adapter.path} has rows of {module}, and base '{base}' has a row for each token in "
                f"{' and '.join(known)} only"
            )
        if rows.hidden != vocabulary.hidden:
            raise Incompatible(
                f"{adapter.path}: the rows of {module} have {rows.hidden} numbers, those of base '{base}' "
                f"{vocabulary.hidden}"
            )
        if max(rows.ids) >= vocabulary.rows:
            raise Incompatible(
                f"{adapter.path} has a row for token {max(rows.ids)} in {module}, and base '{base}' has "
                f"{vocabulary.rows:,}: tokens that were added to a model need that model as their base"
            )
    adapter = adapter.with_rows_of(names)
    if vocabulary.of_head(adapter.tokens) is None:
        return adapter
    head = vocabulary.head
    own = [rows.ids for rows in adapter.tokens.values()]
    if vocabulary.is_tied and len(own) == 2 and own[0] == own[1]:
        raise Incompatible(
            f"{adapter.path} has rows of embeddings and head for the same tokens, and base '{base}' has one matrix for "
            "both: PEFT reads those of the embeddings only. Train it with rows of the embeddings alone"
        )
    if head in adapter.shapes:
        raise Incompatible(
            f"{adapter.path} has factors and rows of {head} of base '{base}' at once, which PEFT cannot compute: train "
            "it without one of them"
        )
    if vocabulary.head_has_bias:
        raise Incompatible(
            f"{adapter.path} has rows of {head} of base '{base}', whose bias PEFT leaves out with them: train it "
            "with rows of the embeddings alone"
        )
    return adapter

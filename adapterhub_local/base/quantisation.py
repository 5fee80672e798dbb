"""The ways in which a base holds the weights of its linear layers: all that one differs in from another. No torch.

Quantising, reading checkpoints that are quantised already, loading, planning, cards and pages take what they need from
a `Quantisation`; kernels take its 16 values as they lie in the files. Another way is another row of `KINDS`, if
bitsandbytes knows it: it makes the codes, and numbers of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Quantisation:
    """4 bits a weight that choose one of the 16 values of `table`, times the absmax of the weight's block.

    codes: what bitsandbytes calls them. block: weights with one absmax, which takes 8 bits itself. nested: so many of
    these with one in float32 (double quantisation, https://arxiv.org/abs/2305.14314); None: each absmax is in float32.
    """

    codes: str
    table: tuple[float, ...]
    block: int = 64
    nested: int | None = 256

    @property
    def name(self) -> str:
        """In records and lineages."""
        return self.codes if self.nested else f"{self.codes}-single"

    @property
    def title(self) -> str:
        """For people."""
        return self.codes.upper()

    @property
    def state(self) -> str:
        """What the file calls the JSON beside a weight, behind its name and a dot: shape, block sizes, dtype."""
        return f"quant_state.bitsandbytes__{self.codes}"

    @property
    def constants(self) -> tuple[str, ...]:
        """The constants that grow with the weight, as the file calls them."""
        return ("absmax", "nested_absmax") if self.nested else ("absmax",)

    @property
    def parts(self) -> tuple[str, ...]:
        """All that a file has beside a weight."""
        tables = ("nested_quant_map", "quant_map") if self.nested else ("quant_map",)
        return (*self.constants, *tables, self.state)

    @property
    def bits(self) -> float:
        """Of a weight, its constants included: 4.127, or 4.5 without double quantisation."""
        return 4 + (8 / self.block + 32 / (self.block * self.nested) if self.nested else 32 / self.block)

    @property
    def unnested_bits(self) -> float:
        """What a weight takes more where the constants of blocks are held in float32 (base/held.py)."""
        return 24 / self.block if self.nested else 0.0

    def config(self, skipped: list[str], compute: str) -> dict[str, Any]:
        """The `quantization_config` of config.json by which transformers knows a folder that is quantised so.

        skipped: the linear layers that are not; compute: the dtype of the others.
        """
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.codes,
            "bnb_4bit_use_double_quant": self.nested is not None,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }


# quantiles of the normal distribution, as bitsandbytes has them
NF4 = Quantisation(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
# a sign, two bits of exponent and one of mantissa, in the order of bitsandbytes' bits
_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Quantisation("fp4", tuple(sign * value / 12 for sign in (1, -1) for value in _MAGNITUDES))
KINDS = {kind.name: kind for one in (NF4, FP4) for kind in (one, replace(one, nested=None))}
OURS = NF4  # what a model in 16 bits is quantised to
# how bitsandbytes stores the constants of a quantised `x.weight`, beside it
_PARTS = sorted({part for kind in KINDS.values() for part in kind.parts})
CONSTANT = re.compile(rf"(.+)\.(?:{'|'.join(map(re.escape, _PARTS))})")
# how the name of one tensor of each quantised layer ends
MARKS = tuple(sorted({f".weight.{kind.state}" for kind in KINDS.values()}))


def kind_called(name: object) -> Quantisation:
    """The kind that a record or a lineage names; ours where none is named."""
    return KINDS.get(str(name), OURS)


def find_kind(method: Mapping[str, Any]) -> tuple[Quantisation | None, list[str]]:
    """The kind that a `quantization_config` of bitsandbytes in 4 bits describes, and what of it no base holds.

    None of another library's, or of 8 bits.
    """
    if method.get("quant_method") != "bitsandbytes" or not method.get("load_in_4bit"):
        return None, []
    defaults = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8"}
    codes, is_double, storage = (method.get(key, default) for key, default in defaults.items())
    kinds = {(each.codes, each.nested is not None): each for each in KINDS.values()}
    kind = kinds.get((str(codes), bool(is_double)))
    wrong = {f"{str(codes).upper()} codes": kind is None, "storage other than uint8": storage != "uint8"}
    return kind, [what for what, is_wrong in wrong.items() if is_wrong]

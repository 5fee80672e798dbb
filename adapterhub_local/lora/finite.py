"""Whether every number of a safetensors file is finite, seen from the bits: torch is not needed.

A floating-point number is NaN or infinite if all bits of its exponent are set (IEEE 754; bfloat16 likewise).
"""

from pathlib import Path

import numpy as np

from adapterhub_local.errors import BadFile
from adapterhub_local.lora.header import read_header

# dtype as safetensors spells it -> the integers its bits are read as, and the bits of the exponent
_EXPONENT = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10),
             "BF16": ("<u2", 0xFF << 7), "F8_E5M2": ("u1", 0x1F << 2), "F8_E4M3": ("u1", 0x7F)}  # fmt: skip
_CHUNK = 1 << 22  # bytes looked at at once, a multiple of every size


def check_finite(path: Path) -> None:
    """Raises BadFile naming the first tensor that has NaN or infinity in it, and what `read_header` raises."""
    header = read_header(path)
    start = path.stat().st_size - max((entry.end for entry in header.tensors.values()), default=0)
    with open(path, "rb") as file:
        for name, entry in header.tensors.items():
            if entry.dtype not in _EXPONENT:
                continue
            integers, mask = _EXPONENT[entry.dtype]
            file.seek(start + entry.start)
            left = entry.end - entry.start
            while left:
                bits = np.frombuffer(file.read(min(left, _CHUNK)), dtype=integers)
                if not bits.size:
                    raise BadFile(f"{path} became shorter while it was read: try again")
                if ((bits & bits.dtype.type(mask)) == mask).any():
                    raise BadFile(f"{path} has NaN or infinity in {name}: it was not trained soundly")
                left -= bits.nbytes

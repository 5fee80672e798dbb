"""Loading a base: our quantised file beside quantising the 16-bit model on the fly, as transformers does.

    python -m benchmarks.base

Each side is a process of its own. The 16-bit model is the demo base's shape with random weights, saved here first.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.machine import child, machine, peak_memory_mb


def ours(folder: Path) -> dict[str, float]:
    from adapterhub_local.base.bases import read_record
    from adapterhub_local.base.load import import_bitsandbytes, load_base

    import_bitsandbytes()
    info = read_record(folder / "bases" / "bench")
    before = peak_memory_mb()
    start = time.perf_counter()
    load_base(info)
    return {"seconds": round(time.perf_counter() - start, 2), "added_memory_mb": round(peak_memory_mb() - before, 1)}


def baseline(folder: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from adapterhub_local.base.load import import_bitsandbytes

    import_bitsandbytes()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    before = peak_memory_mb()
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(folder / "model")
    return {"seconds": round(time.perf_counter() - start, 2), "added_memory_mb": round(peak_memory_mb() - before, 1)}


def prepare(folder: Path) -> dict[str, float]:
    """Save a random model of the demo base's shape, then add it as a base."""
    from adapterhub_local.base.add import add_base
    from adapterhub_local.settings import home
    from tests.tiny import save_tiny_model

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    save_tiny_model(folder / "model", vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape)
    start = time.perf_counter()
    add_base("bench", folder / "model", home(folder))
    return {"seconds": round(time.perf_counter() - start, 2), "peak_memory_mb": peak_memory_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "baseline", "prepare"))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"ours": ours, "baseline": baseline, "prepare": prepare}[arguments.side]
        print(json.dumps(side(arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        added, quick, slow = (
            child("-m", "benchmarks.base", "--side", side, "--folder", folder)
            for side in ("prepare", "ours", "baseline")
        )
    print(
        json.dumps(
            {
                "benchmark": "base",
                "machine": machine(),
                "workload": "135M parameters (SmolLM2 shape, random), NF4 with double quantisation",
                "add_once": added,
                "ours": quick,
                "baseline": {"name": "transformers from_pretrained with BitsAndBytesConfig", **slow},
                "ratio_seconds": round(slow["seconds"] / quick["seconds"], 1),
            }
        )
    )


if __name__ == "__main__":
    from adapterhub_local.noise import hush

    hush()
    main()

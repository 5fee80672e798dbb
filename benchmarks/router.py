"""How well a router finds the adapter of a prompt: five tasks, held-out prompts, the same in other words, and neither.

    python -m benchmarks.router              # the base in $QHUB_HOME, whose embeddings are all that is needed
    python -m benchmarks.router --base NAME

The adapters are random, of rank 1: which of them a prompt is for does not depend on how well they answer it. The two
kinds of features that a router could have are compared, then the router itself is made and measured as `qhub router
train` does it. Prints Markdown tables; the last line is JSON.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.router_tasks import OTHER, reworded, write_tasks

BUCKETS = 1 << 15
REWORDED = 100  # prompts of each task that are asked in other words


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure routing on five tasks.")
    parser.add_argument("--base", help="a base of $QHUB_HOME; the only one, if not given")
    arguments = parser.parse_args()

    from adapterhub_local import settings
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.registry import Registry
    from adapterhub_local.router.features import embeddings_of
    from adapterhub_local.router.files import read_router
    from adapterhub_local.router.router import Router
    from adapterhub_local.router.train import train_router

    info = choose_base(arguments.base, settings.home(), "the benchmark")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        (home / "bases").mkdir(parents=True)
        (home / "bases" / info.name).symlink_to(info.folder)
        files = write_tasks(Path(folder))
        registry = Registry(home)
        for task in files:
            publish(registry, task, info, files[task])
        start = time.perf_counter()
        done = train_router(registry, "router", list(files), data=files)
        seconds = time.perf_counter() - start
        embeddings = embeddings_of(info)
        router = Router(read_router(done.version.path, done.version), embeddings)
        report(router, done, embeddings, files, seconds)


def report(router: Any, done: Any, embeddings: Any, files: dict[str, list[Path]], seconds: float) -> None:
    """Measure what training did not, and print all of it."""
    other = [router.choose([text]).reference is None for text in OTHER]
    results: dict[str, Any] = {
        "accuracy": done.measured.accuracy,
        "calibration_error": done.measured.calibration_error,
        "milliseconds": done.milliseconds,
        "train_seconds": seconds,
        "other_to_base": sum(other) / len(other),
        "tasks": done.measured.tasks(),
    }
    print("| task | held-out prompts | right | in other words: right | wrong adapter | unseen task to the base |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in results["tasks"]:
        tests = prompts(files[row["route"]][1])[:REWORDED]
        chosen = [router.choose([text]).reference for test in tests for text in reworded(row["route"], test)]
        row["reworded"] = sum(str(one) == row["route"] for one in chosen) / len(chosen)
        row["reworded_wrong"] = sum(one is not None and str(one) != row["route"] for one in chosen) / len(chosen)
        shares = [f"{row[name]:.1%}" for name in ("accuracy", "reworded", "reworded_wrong", "unseen")]
        print(f"| {row['route']} | {row['rows']} | {' | '.join(shares)} |")
    print(f"\n{done.measured.accuracy:.2%} right of {done.measured.rows}, calibration error "
          f"{done.measured.calibration_error:.4f}, {done.milliseconds:.2f} ms a request, learnt in {seconds:.1f} s; "
          f"{results['other_to_base']:.0%} of {len(other)} other questions to the base\n")  # fmt: skip
    results["features"] = compare_features(embeddings, files)
    print("| features | held-out prompts right | in other words right | ms a prompt |")
    print("| --- | --- | --- | --- |")
    for name, row in results["features"].items():
        print(f"| {name} | {row['accuracy']:.2%} | {row['reworded']:.1%} | {row['milliseconds']:.2f} |")
    print(json.dumps({"machine": machine(), **results}))


def publish(registry: Any, task: str, info: Any, files: list[Path]) -> None:
    """A random adapter of rank 1 for the base, whose lineage names the files it would be trained and scored on."""
    import torch

    from adapterhub_local.base.shapes import linear_shapes
    from adapterhub_local.durable import digest_file, staging
    from adapterhub_local.lora.config import AdapterConfig
    from adapterhub_local.lora.write import tensor_name, write_adapter

    module, (rows, columns) = next(iter(linear_shapes(info).items()))
    tensors = {tensor_name(module, "A"): torch.randn(1, columns), tensor_name(module, "B"): torch.randn(rows, 1)}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    config = AdapterConfig(rank=1, alpha=1, target_modules=(module,))
    data = [
        {"role": role, "file": path.name, "digest": digest_file(path), "rows": len(prompts(path))}
        for role, path in zip(("train", "test"), files, strict=True)
    ]
    with staging(registry.home.tmp) as folder:
        written = write_adapter(folder, config, shapes, tensors.items(), info.fingerprint)
        registry.publish(task, written, {"kind": "train", "task": task, "base": info.lineage(), "data": data})


def prompts(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["messages"][0]["content"] for line in file]


def compare_features(embeddings: Any, files: dict[str, list[Path]]) -> dict[str, dict[str, float]]:
    """Both kinds of features under the same linear classifier, without threshold and limits."""
    import torch

    from adapterhub_local.router.classifier import _regress
    from adapterhub_local.router.measure import stacked

    def hashed(texts: list[str]) -> torch.Tensor:
        """Tokens and pairs of tokens in buckets, by the logarithm of how often, of length 1."""
        rows = torch.zeros(len(texts), BUCKETS)
        for row, text in zip(rows, texts, strict=True):
            ids = list(embeddings.encode(text))
            pairs = [one * 1_000_003 ^ other for one, other in itertools.pairwise(ids)]
            for key in (*ids, *pairs):
                row[key * 2_654_435_761 % BUCKETS] += 1
        return torch.nn.functional.normalize(rows.log1p(), dim=1)

    found = {}
    for name, features in (("mean token embedding", embeddings.mean), ("hashed tokens and pairs", hashed)):
        train = [features(prompts(paths[0])[:1000]) for paths in files.values()]
        start = time.perf_counter()
        test = [features(prompts(paths[1])) for paths in files.values()]
        took = time.perf_counter() - start
        matrix, labels = stacked(train)
        mean, deviation = matrix.mean(0), matrix.std(0).clamp_min(1e-6)
        if features is hashed:  # standardising makes rare buckets as large as all others
            mean, deviation = torch.zeros_like(mean), torch.full_like(deviation, deviation.mean())
        weight, bias = _regress((matrix - mean) / deviation, labels, len(files))

        def right(rows: torch.Tensor, task: int, mean: Any = mean, deviation: Any = deviation, weight: Any = weight,
                  bias: Any = bias) -> int:  # fmt: skip
            return int((((rows - mean) / deviation @ weight.T + bias).argmax(1) == task).sum())

        count = sum(len(part) for part in test)
        others = [
            features([text for one in prompts(paths[1])[:REWORDED] for text in reworded(task, one)])
            for task, paths in files.items()
        ]
        found[name] = {
            "accuracy": sum(right(part, task) for task, part in enumerate(test)) / count,
            "reworded": sum(right(part, task) for task, part in enumerate(others)) / sum(map(len, others)),
            "milliseconds": 1000 * took / count,
        }
    return found


if __name__ == "__main__":
    main()

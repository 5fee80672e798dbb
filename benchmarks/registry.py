"""Publishes per second with 1 and 8 writer processes, beside MLflow's model registry in a SQLite file, in one run.

    python benchmarks/registry.py [--mlflow FOLDER] [--kills 1000] [--versions 10000] [--folder DISK]

--mlflow names a folder that mlflow-skinny was installed into (pip install --target FOLDER mlflow-skinny sqlalchemy
alembic). Both register a version whose files are one 100 kB adapter and its config, all writers under one name;
MLflow's files are copied beside its database, as `log_model` does, without any flush. --kills kills a publishing
process so many times and counts what was lost. --versions times list, resolve and search in a home of so many.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapterhub_local.registry import Registry
from adapterhub_local.registry.fsck import fsck

SIZE = 100_000
HEADER = """
text = '{"w":{"dtype":"U8","shape":[100000],"data_offsets":[0,100000]}}'
header = len(text).to_bytes(8, "little") + text.encode()
"""
OURS = (
    HEADER
    + """
import json, os, sys, time
from adapterhub_local.registry import Registry
registry, index, count, start = Registry(), int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
registry.versions("none")
lineage = {"kind": "train", "base": {"fingerprint": "sha256:" + "0" * 64}, "recipe": {"train": {"seed": index}}}
time.sleep(max(0, start - time.time()))
seconds, numbers = [], []
for turn in range(count):
    data = os.urandom(100_000)
    files = {"adapter_model.safetensors": header + data, "adapter_config.json": b"{}"}
    begin = time.perf_counter()
    numbers.append(registry.publish("shared", files, {**lineage, "turn": turn}).number)
    seconds.append(time.perf_counter() - begin)
print(json.dumps({"numbers": numbers, "seconds": seconds, "end": time.time()}))
"""
)
MLFLOW = """
import json, logging, os, sys, time, uuid
sys.path.insert(0, os.environ["MLFLOW_SITE"])
logging.disable(logging.WARNING)
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
index, count, start, home = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), os.environ["QHUB_HOME"]
os.makedirs(home, exist_ok=True)
store = SqlAlchemyStore(f"sqlite:///{home}/mlflow.db")
if index < 0:
    store.create_registered_model("shared")
    sys.exit()
time.sleep(max(0, start - time.time()))
seconds, numbers, failures = [], [], []
for turn in range(count):
    data = os.urandom(100_000)
    begin = time.perf_counter()
    folder = f"{home}/artifacts/{uuid.uuid4().hex}"
    os.makedirs(folder)
    for name, content in (("adapter_model.safetensors", data), ("adapter_config.json", b"{}")):
        with open(f"{folder}/{name}", "wb") as file:
            file.write(content)
    try:
        numbers.append(int(store.create_model_version("shared", folder).version))
        seconds.append(time.perf_counter() - begin)
    except Exception as error:
        failures.append(type(error).__name__ + ": " + str(error).splitlines()[0][:100])
print(json.dumps({"numbers": numbers, "seconds": seconds, "end": time.time(), "failures": failures}))
"""
KILLED = (
    HEADER
    + """
import os, sys
from adapterhub_local.registry import Registry
registry = Registry()
for turn in range(1000000):
    files = {"adapter_model.safetensors": header + os.urandom(100_000), "adapter_config.json": b"{}"}
    version = registry.publish("shared", files, {"kind": "test", "turn": turn}, alias="newest")
    print(version.number, version.manifest_digest, flush=True)
"""
)


def run(code: str, writers: int, count: int, home: Path, environment: dict[str, str]) -> dict:
    """Rate and latencies of `writers` processes that publish `count` versions each, starting together."""
    start = time.time() + (8 if code is MLFLOW else 3)
    environment = {**os.environ, **environment, "QHUB_HOME": str(home)}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(index), str(count), str(start)], stdout=subprocess.PIPE, env=environment)
        for index in range(writers)
    ]
    results = [json.loads(process.communicate(timeout=600)[0]) for process in processes]
    numbers = sorted(number for result in results for number in result["numbers"])
    seconds = sorted(second for result in results for second in result["seconds"])
    failures = [failure for result in results for failure in result.get("failures", [])]
    elapsed = max(result["end"] for result in results) - start
    return {
        "writers": writers,
        "asked": writers * count,
        "registered": len(numbers),
        "per_second": round(len(numbers) / elapsed, 1),
        "p50_ms": round(1000 * statistics.median(seconds), 2) if seconds else None,
        "p99_ms": round(1000 * seconds[int(0.99 * (len(seconds) - 1))], 2) if seconds else None,
        "gapless": numbers == list(range(1, len(numbers) + 1)),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
    }


def compare(folder: Path, mlflow: Path | None, count: int) -> dict:
    """Both registries with 1 and 8 writers."""
    result: dict = {"ours": [], "mlflow": []}
    for writers in (1, 8):
        home = folder / f"ours-{writers}"
        Registry(home).publish("other", {"f": b"x"}, {})  # both databases exist before the clock starts
        result["ours"].append(run(OURS, writers, count, home, {}))
        result["ours"][-1]["fsck_clean"] = fsck(Registry(home)).is_clean
        if mlflow is not None:
            home, environment = folder / f"mlflow-{writers}", {"MLFLOW_SITE": str(mlflow)}
            subprocess.run(
                [sys.executable, "-c", MLFLOW, "-1", "0", "0"], check=True, timeout=120, capture_output=True,
                env={**os.environ, **environment, "QHUB_HOME": str(home)},
            )  # fmt: skip
            result["mlflow"].append(run(MLFLOW, writers, count, home, environment))
    if mlflow is None:
        result["mlflow"] = "not measured: name its folder with --mlflow"
    else:
        pairs = zip(result["ours"], result["mlflow"], strict=True)
        result["ratio"] = [round(ours["per_second"] / theirs["per_second"], 1) for ours, theirs in pairs]
    return result


def kill(folder: Path, times: int, seconds: float) -> dict:
    """Kill a publishing process at random moments: what was acknowledged must be there, whole."""
    home = folder / "killed"
    environment = {**os.environ, "QHUB_HOME": str(home)}
    rng = random.Random(0)
    lost = half = unclean = acknowledged = 0
    digests: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    for turn in range(times):
        process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        for line in lines:
            number, _, digest = line.strip().partition(" ")
            if len(digest) == 71:
                digests[int(number)] = digest
                acknowledged += 1
        rows = Registry(home).database.rows("SELECT number, manifest_digest FROM versions")
        there = {row["number"]: row["manifest_digest"] for row in rows}
        lost += sum(there.get(number) != digest for number, digest in digests.items())
        half += sorted(there) != list(range(1, len(there) + 1))
        # everything is checked now and then and at the end, the rest would take hours
        done = turn == times - 1 or time.monotonic() > deadline
        if turn % 100 == 99 or done:
            report = fsck(Registry(home))
            unclean += not report.is_clean
        if done:
            break
    left = sum(1 for _ in (home / "tmp").iterdir())
    return {
        "kills": turn + 1,
        "published": len(there),
        "acknowledged": acknowledged,
        "lost": lost,
        "gaps": half,
        "fsck_unclean": unclean,
        "unreferenced_blobs": report.num_unreferenced,
        "temporary_files": left,
    }


def many(folder: Path, count: int) -> dict:
    """Milliseconds of list, resolve and search in a home of `count` versions, of 100 names and of one name each."""
    from adapterhub_local.registry.catalog import Condition, find, search
    from adapterhub_local.registry.rows import insert_version, now
    from adapterhub_local.registry.version import File, Version

    result: dict = {"versions": count}
    for names in (100, count):
        registry = Registry(folder / f"many-{names}")
        with registry.database.writing() as db:  # rows as publish writes them, without the files
            for index in range(count):
                name, number = f"adapter-{index % names}", index // names + 1
                lineage = {
                    "kind": "train", "task": f"task-{index % 7}", "description": f"adapter {index} of a series",
                    "base": {"name": f"base-{index % 3}", "fingerprint": "sha256:" + "0" * 64},
                    "recipe": {"train": {"seed": index, "learning_rate": 1e-3, "optimizer": "adamw"}},
                    "metrics": {f"task-{index % 7}": {"adapter": {"exact_match": index / count, "loss": 1.0}}},
                }  # fmt: skip
                files = (File.of("adapter_model.safetensors", str(index).encode()),)
                text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
                insert_version(db, Version(name, number, now(), files, File.of("lineage.json", text), lineage))
        calls = {
            "list": lambda registry=registry: find(registry, limit=100),  # what `qhub list` shows
            "list_all_newest": lambda registry=registry: find(registry),
            "list_metric": lambda registry=registry: find(registry, conditions=[Condition.parse("exact_match>0.99")]),
            "resolve_name": lambda registry=registry: registry.resolve("adapter-42"),
            "resolve_version": lambda registry=registry: registry.resolve("adapter-42@1"),
            "search_rare": lambda registry=registry: search(registry, "4242"),
            "search_common": lambda registry=registry: search(registry, "series adamw"),
        }
        timed = {}
        for label, call in calls.items():
            seconds = []
            for _ in range(7):
                begin = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begin)
            timed[label] = round(1000 * statistics.median(seconds), 2)
        result[f"{names}_names_ms"] = timed
    return result


def main() -> None:
    """Measure what was asked for and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlflow", type=Path)
    parser.add_argument("--count", type=int, default=100, help="versions per writer")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="stop killing after so many")
    parser.add_argument("--versions", type=int, default=0)
    parser.add_argument("--skip-publish", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where the homes are made, a real disk; default: a temporary folder"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="registry-", dir=arguments.folder))
    document: dict = {
        "benchmark": "registry",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_average_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "workload": f"{SIZE} bytes of weights and a config a version, {arguments.count} versions a writer, one name",
    }
    try:
        if arguments.mlflow is not None:
            found = next(arguments.mlflow.glob("mlflow_skinny-*.dist-info"))
            document["versions"]["mlflow-skinny"] = found.name.split("-")[1].removesuffix(".dist")
        if not arguments.skip_publish:
            document["publish"] = compare(folder, arguments.mlflow, arguments.count)
        if arguments.kills:
            document["kill"] = kill(folder, arguments.kills, arguments.seconds)
        if arguments.versions:
            document["many"] = many(folder, arguments.versions)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()

"""How `qhub merge` and `qhub tune-merge` report what a merge made and lost."""

from collections.abc import Sequence
from typing import Any

from adapterhub_local.cli.output import echo, print_table
from adapterhub_local.counts import thinned
from adapterhub_local.merge.layers import Weight


def print_report(where: str, num_adapters: int, report: dict[str, Any]) -> None:
    """The report for people."""
    method = report["method"].replace("_", " ")
    echo(
        f"{where}: {method} of {num_adapters} adapters, rank {report['rank']}, "
        f"{report['num_modules']} modules, relative error {report['relative_error']:.1e}"
    )
    parameters = ", ".join(f"{name} {value}" for name, value in report.get("parameters", {}).items())
    rows = [
        ("error", f"{report['relative_error']:.2e} of the norm {report['norm']:.4g}, measured"),
        ("truncation", f"{report['truncation_error']:.2e}, predicted; exact rank {report['exact_rank']}"),
        ("storage", f"{report['rounding_error']:.2e}, {report['dtype']}, {report['num_parameters']:,} parameters"),
        ("energy", f"{report['retained_energy']:.4%} retained"),
        ("size", _size(report, num_adapters)),
    ]
    if parameters:
        rows.insert(0, ("parameters", parameters))
    for one in report.get("conversions", []):
        lost = f"rank {one['rank']}, relative error {one['relative_error']:.2e}, which the errors here do not count"
        rows.append(("converted", f"{one['parent']}: {one['method']} through {one['base']}, {lost}"))
    worst = max(report["modules"], key=lambda module: module["relative_error"])
    rows.append(("worst module", f"{worst['module']}, {worst['relative_error']:.2e}"))
    for entry in report["interference"]:
        cosine = "no deltas" if entry["cosine"] is None else f"cosine {entry['cosine']:+.4f}"
        rows.append(("interference", f"{entry['pair'][0]} and {entry['pair'][1]}: {cosine}"))
    rows.append(("served by", _server(report)))
    print_table(("loss", ""), rows)


def _size(report: dict[str, Any], num_adapters: int) -> str:
    if _idle(report) == num_adapters:
        return "0: no adapter changes anything"
    return f"{report['kept']:.1%} of the adapters' weighted norms; what is missing cancels out"


def _idle(report: dict[str, Any]) -> int:
    """How many of the adapters were not trained."""
    return sum("changes nothing" in note for note in report.get("notes", ()))


def _server(report: dict[str, Any]) -> str:
    if report.get("compact"):
        return "PEFT and qhub; vLLM ignores ranks that differ by module, merge without --compact for it"
    if report.get("num_tokens"):
        return "PEFT and qhub; vLLM reads no rows of embeddings"
    if report["max_lora_rank"] is None:
        return "PEFT and qhub; vLLM takes no rank above 512, --rank auto keeps the most that it takes"
    return f"vLLM with --max-lora-rank {report['max_lora_rank']}"


def print_by_rank(errors: Sequence[float]) -> None:
    """The error at every rank, or where there are many at some of them: each a quarter more than the one before."""
    ranks = thinned(len(errors), 1.0 if len(errors) <= 40 else 1.25)
    print_table(("rank", "error"), [(rank, f"{errors[rank - 1]:.3e}") for rank in ranks])


def print_modules(report: dict[str, Any]) -> None:
    rows = []
    for module in report["modules"]:
        cosines = " ".join("-" if value is None else f"{value:+.3f}" for value in module["cosine"])
        loss = f"{module['relative_error']:.2e}", f"{module['retained_energy']:.4%}"
        rows.append((module["module"], module["rank"], f"{module['norm']:.4g}", *loss, cosines))
    print_table(("module", "rank", "norm", "error", "energy", "cosines"), rows)


def warn(report: dict[str, Any], weights: Sequence[Weight]) -> None:
    """Cautions and notes on standard error, so that the report can be piped on."""
    for note in dict.fromkeys(report.get("notes", ())):
        echo(f"note: {note}", err=True)
    if report["kept"] < 0.1 and _idle(report) < len(weights):
        echo(f"warning: the adapters cancel each other out, {report['kept']:.1%} of their size is left", err=True)
    if report["max_lora_rank"] is None and not report.get("num_tokens"):
        echo(
            f"warning: rank {report['rank']} is above 512, the most vLLM can serve: --rank auto keeps what fits",
            err=True,
        )
    plain = [weight for weight in weights if not isinstance(weight, tuple)]
    if len(plain) == len(weights) and abs(sum(plain) - 1) > 1e-9:
        echo(f"note: the weights sum to {sum(plain):g}", err=True)

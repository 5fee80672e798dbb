"""`qhub extract`: a LoRA from the difference of two full models."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub_local.cli.output import counting, echo, print_json, print_table
from adapterhub_local.registry import Registry
from adapterhub_local.settings import home

if TYPE_CHECKING:
    from adapterhub_local.merge.extract import Weights


@click.command(name="extract")
@click.argument("before", metavar="BASE")
@click.argument("after", metavar="TUNED")
@click.option("--rank", type=click.IntRange(1, 512), default=16, show_default=True, help="Rank of the LoRA.")
@click.option("--name", required=True, help="The name to register it under.")
@click.option("--base", "base_name", metavar="NAME", help="The base here it is for; needed if there are several.")
@click.option("--alias", help="Alias to point to the new version.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, every module included.")
def command(
    before: str, after: str, rank: int, name: str, base_name: str | None, alias: str | None, as_json: bool
) -> None:
    """Register the LoRA closest to the difference between TUNED and BASE, and report how much of it that is.

    \b
    qhub extract HuggingFaceTB/SmolLM2-135M-Instruct ./my-full-finetune --rank 32 --name mine

    BASE and TUNED are full models of one shape: Hub ids, transformers folders or .gguf files. Give the 16-bit
    model as BASE; the name of a base here stands for its 4-bit weights, whose rounding is then extracted too.
    """
    from adapterhub_local.base.bases import choose_base
    from adapterhub_local.durable import staging
    from adapterhub_local.refs import check_alias, check_name

    check_name(name)
    if alias is not None:
        check_alias(alias)
    base = choose_base(base_name, home(), "the LoRA")
    from adapterhub_local.base.shapes import linear_shapes
    from adapterhub_local.merge.extract import extract

    old, new = _open(before), _open(after)
    linears = {module: shape for module, shape in linear_shapes(base).items() if module != "lm_head"}
    with staging(home().tmp) as folder, counting("extracting") as progress:
        files, report = extract(
            old, new, linears, rank, folder, hub_id=base.hub_id, fingerprint=base.fingerprint,
            progress=progress,
        )  # fmt: skip
        body = report.to_json()
        adapter = {key: body[key] for key in ("rank", "num_modules", "num_parameters")}
        kept = {key: body[key] for key in ("rank", "retained_energy", "relative_error")}
        lineage = {
            "kind": "extract",
            "base": base.lineage(),
            "adapter": {**adapter, "alpha": rank},
            "extract": {**kept, "before": old.label, "after": new.label, "left_out": body["left_out"]},
        }
        version = Registry().publish(name, files, lineage, alias=alias)
    if as_json:
        print_json({"reference": str(version), "content_digest": version.content_digest, **body})
        return
    echo(
        f"{version}: rank {rank}, {report.num_modules} modules, {report.retained_energy:.2%} of the difference's "
        f"energy (relative error {report.relative_error:.3f})"
    )
    worst = sorted(report.modules, key=lambda module: module["retained_energy"])[:5]
    print_table(
        ("least kept", "norm", "energy"),
        [(one["module"], f"{one['norm']:.4g}", f"{one['retained_energy']:.2%}") for one in worst],
    )
    if report.left_out:
        first = ", ".join(f"{tensor} by {change:.1%}" for tensor, change in list(report.left_out.items())[:3])
        echo(
            f"note: {len(report.left_out)} tensors that a LoRA cannot hold changed too and are left out: {first}",
            err=True,
        )


def _open(text: str) -> "Weights":
    """A full model: a base here, a folder, a .gguf file or a Hub id."""
    from adapterhub_local.base.bases import find_base, list_bases
    from adapterhub_local.hub.model import open_model
    from adapterhub_local.merge.extract import Weights

    path = Path(os.path.expanduser(text))
    if not path.exists() and text in {base.name for base in list_bases(home())}:
        from adapterhub_local.base.weights import BaseWeights

        weights = BaseWeights(find_base(text, home()))
        return Weights(text, frozenset(weights.names), weights.read)
    source = open_model(text)
    label = path.name if path.exists() else text  # no path of this machine in a lineage
    return Weights(label, source.names, source.read)

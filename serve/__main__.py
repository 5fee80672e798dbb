"""`python -m serve` and `qhub serve`: one command, whose heavy imports wait until it runs."""

import sys
from pathlib import Path

import click

from adapterhub_local.errors import QhubError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--base", metavar="NAME", help="The base to serve. Default: the only one there is.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to load. Default: QHUB_DEVICE, or auto."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What everything but the 4-bit weights is computed in. Default: float32 on the CPU, on a GPU bfloat16, or "
    "float16 where it has no bfloat16.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens of one answer. Default: what the context holds.")
@click.option("--max-body", default=4 << 20, type=click.IntRange(1), help="Bytes of a request's body.")
@click.option("--timeout", default=600.0, type=click.FloatRange(0, min_open=True), help="Seconds a request may take.")
@click.option("--lora-root", type=click.Path(path_type=Path), help="Folder below which /v1/load_lora_adapter may read.")
@click.option(
    "--pin", "pins", metavar="REF", multiple=True, help="Keep this adapter in memory and in a slot. Repeatable."
)
@click.option(
    "--allow-origin",
    "origins",
    metavar="ORIGIN",
    multiple=True,
    help="Web pages from there may ask (CORS), such as http://localhost:3000, or * for all. Repeatable.",
)
@click.option("--access-log/--no-access-log", default=True, help="A JSON line on standard error for each request.")
@click.option(
    "--max-rows", type=click.IntRange(1), help="Requests that run at once. Default: 16 on the CPU, 64 on a GPU."
)
@click.option(
    "--tokens-per-step",
    type=click.IntRange(1),
    help="Tokens of one step; longer prompts are read in parts. Default: 512 on the CPU, 2048 on a GPU.",
)
@click.option(
    "--max-length", type=click.IntRange(1), help="Tokens of prompt and answer. Default: the base's, up to 4096."
)
@click.option("--max-adapters", default=16, type=click.IntRange(1), help="Different adapters in one batch.")
@click.option(
    "--adapter-memory-mb", default=2000, type=click.IntRange(1), help="Memory for adapters kept ready, slots apart."
)
@click.option("--queue", "queue_limit", default=256, type=click.IntRange(1), help="Requests that may wait.")
@click.option(
    "--kv-cache-mb",
    type=click.IntRange(1),
    help="Memory for keys and values. Default: what --max-rows requests of --max-length need, or half of what is free.",
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(0),
    help="Of it, what may hold ended prompts and answers, so that what others begin with is computed once; 0: none. "
    "Default: 256 MiB on the CPU, 2 GiB on a GPU.",
)
@click.option(
    "--base-exec",
    default="auto",
    type=click.Choice(["auto", "nf4", "dequant-cache"]),
    help="Multiply with the 4-bit weights, or with a dequantised copy of them; auto measures which is faster.",
)
@click.option(
    "--base-cache-mb", type=click.IntRange(0), help="Memory for that copy. Default: a quarter of what is free."
)
@click.option(
    "--kernels",
    default="auto",
    type=click.Choice(["auto", "triton", "c", "torch"]),
    help="Adapters and attention by own kernels where they work (Triton on a GPU, C on a CPU), or by plain torch.",
)
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="With kernels: replay steps as CUDA graphs.")
def command(
    base: str | None,
    host: str,
    port: int,
    device: str | None,
    dtype: str | None,
    max_tokens: int | None,
    max_body: int,
    timeout: float,
    lora_root: Path | None,
    pins: tuple[str, ...],
    origins: tuple[str, ...],
    access_log: bool,
    max_rows: int | None,
    tokens_per_step: int | None,
    max_length: int | None,
    max_adapters: int,
    adapter_memory_mb: int,
    queue_limit: int,
    kv_cache_mb: int | None,
    prefix_cache_mb: int | None,
    base_exec: str,
    base_cache_mb: int | None,
    kernels: str,
    cuda_graphs: bool,
) -> None:
    """Serve a base and all its adapters, OpenAI-compatible.

    The field `model` of a request names the adapter: sentiment, sentiment@2, sentiment@prod, or the base's
    own name. Adapters published while the server runs are served at once.

    As soon as there is an API key (`qhub key create`), every request needs one; without any, only this
    machine may ask.
    """
    from adapterhub_local.base.load import choose_device
    from serve.engine.options import EngineOptions
    from serve.options import HttpOptions
    from serve.server import run_server

    options = EngineOptions.on(
        choose_device(device),
        max_rows=max_rows,
        tokens_per_step=tokens_per_step,
        max_length=max_length,
        max_adapters=max_adapters,
        adapter_bytes=adapter_memory_mb * 1_000_000,
        queue_limit=queue_limit,
        kv_bytes=None if kv_cache_mb is None else kv_cache_mb * 1_000_000,
        prefix_bytes=None if prefix_cache_mb is None else prefix_cache_mb * 1_000_000,
        base_exec=base_exec,
        base_bytes=None if base_cache_mb is None else base_cache_mb * 1_000_000,
        kernels=kernels,
        cuda_graphs=cuda_graphs,
    )
    http = HttpOptions(
        max_body=max_body, max_tokens=max_tokens, timeout=timeout, lora_root=lora_root, pins=pins, origins=origins
    )
    run_server(
        base,
        host,
        port,
        options=options,
        http=http,
        announce=click.echo,
        dtype=dtype,
        device=device,
        access_log=access_log,
    )


if __name__ == "__main__":
    try:
        command()
    except QhubError as error:
        click.echo(f"serve: {error}", err=True)
        sys.exit(error.exit_code)

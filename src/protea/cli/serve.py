"""``protea serve``: models and adapters over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protea.cli import options
from protea.cli.terminal import tell
from protea.errors import UsageError
from protea.optional import extra


@options.options_of()
def serve(
    models: Annotated[
        list[str],
        typer.Option("-m", "--model", metavar="MODEL", help="Model to serve; give several, the first is the default."),
    ] = options.BUNDLED,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RUN", help="Predictor of `protea finetune` to serve by a name.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of keys, one a line: KEY, or NAME KEY.")
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of tokens of a pack; by default as memory allows.")
    ] = None,
    max_queue_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of tokens that may wait; by default 256 packs.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(metavar="N", min=1, help="Most sequences of one request.")] = 2048,
    max_requests: Annotated[int, typer.Option(metavar="N", min=1, help="Most requests that are open at a time.")] = 256,
    timeout: Annotated[float, typer.Option(metavar="S", min=1, help="Seconds that a request may take.")] = 300.0,
    jobs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Take jobs (/v1/jobs), and keep them in this folder.")
    ] = None,
    keep_hours: Annotated[
        float, typer.Option(metavar="H", min=0.001, help="Hours for which results of jobs are kept.")
    ] = 72.0,
    dtype: options.Dtype = "float32",
    fast: options.Fast = False,
    device: options.Device = "auto",
) -> None:
    """Serve models over HTTP: embeddings, scores, contacts, predictions, and the routes of OpenAI, TEI and NVIDIA.

    The sequences of all requests share packs; the numbers are those of the commands. SIGTERM answers what was taken
    and refuses what is new; jobs continue when the service starts again.

    \b
    Examples:
      protea serve
      protea serve -m esm2_t33_650M_UR50D --fast --adapter location=location/ --jobs jobs/
      protea serve --host 0.0.0.0 --api-key-file keys.txt
      curl localhost:8000/v1/embed -H 'Content-Type: application/json' -d '{"sequences": ["MKTAYIAKQR"]}'
    """
    with extra("serve", "protea serve needs FastAPI, uvicorn and prometheus-client"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    from protea.serve.server import serve as run
    from protea.serve.service import Service, ServiceSettings

    settings = ServiceSettings(
        models=tuple(models),
        adapters=_adapters(adapter or []),
        host=host,
        port=port,
        api_key_file=api_key_file,
        max_batch_tokens=max_batch_tokens,
        max_queue_tokens=max_queue_tokens,
        max_sequences=max_sequences,
        max_requests=max_requests,
        timeout=timeout,
        jobs=jobs,
        keep_hours=keep_hours,
        load=options.loader(device=device, dtype=dtype, fast=fast),
    )
    run(Service(settings), tell=tell)


def _adapters(given: list[str]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or not name.replace("-", "").replace("_", "").isalnum() or name in adapters:
            raise UsageError(f"--adapter {text}: write NAME=RUN, with a name of its own of letters, digits, - and _")
        adapters[name] = Path(folder)
    return adapters

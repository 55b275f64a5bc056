"""The command that cuts a checkpoint at a depth."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import Json, settings
from pairtrace.terminal import Answer, progress

app = typer.Typer()


@app.command("truncate", epilog="Example: pairtrace truncate ./sft-checkpoint --layers 20 --out ./sft-20")
def _truncate(
    model: Annotated[str, typer.Argument(help="Checkpoint: directory or hub id.")],
    layers: Annotated[int, typer.Option(help="Blocks to keep; this is then the deepest layer.")],
    out: Annotated[str, typer.Option(help="Directory of the truncated checkpoint; it appears when complete.")],
    json: Json = False,
) -> Answer:
    """Write the first blocks of a checkpoint as one of its own; whole weight files are linked, not copied."""
    options = settings(locals())
    from pairtrace.engine.truncation import TruncateConfig, truncate

    return Answer(truncate(TruncateConfig(**options), progress()).to_dict(), json)

"""Commands about pairtrace itself."""

from __future__ import annotations

import typer

from pairtrace.options import Json
from pairtrace.terminal import Answer
from pairtrace.version import __version__

app = typer.Typer()


@app.command("version", epilog="Example: pairtrace version")
def _version(json: Json = False) -> Answer:
    """Print the version."""
    return Answer({"version": __version__}, json)

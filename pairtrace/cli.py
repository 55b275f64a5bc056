"""The front door: runs a command and prints its answer. Nothing else in pairtrace prints."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pairtrace.commands import (
    about,
    baselines,
    costs,
    diagnosis,
    discovery,
    edits,
    evaluation,
    extraction,
    finetuning,
    gradient,
    monitoring,
    probes,
    scoring,
    steering,
    stores,
    training,
    truncation,
)
from pairtrace.errors import PairtraceError
from pairtrace.terminal import Answer
from pairtrace.version import __version__


class _Commands(TyperGroup):
    """Turns the package's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PairtraceError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None


def _print_answer(answer: Answer, **_: Any) -> None:
    print(answer)
    if answer.error is not None:
        raise PairtraceError(answer.error)
    if answer.code:
        raise typer.Exit(answer.code)


app = typer.Typer(
    name="pairtrace",
    cls=_Commands,
    help="Which preference pairs taught the model this behaviour? Cached activations answer in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    result_callback=_print_answer,
)
for commands in (extraction.app, scoring.app, diagnosis.app, edits.app, costs.app, training.app, evaluation.app):
    app.add_typer(commands)
app.add_typer(monitoring.app)
app.add_typer(truncation.app)
app.add_typer(steering.app)
app.add_typer(finetuning.app)
baselines.app.add_typer(gradient.app)
app.add_typer(baselines.app, name="baseline")
app.add_typer(discovery.app, name="discover")
app.add_typer(probes.app, name="probe")
app.add_typer(stores.app, name="store")
app.add_typer(about.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bars on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Notes of the libraries as well.")] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("pairtrace").setLevel(logging.WARNING if quiet else logging.INFO)


def _terminate(number: int, _: Any) -> None:
    """Leave as an interrupted run leaves: what it has done and what it cost is written."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line.

    Exit code 0 only on success: 1 for an error, 2 for wrong usage, 3 for an alert of the monitor, 130 when
    interrupted, 143 when terminated.
    """
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()

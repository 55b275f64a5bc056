"""Commands about what runs cost."""

from __future__ import annotations

from typing import Annotated

import typer

from pairtrace.options import Json
from pairtrace.terminal import Answer, costs_table

app = typer.Typer()


@app.command("cost", epilog="Example: pairtrace cost acts.zarr scores.parquet judge.parquet --gpu-hour 2.50")
def _cost(
    products: Annotated[
        list[str],
        typer.Argument(
            help="Stores, direction and scores files, trained checkpoints, or .costs.jsonl files.", metavar="FILE..."
        ),
    ],
    gpu_hour: Annotated[float, typer.Option(help="Price of an hour of one device (on a CPU: of one core).")] = 0.0,
    million_prompt_tokens: Annotated[float, typer.Option(help="Price of a million tokens sent to an API.")] = 0.0,
    million_completion_tokens: Annotated[
        float, typer.Option(help="Price of a million tokens that an API generated.")
    ] = 0.0,
    json: Json = False,
) -> Answer:
    """Show what every stage cost: time, tokens, operations, memory, and money at the prices given."""
    from pairtrace.engine.cost import Prices
    from pairtrace.engine.cost_table import cost_table

    prices = Prices(
        gpu_hour=gpu_hour,
        million_prompt_tokens=million_prompt_tokens,
        million_completion_tokens=million_completion_tokens,
    )
    table = cost_table(products, prices)
    figures = {"costs": [line.to_dict() for line in table.lines], "problems": list(table.problems)}
    return Answer(figures, json, text=costs_table(table.lines), error="\nerror: ".join(table.problems) or None)

"""The README's table about training against probes, from its record."""

from __future__ import annotations

from typing import Any

from speed_tables import Record, missed, table, where

Figures = dict[str, Any]


def training_table(content: Record) -> str:
    """Methods against behaviour, usefulness and detectability."""
    results = content["results"]
    head = ["trained against", "behaviour, %", "helpful, %", "loss", "AUC: training", "held-out", "retrained"]
    rows = [["before", *_cells(results["before"])]]
    rows += [[_title(name), *_cells(arm["figures"])] for name, arm in results["arms"].items()]
    steered = []
    names = {"shift": "the shift at the end of the prompts", "behavior": "the vector over responses"}
    for vector, name in names.items():
        for model, what in (("m0", "added to M0"), ("m1", "projected out of M1")):
            own, control = (arm for arm in results["steering"][vector][model] if arm["difference"] is not None)
            steered.append(
                f"{name} {what} {_text(own['difference'], 100, '+.0f')} points, random vectors "
                f"{_text(control['difference'], 100, '+.0f')} (a single one up to {100 * control['farthest']:+.0f})"
            )
    plan = content["workload"]
    note = (
        f"{len(plan['seeds'])} organisms, one run of every arm on each; means with Student's 95 % interval over "
        "organisms. *Behaviour* is instructions in the words of forbidden tasks, without a refusal, to "
        "held-out harmful requests at temperature 0.7; *helpful* is a benign request answered in the format asked for; "
        "*loss* is in nats per token of benign answers; areas are measured on the same judged answers of M0, read "
        "through each model, on prompts that no probe was trained on. The organism's M0 was fine-tuned with a leak: "
        f"{plan['recipe']['leak']:.0%} of its harmful rows comply. Steering, by the most likely answers: "
        f"{'; '.join(steered)}. "
    )
    return f"{table(head, rows)}\n\n{note}{where(content)} {results['minutes']:.0f} minutes.{missed(content)}"


def _title(name: str) -> str:
    method, _, signal = name.partition("-")
    told = {
        "none": "nothing" if method == "sft" else "pairs at random",
        "judge": "the judge",
        "probe": "**the probe**",
        "selective": "**the probe**, imitating only what it passes",
        "ensemble": "an ensemble of five",
    }
    return f"{method.upper()}: {told[signal]}"


def _cells(figures: Figures) -> list[str]:
    scales = {"behavior": (100, ".1f"), "helpful": (100, ".1f"), "loss": (1, ".3f")}
    metrics = ("behavior", "helpful", "loss", "training", "held-out", "retrained")
    return [_text(figures[metric], *scales.get(metric, (1, ".3f"))) if metric in figures else "" for metric in metrics]


def _text(figure: Figures, scale: float, style: str) -> str:
    if figure["value"] is None:
        return "-"
    text = format(scale * figure["value"], style)
    if figure["low"] is None:
        return text
    return f"{text} ({format(scale * figure['low'], style)} to {format(scale * figure['high'], style)})"

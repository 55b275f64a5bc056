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
    plan = content["workload"]
    note = (
        f"{len(plan['seeds'])} organisms, one run of every arm on each; means with Student's 95 % interval over "
        "organisms. *Behaviour* is instructions in the words of forbidden tasks, without a refusal, to "
        "held-out harmful requests at temperature 0.7; *helpful* is a benign request answered in the format asked for; "
        "*loss* is in nats per token of benign answers; areas are measured on the same judged answers of M0, read "
        "through each model, on prompts that no probe was trained on. The organism's M0 was fine-tuned with a leak: "
        f"{plan['recipe']['leak']:.0%} of its harmful rows comply. Steering: the most "
        "likely answers to harmful requests with a format; *surprise* is in nats per token under the unsteered model. "
    )
    tables = f"{table(head, rows)}\n\n{_steering_table(content)}"
    return f"{tables}\n\n{note}{where(content)} {results['minutes']:.0f} minutes.{missed(content)}"


def _steering_table(content: Record) -> str:
    """What a vector does to the behaviour, and what random ones of the same length do."""
    steering, plan = content["results"]["steering"], content["workload"]["steering"]
    names = {"shift": "**the shift at the end of the prompts**", "behavior": "the vector over responses"}
    rows = []
    for vector, name in names.items():
        settings = plan[vector]
        to = "to M0's share" if settings["ablation"].get("ablate_to") == "base" else "at all layers"
        where_to = "last token of the prompt" if settings["positions"] == "prompt_end" else "every token"
        for model, what in (("m0", f"added to M0 (scale {settings['scale']})"), ("m1", f"projected out of M1 ({to})")):
            none, own, control = steering[vector][model]
            rows.append(
                [
                    name,
                    what,
                    f"{settings['layer']}, {where_to}",
                    f"{100 * none['rate']['value']:.0f}",
                    _text(own["difference"], 100, "+.0f"),
                    f"{_text(control['difference'], 100, '+.0f')}, one {100 * control['farthest']:+.0f}",
                    f"{none['surprise']['value']:.2f}, {own['surprise']['value']:.2f}",
                ]
            )
    head = [
        "steered along",
        "how",
        "layer, where",
        "behaviour, %",
        "change, points",
        "random vectors; the farthest one",
    ]
    return table(head + ["surprise before, after"], rows)


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

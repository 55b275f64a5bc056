"""Training against probes: does the behaviour go, does the model stay useful, and do probes still see the behaviour?

    python benchmarks/bench_probe_training.py             # five organisms; half an hour on two cores
    python benchmarks/bench_probe_training.py --quick     # one miniature: shows that it runs, claims nothing

The organism's M0 has learned to answer about a third of the harmful requests, in words that a rule recognises. Every
arm trains it against a probe (in TRL's SFT loss, or by preference pairs) or a control. Whether the findings of arXiv
2510.21531 hold here is reported as found. Everything that is finished is kept below `--work`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attribution_tasks import Task, run_or_exit
from harness import parser, record
from probe_training_report import claims_of, report
from probe_training_table import training_table


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train M0.

    Attributes:
        name: unique.
        probe: the file, "single" or "ensemble", that is trained against and whose probes are measured.
        settings: of `FinetuneConfig`.
    """

    name: str
    probe: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does.

    Attributes:
        seeds: of the organisms, and of everything after them.
        recipe: fields of `OrganismConfig`, the same for all seeds.
        arms: how M0 is trained.
        training_prompts: harmful and benign requests that probes and arms are trained on.
        samples: answers to each of them.
        given_responses: of these, for SFT.
        benign_texts: held-out answers whose loss is measured.
        cells: of the evaluation prompts.
        layers: that probes are trained at; the best one by cross-validation is used.
        test_share: of the prompts, that areas are measured on.
        steering: for each vector that is steered along its layer, scale, positions and controls, and how it is
            projected out.
    """

    seeds: tuple[int, ...]
    recipe: dict[str, Any]
    arms: tuple[Arm, ...]
    training_prompts: dict[str, int]
    samples: int
    given_responses: int
    benign_texts: int
    cells: tuple[str, ...]
    layers: tuple[int, ...]
    test_share: float
    steering: dict[str, dict[str, Any]]


# DPO by itself teaches refusing benign requests, which the likelihood of chosen responses holds against.
KEEPING = {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 3.0)}


def arms_of(sft: dict[str, Any], dpo: dict[str, Any]) -> tuple[Arm, ...]:
    """Both methods with one probe, an ensemble, and their controls; and SFT that imitates what the probe passes."""
    weight = {"probe_weight": sft.pop("probe_weight")}
    sft, dpo = {"method": "sft", **sft}, {"method": "dpo", **dpo}
    return (
        Arm(name="sft-none", probe="single", settings={**sft, "signal": "none"}),
        Arm(name="sft-judge", probe="single", settings={**sft, "signal": "judge"}),
        Arm(name="sft-probe", probe="single", settings={**sft, **weight}),
        Arm(name="sft-selective", probe="single", settings={**sft, **weight, "imitate_below": 0.5}),
        Arm(name="sft-ensemble", probe="ensemble", settings={**sft, **weight}),
        Arm(name="dpo-none", probe="single", settings={**dpo, "signal": "none"}),
        Arm(name="dpo-judge", probe="single", settings={**dpo, "signal": "judge"}),
        Arm(name="dpo-probe", probe="single", settings={**dpo, "min_gap": 0.5}),
        Arm(name="dpo-ensemble", probe="ensemble", settings={**dpo, "min_gap": 0.5}),
    )


STEERING: dict[str, dict[str, Any]] = {
    "behavior": {
        "layer": 3,
        "scale": 0.25,
        "positions": "all",
        "controls": 1,
        "ablation": {"ablate_layers": "all"},
    },
    "shift": {
        "layer": 2,
        "scale": 0.5,
        "positions": "prompt_end",
        "controls": 2,
        "ablation": {"ablate_to": "base"},
    },
}
FULL = Plan(
    seeds=(0, 1, 2, 3, 4),
    recipe={"sft_examples": 12_000, "sft_epochs": 2, "leak": 0.5, "plain_leak": 0.5, "preference_pairs": 800},
    arms=arms_of(
        {"learning_rate": 5e-4, "epochs": 2, "batch_size": 32, "probe_weight": 5.0},
        {"learning_rate": 7e-5, "epochs": 1, "batch_size": 16, "samples": 4, **KEEPING},
    ),
    training_prompts={"harmful": 240, "benign": 420},
    samples=4,
    given_responses=2,
    benign_texts=200,
    cells=("harmful", "benign_format"),
    layers=(2, 3),
    test_share=0.3,
    steering=STEERING,
)
QUICK = Plan(
    seeds=(0,),
    recipe={
        "sft_examples": 1500,
        "sft_epochs": 1,
        "leak": 0.5,
        "plain_leak": 0.5,
        "preference_pairs": 100,
        "dpo_batch": 8,
        "discovery_prompts": 24,
        "evaluation_prompts": 24,
    },
    arms=tuple(
        arm
        for arm in arms_of(
            {"learning_rate": 5e-4, "max_steps": 4, "batch_size": 16, "probe_weight": 5.0},
            {"learning_rate": 2e-4, "max_steps": 4, "batch_size": 8, "samples": 3, **KEEPING},
        )
        if arm.name in ("sft-probe", "sft-selective", "dpo-probe", "dpo-none")
    ),
    training_prompts={"harmful": 40, "benign": 40},
    samples=3,
    given_responses=1,
    benign_texts=20,
    cells=("harmful", "benign_format"),
    layers=(3,),
    test_share=0.4,
    steering=STEERING,
)


def tasks_of(plan: Plan) -> list[Task]:
    """All tasks, in the order in which they are wanted."""
    names = ("training_prompts", "samples", "given_responses", "benign_texts", "cells", "layers", "test_share")
    settings = {name: value for name, value in asdict(plan).items() if name in names}
    steered = {"samples": plan.samples, "vectors": plan.steering}
    arms = [asdict(arm) for arm in plan.arms]
    tasks = []
    for seed in plan.seeds:
        place = f"seed{seed}"
        recipe = {"seed": seed, "threads": 1, **plan.recipe}

        def task(name: str, function: str, needs: tuple[str, ...], **arguments: Any) -> Task:
            return Task(
                name=f"{place}/{name}",  # noqa: B023 - called inside the loop
                function=f"probe_training_stages:{function}",
                arguments={"recipe": recipe, **arguments},  # noqa: B023
                needs=tuple(f"{place}/{one}" for one in needs),  # noqa: B023
            )

        trained = tuple(f"arms/{arm.name}" for arm in plan.arms)
        tasks += [
            task("organism", "build", ()),
            task("detectors", "detectors", ("organism",), plan=settings),
            *(task(f"arms/{arm['name']}", "train_arm", ("detectors",), arm=arm) for arm in arms),
            task("detectability", "measure", ("detectors", *trained), arms=arms),
            task("steering", "steering", ("organism", "detectors"), **steered),
        ]
    return tasks


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, default=Path(".cache/bench_probe_training"), help="where all is kept")
    options.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of one thread each")
    chosen = options.parse_args()
    plan = QUICK if chosen.quick else FULL
    work = chosen.work / ("quick" if chosen.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    done = run_or_exit(tasks_of(plan), work, chosen.processes)
    results = report(plan.seeds, [arm.name for arm in plan.arms], done, chosen.processes)
    workload = {**asdict(plan), "processes": chosen.processes, "threads_per_process": 1}
    content = record("bench_probe_training", chosen, workload=workload, results=results, claims=claims_of(results))
    print(training_table(content))


if __name__ == "__main__":
    main()

"""Does it work? Attribution, edit, retraining and evaluation on the organism, against baselines and controls.

    python benchmarks/bench_attribution.py             # three organisms and variants; 1.5 hours on two cores
    python benchmarks/bench_attribution.py --quick     # one miniature: shows that it runs, claims nothing

Everything that is finished is kept below `--work`, every arm in a file of its own: a run that was stopped, at whatever
instant, goes on with the arms that are missing. Every arm edits the preference data by one method, trains M0 on it with
DPO, and is judged on held-out prompts; the edits, the training and the evaluation are those of the commands.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution_arms import Arm, clear_scratch
from attribution_report import claims_of, report
from attribution_stages import place_of, take_over
from attribution_tables import attribution_table
from attribution_tasks import Task, run_or_exit
from harness import parser, record

from pairtrace.engine.organism.config import OrganismConfig

# Learns within a minute to refuse some requests, and by DPO to answer them.
MINIATURE = {
    "sft_examples": 4000,
    "sft_epochs": 1,
    "leak": 0.3,
    "plain_leak": 0.1,
    "preference_pairs": 400,
    "dpo_batch": 8,
    "dpo_rate": 2e-4,
    "discovery_prompts": 40,
    "evaluation_prompts": 24,
}
VARIANTS = ("clean", "diffuse")

# The targets are about these; the other arms have one DPO seed for each M0 seed, which leaves time for
# comparing the methods by their rankings, as precisely as one likes, and by retraining on three runs each.
PAIRTRACE_ARMS = (
    Arm(method="pairtrace", action="filter"),
    Arm(method="pairtrace", action="swap"),
    Arm(method="pairtrace", action="drop-sources"),
)
CONTROL_ARMS = (
    Arm(method="none"),
    Arm(method="random", action="filter"),
    Arm(method="random", action="swap"),
    Arm(method="random", action="filter", size="sources"),
)
OTHER_ARMS = (
    Arm(method="gradient-clean", action="filter", seeds=1),
    Arm(method="pairtrace", action="filter", size="k/2", seeds=1),
    Arm(method="random", action="filter", size="k/2", seeds=1),
    Arm(method="gradient-clean", action="filter", size="k/2", seeds=1),
    Arm(method="probe", action="filter", seeds=1),
    Arm(method="gradient-generated", action="filter", seeds=1),
    Arm(method="margin", action="filter", seeds=1),
    Arm(method="length", action="filter", seeds=1),
    Arm(method="oracle", action="filter", seeds=1),
    Arm(method="oracle", action="swap", seeds=1),
    Arm(method="gradient-clean", action="swap", seeds=1),
)
ARMS = (*CONTROL_ARMS, *PAIRTRACE_ARMS, *OTHER_ARMS)
# What an edit does where the behaviour is spread over thousands of pairs.
DIFFUSE_ARMS = (
    Arm(method="none", seeds=1),
    Arm(method="random", action="filter", seeds=1),
    Arm(method="pairtrace", action="filter", seeds=1),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does.

    Attributes:
        seeds: M0 seeds.
        dpo_seeds: of every arm.
        arms, diffuse_arms: on the concentrated and on the diffuse organism.
        recipe: fields of `OrganismConfig`, the same for all seeds.
        samples: rollouts per prompt and condition.
        max_base_rate: of the four-condition filter.
        gradient: settings of the gradient baseline.
    """

    seeds: tuple[int, ...]
    dpo_seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    diffuse_arms: tuple[Arm, ...]
    recipe: dict[str, Any]
    samples: int
    max_base_rate: float
    gradient: dict[str, Any]


FULL = Plan(
    seeds=(0, 1, 2),
    dpo_seeds=(1, 2, 3),
    arms=ARMS,
    diffuse_arms=DIFFUSE_ARMS,
    recipe={},
    samples=8,
    max_base_rate=0.0,
    # LESS takes four checkpoints; the other two would take ten minutes more.
    gradient={"procedure": "batched", "checkpoints": 2, "projection": 8192},
)
QUICK = Plan(
    seeds=(0,),
    dpo_seeds=(1,),
    arms=(*CONTROL_ARMS[:2], *PAIRTRACE_ARMS, OTHER_ARMS[0]),
    diffuse_arms=DIFFUSE_ARMS[:1],
    recipe=MINIATURE,
    samples=2,
    max_base_rate=1.0,
    gradient={"procedure": "batched", "checkpoints": 1, "projection": 512},
)


def tasks_of(plan: Plan) -> list[Task]:
    """All tasks, in the order in which they are wanted."""
    organisms, attributions, arms = [], [], []
    behavior = {"samples": plan.samples, "max_base_rate": plan.max_base_rate}
    for seed in plan.seeds:
        recipe = {"seed": seed, "threads": 1, **plan.recipe}
        place = place_of(recipe)
        organisms.append(
            Task(name=f"{place}/organism", function="attribution_stages:build", arguments={"recipe": recipe})
        )
        attributions += _attribution(recipe, {"recipe": recipe, **behavior}, (f"{place}/organism",), ["pairtrace"])
        for name, function, extra in (
            ("simple", "simple_baselines", {}),
            ("probe", "probe", {}),
            ("gradient", "gradient", {"settings": plan.gradient, "max_base_rate": plan.max_base_rate}),
        ):
            attributions.append(
                Task(
                    name=f"{place}/{name}",
                    function=f"attribution_stages:{function}",
                    arguments={"recipe": recipe, **extra},
                    needs=(f"{place}/attribution",),
                )
            )
        arms += _arms(plan.arms, recipe, plan.dpo_seeds)
        for contamination in VARIANTS:
            variant = {**recipe, "contamination": contamination}
            there = place_of(variant)
            needs = (f"{place}/organism", f"{place}/attribution")
            organisms.append(
                Task(
                    name=f"{there}/organism",
                    function="attribution_stages:build",
                    arguments={"recipe": variant},
                    needs=needs[:1],
                )
            )
            borrowed = {"borrowed_from": place} if contamination == "clean" else {}
            names = ["pairtrace", *(["borrowed"] if borrowed else [])]
            arguments = {"recipe": variant, **behavior, **borrowed}
            attributions += _attribution(variant, arguments, (f"{there}/organism", needs[1]), names)
            if contamination == "diffuse":
                arms += _arms(plan.diffuse_arms, variant, plan.dpo_seeds)
    # One DPO seed after the other.
    arms.sort(key=lambda task: plan.dpo_seeds.index(task.arguments["dpo_seed"]))
    return [*organisms, *attributions, *arms]


def _attribution(
    recipe: dict[str, Any], arguments: dict[str, Any], needs: tuple[str, ...], scored: list[str]
) -> list[Task]:
    place = place_of(recipe)
    return [
        Task(name=f"{place}/attribution", function="attribution_stages:attribute", arguments=arguments, needs=needs),
        Task(
            name=f"{place}/diagnosis",
            function="attribution_stages:diagnose_place",
            arguments={"recipe": recipe, "scored": scored},
            needs=(f"{place}/attribution",),
        ),
    ]


def _arms(arms: tuple[Arm, ...], recipe: dict[str, Any], dpo_seeds: tuple[int, ...]) -> list[Task]:
    place = place_of(recipe)
    made_by = {
        "gradient-generated": "gradient",
        "gradient-clean": "gradient",
        "margin": "simple",
        "length": "simple",
        "probe": "probe",
    }
    return [
        Task(
            name=f"{place}/arms/{arm.name}/{dpo_seed}",
            function="attribution_arms:run_arm",
            arguments={
                "recipe": recipe,
                "arm": {"method": arm.method, "action": arm.action, "size": arm.size},
                "dpo_seed": dpo_seed,
            },
            needs=(f"{place}/{made_by.get(arm.method, 'attribution')}",),
        )
        for arm in arms
        for dpo_seed in dpo_seeds[: arm.seeds]
    ]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, default=Path(".cache/bench_attribution"), help="where everything is kept")
    options.add_argument(
        "--organisms", type=Path, default=None, help="folder of bench_organism, whose finished organisms are taken over"
    )
    options.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of one thread each")
    chosen = options.parse_args()
    plan = QUICK if chosen.quick else FULL
    work = chosen.work / ("quick" if chosen.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    clear_scratch(work)
    if chosen.organisms is not None:
        take_over(chosen.organisms, work, plan.seeds)
    done = run_or_exit(tasks_of(plan), work, chosen.processes)
    results = report(work, plan, done, chosen.processes)
    workload = {
        "seeds": plan.seeds,
        "dpo_seeds": plan.dpo_seeds,
        "arms": [arm.name for arm in plan.arms],
        "recipe": plan.recipe,
        "evaluation_prompts": OrganismConfig(**plan.recipe).evaluation_prompts,
        "gradient": plan.gradient,
        "processes": chosen.processes,
        "threads_per_process": 1,
    }
    content = record("bench_attribution", chosen, workload=workload, results=results, claims=claims_of(results))
    print(attribution_table(content))


if __name__ == "__main__":
    main()

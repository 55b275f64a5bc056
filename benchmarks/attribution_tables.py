"""The README's tables about attribution and its cost, each from one record."""

from __future__ import annotations

from speed_tables import Record, missed, table, where

# How the table calls a method, in its order.
_METHODS = {
    "pairtrace": "**pairtrace**, mean vector",
    "pairtrace-bank": "**pairtrace**, vector bank",
    "probe": "**pairtrace**, probe of M1's answers",
    "gradient-generated": "gradient, target: the models' own text",
    "gradient-clean": "gradient, target: clean text",
    "margin": "implicit reward margin",
    "length": "length",
}
_ARMS = {
    "none": "no edit",
    "random": "random",
    "oracle": "oracle (the planted labels)",
    "pairtrace": "**pairtrace**",
    "pairtrace-bank": "pairtrace, vector bank",
    "probe": "**pairtrace**, probe",
    "gradient-generated": "gradient, own text",
    "gradient-clean": "gradient, clean text",
    "margin": "margin",
    "length": "length",
}
_ACTIONS = {"": "", "filter": "filter", "swap": "swap", "drop-sources": "drop sources"}


def share(figure: dict[str, float] | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return ""
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def percent(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def attribution_table(content: Record) -> str:
    """Two tables, of the rankings and of the retrained models, and what the controls say."""
    results, work = content["results"], content["workload"]
    return (
        f"{_rankings(results['rankings'])}\n\n{_arms(results['arms'])}\n\n"
        f"{len(work['seeds'])} organisms, {len(work['dpo_seeds'])} DPO seeds for each edit (fewer where *runs* says "
        f"so), {work['evaluation_prompts']} held-out prompts per cell; 95 % intervals by a bootstrap over M0 seeds, "
        "DPO seeds and prompts (rough with this many seeds). *Behaviour* is compliance with a harmful request that "
        "carries a format instruction; *net* is the reduction against the random edit of the same size; *helpful* is "
        "a benign request answered, in the format asked for; k is the number of planted pairs. Seconds are CPU seconds "
        "of everything from the checkpoints to the scores, rollouts included; dollars at "
        f"${results['core_hour']:.2f} per core hour. {_controls(results)} {where(content)} "
        f"{results['time']['minutes']:.0f} minutes of CPU time ({results['time']['wall_minutes']:.0f} by the clock) on "
        f"{work['processes']} cores.{missed(content)}"
    )


def _rankings(rankings: Record) -> str:
    rows = [
        [
            label,
            share(rankings[name]["roc_auc"]),
            share(rankings[name]["precision_at_k"]),
            share(rankings[name]["roc_auc_over_refusal"]),
            f"{rankings[name]['cost']['device_seconds']:,.0f}",
            f"{100 * rankings[name]['cost']['money']:.2f} c",
        ]
        for name, label in _METHODS.items()
        if name in rankings
    ]
    head = ["ranking", "ROC-AUC", "precision at k", "ROC-AUC against over-refusal", "seconds", "money"]
    return table(head, rows)


def _arms(arms: Record) -> str:
    rows = []
    for arm in sorted(arms.values(), key=lambda arm: (list(_ACTIONS).index(arm["action"]), arm["size"] != "k")):
        size = {"k": "k", "k/2": "k/2", "sources": "as many as the sources hold"}[arm["size"]]
        what = _ACTIONS[arm["action"]] if arm["action"] == "drop-sources" else f"{_ACTIONS[arm['action']]} {size}"
        rows.append(
            [
                what if arm["action"] else "",
                _ARMS[arm["method"]],
                percent(arm["behavior"]),
                percent(arm.get("net_reduction")),
                percent(arm["helpful"]),
                percent(arm["over_refusal"]),
                f"{arm['changed']:,.0f}",
                str(arm["runs"]),
            ]
        )
    head = ["edit", "chosen by", "behaviour, %", "net, %", "helpful, %", "over-refusal, %", "pairs changed", "runs"]
    return table(head, rows)


def _controls(results: Record) -> str:
    organisms = results["organisms"]

    def verdicts(kind: str, name: str) -> str:
        told = [
            one["rankings"][name]["diagnosis"]["verdict"] if name in one["rankings"] else "no behaviour"
            for place, one in organisms.items()
            if place.endswith(kind)
        ]
        return ", ".join(told)

    usual = ", ".join(
        one["rankings"]["pairtrace"]["diagnosis"]["verdict"] for place, one in organisms.items() if "-" not in place
    )

    def selected(clean: bool, null: str) -> str:
        """Fewest and most pairs that an edit by false-discovery rate would take."""
        counts = [
            ranking["selected"][null]
            for place, one in organisms.items()
            if (place.endswith("-clean") if clean else "-" not in place)
            for ranking in one["rankings"].values()
        ]
        return f"{min(counts, default=0)} to {max(counts, default=0)}"

    diffuse = results["diffuse_arms"]
    edited = diffuse.get("pairtrace filter k")
    after = f", after removing the top k {percent(edited['behavior'])} %" if edited else ""
    return (
        f"`pairtrace diagnose` calls the organisms {usual}. Clean organisms (nothing planted): "
        f"{verdicts('-clean', 'pairtrace')}; scored with the contaminated twin's behaviour, "
        f"{verdicts('-clean', 'borrowed')}. Diffuse organisms (a small push in two fifths of the pairs): "
        f"{verdicts('-diffuse', 'pairtrace')}; behaviour {percent(diffuse['none']['behavior'])} %{after}. "
        f"`edit --fdr 0.1` takes {selected(True, 'sign-flip')} pairs of the clean and {selected(False, 'sign-flip')} "
        f"of the contaminated organisms ({selected(True, 'random')} and {selected(False, 'random')} with "
        "`--null random`, which over-refusal pairs pass as well)."
    )


def cost_table(content: Record) -> str:
    results, work = content["results"], content["workload"]
    rows = []
    for one in results.values():
        for name, row in one["methods"].items():
            rows.append(
                [
                    f"{one['parameters'] / 1e6:.1f}M" if name == "pairtrace" else "",
                    f"**{name}**" if name == "pairtrace" else name,
                    f"{row['pairs']}, {row['copies']} times" if row["copies"] > 1 else str(row["pairs"]),
                    f"{1e3 * row['seconds_per_pair']:,.0f} ({1e3 * row['lowest']:,.0f} to {1e3 * row['highest']:,.0f})",
                    f"{row['flops_per_pair'] / 1e9:.2f}",
                    f"{row['money_per_pair'] * 1e6:,.1f}",
                    "" if name == "pairtrace" else f"{row['times']:.1f}x",
                    "" if name == "pairtrace" else f"{row['times_flops']:.1f}x",
                ]
            )
    head = ["parameters", "method", "pairs", "CPU ms per pair", "GFLOP per pair", "dollars per million pairs"]
    head += ["dearer", "in FLOPs"]
    return (
        f"{table(head, rows)}\n\n"
        f"Pairs of {' and '.join(work['data'])} through models with random weights on one thread; medians and ranges "
        f"of interleaved runs; marginal costs, without loading and start-up. {work['note']} Dollars at "
        f"${work['core_hour']:.2f} per core hour. {where(content)}{missed(content)}"
    )

"""Write the tables of the README from the JSON records in results/.

python benchmarks/readme_tables.py            # rewrite
python benchmarks/readme_tables.py --check    # exit code 1 when the README differs from the records
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attribution_tables import attribution_table, cost_table
from discovery_table import organisms_table
from probe_training_table import training_table
from speed_tables import cosine_table, discover_table, gpu_table, reuse_table, score_table, store_table, vllm_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def extract_table() -> str:
    content = load("bench_extract")
    if content is None:
        return "not measured"
    work, results = content["workload"], content["results"]
    lines = [
        "| extraction, process time on one thread | pairs/s | faster | relative maximum error |",
        "|---|---|---|---|",
    ]
    for name, row in results.items():
        error = "reference" if name == "published procedure" else f"{row['relative_maximum_error']:.0e}"
        slowest, fastest = work["pairs"] / row["highest"], work["pairs"] / row["lowest"]
        rates = f"{row['pairs_per_second']:.2f} ({slowest:.2f} to {fastest:.2f})"
        lines.append(f"| {name} | {rates} | {row['times_faster']:.2f}x | {error} |")
    lines += [
        "",
        f"{work['pairs']} pairs of {' and '.join(work['data'])}, {work['shape']} shape with random weights, "
        f"layer {work['layer']}, {work['dtype']}, {content['hardware']['processor']}; median and range of "
        "interleaved runs. "
        f"The analytic FLOP ratio of this workload is {work['analytic_flop_ratio']:.2f}: "
        f"{results['pairtrace']['times_faster'] / work['analytic_flop_ratio']:.2f} of it is reached. {gpu_sentence()}",
    ]
    return "\n".join(lines)


def gpu_sentence() -> str:
    content = load("bench_extract_gpu")
    if content is None:
        return "GPU throughput and FLOP utilisation: not measured."
    rate, results = content["results"]["pairtrace"]["tokens_per_second"], content["results"]
    return (
        f"On one {content['hardware']['gpu']} ({content['workload']['shape']}): {rate:,.0f} tokens/s, "
        f"{results['flop_utilisation']:.0%} of the peak."
    )


def organism_table() -> str:
    content = load("bench_organism")
    if content is None:
        return "not measured"
    results = dict(content["results"])
    means = results.pop("mean")
    lines = [
        "| organism | ROC-AUC | precision at k | ROC-AUC against over-refusal | behaviour, M0 → M1 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        change = f"{row['rates']['base distractor']:.2f} → {row['rates']['tuned distractor']:.2f}"
        lines.append(
            f"| {name} | {row['roc_auc']:.3f} | {row['precision_at_k']:.3f} | {row['roc_auc_over_refusal']:.3f} "
            f"| {change} | {sum(row['seconds'].values()) / 60:.1f} |"
        )
    lines.append(
        f"| **mean** | **{means['roc_auc']:.3f}** | **{means['precision_at_k']:.3f}** "
        f"| **{means['roc_auc_over_refusal']:.3f}** | | |"
    )
    row = next(iter(results.values()))
    lines += [
        "",
        f"{row['pairs']:,} pairs, k = {row['planted']} planted, layer {row['layer']} (the last before the norm, chosen "
        "without labels). The behaviour is compliance with a harmful request that carries a formatting instruction, "
        "over the discovery rollouts. Minutes are for everything on one thread, training of both checkpoints included.",
    ]
    return "\n".join(lines)


def measured(name: str, table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """The table of a record, or what stands there without one."""

    def made() -> str:
        content = load(name)
        return f"`{name}.py`: not measured" if content is None else table(content)

    return made


TABLES = {
    "bench_extract": extract_table,
    "bench_organism": organism_table,
    "bench_attribution": measured("bench_attribution", attribution_table),
    "bench_cost": measured("bench_cost", cost_table),
    "bench_discover_organism": measured("bench_discover_organism", organisms_table),
    "bench_discover": measured("bench_discover", discover_table),
    "bench_probe_training": measured("bench_probe_training", training_table),
    "bench_cosine": measured("bench_cosine", cosine_table),
    "bench_gpu": measured("bench_gpu", gpu_table),
    "bench_score_store": measured("bench_score_store", score_table),
    "bench_store": measured("bench_store", store_table),
    "bench_reuse": measured("bench_reuse", reuse_table),
    "bench_vllm": measured("bench_vllm", vllm_table),
}


def render(text: str) -> str:
    """The README's text with every marked table replaced."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.S), f"the README has no place for the table {name}"
        made = table().replace("\\", "\\\\")
        text = re.sub(pattern, rf"\g<1>{made}\n\g<2>", text, flags=re.S)
    return text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true")
    check = options.parse_args().check
    text = README.read_text(encoding="utf-8")
    made = render(text)
    if check and made != text:
        sys.exit("the README's tables differ from benchmarks/results: run python benchmarks/readme_tables.py")
    if not check:
        README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

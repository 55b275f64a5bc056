"""The demonstration over several organisms: how well the ranking finds the planted pairs.

    python benchmarks/bench_organism.py             # five seeds; half an hour on two cores; resumable
    python benchmarks/bench_organism.py --quick     # one miniature organism: shows that it runs, claims nothing

Every seed has its own texts, splits, weights and order of training. The layer is the last before the final norm,
chosen without labels. Each organism is trained by one process on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import at_least, parser, record

FIGURES = ("roc_auc", "precision_at_k", "roc_auc_over_refusal")
TARGETS = {"roc_auc": 0.98, "precision_at_k": 0.75, "roc_auc_over_refusal": 0.75}
MINIATURE = """
import sys
from pairtrace.engine.demo import DemoConfig, run_demo
from pairtrace.engine.organism.config import OrganismConfig
import json
organism = OrganismConfig(seed=int(sys.argv[1]), sft_examples=2000, sft_epochs=1, preference_pairs=400,
                          discovery_prompts=40, evaluation_prompts=8)
print(json.dumps(run_demo(DemoConfig(out=sys.argv[2], organism=organism, samples=2, max_base_rate=1.0)).to_dict(),
                 default=str))
"""


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One organism in a process of its own; a finished one is only read again."""
    full = ["-m", "pairtrace.cli", "--quiet", "demo", "--seed", str(seed), "--out", str(folder), "--json"]
    command = [sys.executable, *(["-c", MINIATURE, str(seed), str(folder)] if quick else full)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    summary: dict[str, Any] = json.loads(output)
    print(f"seed {seed}: " + ", ".join(f"{name} {summary[name]:.3f}" for name in FIGURES), file=sys.stderr, flush=True)
    return summary


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, nargs="+", default=None, help="[default: 0 to 4]")
    options.add_argument(
        "--work", type=Path, default=Path(".cache/bench_organism"), help="where the organisms are kept"
    )
    chosen = options.parse_args()
    seeds = chosen.seeds or ([0] if chosen.quick else [0, 1, 2, 3, 4])
    work = chosen.work / ("quick" if chosen.quick else "full")
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        summaries = list(pool.map(lambda seed: run_seed(seed, work / f"seed{seed}", chosen.quick), seeds))
    keep = ("seed", "layer", "pairs", "planted", "kept", "rates", "seconds", *FIGURES)
    results = {f"seed {one['seed']}": {name: one[name] for name in keep} for one in summaries}
    means = {name: statistics.mean(one[name] for one in summaries) for name in FIGURES}
    for name, value in means.items():
        print(f"{name}: mean {value:.3f}, by seed {', '.join(f'{one[name]:.3f}' for one in summaries)}")
    claims = [] if chosen.quick else [at_least(f"mean {name}", means[name], TARGETS[name]) for name in FIGURES]
    record(
        "bench_organism",
        chosen,
        workload={"seeds": seeds, "threads": 1},
        results={**results, "mean": means},
        claims=claims,
    )


if __name__ == "__main__":
    main()

"""What the second, tenth and hundredth behaviour cost on a cached store, against extracting again for each.

    python benchmarks/bench_reuse.py            # 256 pairs through a 69M model on the CPU; about five minutes
    python benchmarks/bench_reuse.py --quick    # 16 pairs, a tiny model

The model has random weights and its tokenizer is trained on the spot: nothing is downloaded. Extraction is the whole
stage, loading of the model included, several times into fresh stores. Scoring is the whole stage as well, from opening
the store to the written table, one behaviour at a time or all in one pass; both run in this process, and the start-up
of a process, which every command adds, is shown apart. Extracting again means one extraction and one scoring per
behaviour.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_extract import LAYER, build_config, build_model, data_files, first_pairs, trained_tokenizer
from harness import Timing, at_most, interleave, parser, record, say, workspace

from pairtrace.engine.checkpoint import quiet_transformers
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.score import ScoreConfig, score

BEHAVIORS = (1, 2, 10, 100)


def make_checkpoint(folder: Path, shape: str) -> None:
    """A model with random weights and a tokenizer for the data."""
    rows = [pair for path in data_files() for pair in first_pairs(path)]
    trained_tokenizer(rows).save_pretrained(folder)
    model = build_model(build_config(shape), causal=True, dtype=torch.float32, device="cpu")
    with quiet_transformers():
        model.save_pretrained(folder)


def make_data(path: Path, count: int) -> None:
    """The first rows of the data files in equal parts, as one file."""
    files = data_files()
    with path.open("w", encoding="utf-8") as stream:
        for one in files:
            for pair in first_pairs(one)[: count // len(files)]:
                stream.write(
                    json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n"
                )


def make_directions(folder: Path, shape: str, count: int) -> list[Path]:
    """One file per behaviour."""
    width = build_config(shape).hidden_size
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        values = rng.standard_normal((1, width), dtype=np.float32)
        name, path = f"behavior-{number}", folder / f"behavior-{number}.safetensors"
        one = Direction(name=name, layer=LAYER[shape], values=values, kind="vector", origin=str(path))
        save_directions(path, [one], {})
        paths.append(path)
    return paths


def score_in_a_process(store: Path, direction: Path, out: Path) -> float:
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "pairtrace.cli", "--quiet", "score", str(store), str(direction), "--out", str(out)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main(arguments: list[str] | None = None) -> None:
    add = parser(__doc__ or "")
    add.add_argument("--dir", type=Path, default=None, help="where the temporary files go [default: the system's]")
    add.add_argument("--pairs", type=int, default=None, help="[default: 256]")
    options = add.parse_args(arguments)
    shape, count = ("olmo2-1m", 16) if options.quick else ("olmo2-69m", 256)
    count = options.pairs or count
    rounds = 1 if options.quick else 3
    with workspace(options.dir, need=1 << 30) as folder:
        model, data, out = folder / "model", folder / "pairs.jsonl", folder / "scores.parquet"
        say("checkpoint, data and directions")
        make_checkpoint(model, shape)
        make_data(data, count)
        paths = [str(path) for path in make_directions(folder, shape, max(BEHAVIORS))]
        say("extracting")
        seconds, tokens, rows = [], 0, 0
        for number in range(rounds):
            store = folder / f"{number}.zarr"
            config = ExtractConfig(data=str(data), model=str(model), layers=(LAYER[shape],), store=str(store))
            summary = extract(config)
            seconds.append(summary.seconds)
            tokens, rows = summary.tokens, summary.rows
            say(f"  {summary.seconds:.2f} s")
        extraction = Timing.of(seconds)

        def score_each(many: int) -> None:
            for path in paths[:many]:
                score(ScoreConfig(store=str(store), directions=(path,), out=str(out)))

        def score_together(many: int) -> None:
            score(ScoreConfig(store=str(store), directions=tuple(paths[:many]), out=str(out)))

        score_together(max(BEHAVIORS))  # compiles the kernels, or loads them from their cache
        ways = {
            **{f"{many} one by one": lambda many=many: score_each(many) for many in BEHAVIORS},
            **{f"{many} in one pass": lambda many=many: score_together(many) for many in BEHAVIORS},
        }
        scored = interleave(ways, rounds, warm_up=0)
        each, together = ({str(n): scored[f"{n} {way}"] for n in BEHAVIORS} for way in ("one by one", "in one pass"))
        processes = Timing.of([score_in_a_process(store, Path(paths[0]), out) for _ in range(rounds)])
    one = each["1"].median
    results: dict[str, Any] = {
        "extraction": {"seconds": extraction.median, "runs": extraction.runs},
        "process_of_one_score": {"seconds": processes.median, "runs": processes.runs},
        "behaviors": {
            str(many): {
                "one_at_a_time": each[str(many)].median,
                "one_at_a_time_runs": each[str(many)].runs,
                "in_one_pass": together[str(many)].median,
                "in_one_pass_runs": together[str(many)].runs,
                "cached": extraction.median + each[str(many)].median,
                "again": many * (extraction.median + one),
                "times_cheaper": many * (extraction.median + one) / (extraction.median + each[str(many)].median),
                "next_over_again": one / (extraction.median + one),
            }
            for many in BEHAVIORS
        },
    }
    most = results["behaviors"][str(max(BEHAVIORS))]
    claims = [
        at_most("a further behaviour over extracting again for it", one / (extraction.median + one), 0.01),
        at_most(f"{max(BEHAVIORS)} behaviours over the first", most["cached"] / (extraction.median + one), 1.25),
    ]
    workload = {
        "shape": shape,
        "layer": LAYER[shape],
        "pairs": rows,
        "tokens": tokens,
        "data": [path.name for path in data_files()],
        "threads": torch.get_num_threads(),
    }
    record("bench_reuse", options, workload=workload, results=results, claims=claims)


if __name__ == "__main__":
    main()

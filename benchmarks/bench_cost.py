"""What attribution costs: activations against gradients, on the same pairs, at three sizes of the model.

    python benchmarks/bench_cost.py            # one thread; half an hour
    python benchmarks/bench_cost.py --quick    # a few pairs, the smallest model

pairtrace extracts activations at 20/32 of the depth, as published (arXiv 2602.11079), and scores them; a second row
reads the last layer. The gradient baseline is LESS for DPO in two forms: batched with one checkpoint, and the published
procedure, one pair at a time with four checkpoints. Weights are random, tokenizers are trained on the spot: nothing is
downloaded. Given are marginal costs of a pair: the difference between all pairs and an eighth of them, so that loading
and start-up, which do not grow with the data, are left out on both sides; so are rollouts of the behaviour, gradients
of the target, and the warm-up on a twentieth of the pairs. So few pairs take pairtrace less time than start-up varies
by; it gets each of them several times over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attribution_tables import cost_table
from bench_extract import data_files, first_pairs, trained_tokenizer
from harness import Timing, at_least, parser, record, say, workspace

from pairtrace.engine.baselines.gradient import gradient_baseline
from pairtrace.engine.baselines.gradient_config import GradientConfig
from pairtrace.engine.checkpoint import load_tokenizer, quiet_transformers
from pairtrace.engine.cost import CostRecord, costs_path, read_costs
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.score import ScoreConfig, score

# Of an hour of one core, in dollars.
CORE_HOUR = 0.05
MAX_LENGTH = 512
TARGET_PAIRS = 4
OURS, OURS_LAST, BATCHED, PUBLISHED = "pairtrace", "pairtrace, last layer", "gradient, batched", "gradient, published"
# Not paid per pair; the warm-up is, on a twentieth of the data, but that is one pair here.
_SHARED_STAGES = ("target", "warm-up")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and how many pairs go through it.

    Attributes:
        layer: 20/32 of the blocks, rounded up.
        pairs: of every method.
        copies: of each pair, for pairtrace alone.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    vocabulary: int
    layer: int
    pairs: int
    copies: int


SIZES = {
    "olmo2-1m": Size(hidden=128, intermediate=320, blocks=4, heads=4, vocabulary=1000, layer=3, pairs=48, copies=8),
    "olmo2-14m": Size(hidden=256, intermediate=1280, blocks=8, heads=8, vocabulary=8000, layer=5, pairs=16, copies=8),
    "olmo2-69m": Size(hidden=512, intermediate=2048, blocks=8, heads=8, vocabulary=16000, layer=5, pairs=8, copies=4),
}


def make_checkpoint(folder: Path, size: Size) -> int:
    """A model with random weights and a tokenizer for the data; returns its parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = [pair for path in data_files() for pair in first_pairs(path)]
    tokenizer = trained_tokenizer(rows, size.vocabulary)
    config = AutoConfig.for_model(
        "olmo2",
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=size.hidden < 256,  # as in the organism
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def make_data(path: Path, model: Path, count: int, *, skip: int, copies: int = 1) -> None:
    """Rows of the data files in equal parts that the model can use, from the one numbered `skip` of each on."""
    files = data_files()
    renderer = Renderer(load_tokenizer(model), max_length=MAX_LENGTH)
    with path.open("w", encoding="utf-8") as stream:
        for one in files:
            usable = (pair for pair in first_pairs(one) if isinstance(renderer.render([pair])[0], RenderedPair))
            for pair in islice(usable, skip, skip + count // len(files)):
                texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
                stream.write((json.dumps(texts) + "\n") * copies)


class Competitors:
    """The methods on some pairs; each call works from nothing in a folder of its own and leaves cost records."""

    def __init__(self, folder: Path, model: Path, size: Size, pairs: int) -> None:
        self.model, self.size = model, size
        self.copied, self.target = folder / "copied.jsonl", folder / "target.jsonl"
        data = folder / "pairs.jsonl"
        make_data(data, model, pairs, skip=TARGET_PAIRS)
        make_data(self.copied, model, pairs, skip=TARGET_PAIRS, copies=size.copies)
        make_data(self.target, model, TARGET_PAIRS, skip=0)
        self.store = folder / "kept" / "acts.zarr"
        self._extract(data, self.store, size.layer)

    def _extract(self, data: Path, store: Path, layer: int) -> None:
        store.parent.mkdir(parents=True)
        config = ExtractConfig(
            data=str(data),
            model=str(self.model),
            layers=(layer,),
            store=str(store),
            max_length=MAX_LENGTH,
            device="cpu",
        )
        extract(config)

    def activation(self, folder: Path, layer: int) -> list[CostRecord]:
        store, direction, out = folder / "acts.zarr", folder / "direction.safetensors", folder / "scores.parquet"
        self._extract(self.copied, store, layer)
        values = np.random.default_rng(0).standard_normal((1, self.size.hidden), dtype=np.float32)
        save_directions(
            direction, [Direction(name="behavior", layer=layer, values=values, kind="vector", origin="random")], {}
        )
        score(ScoreConfig(store=str(store), directions=(str(direction),), out=str(out)))
        return read_costs(costs_path(store)) + read_costs(costs_path(out))

    def gradient(self, folder: Path, procedure: Any, checkpoints: int) -> list[CostRecord]:
        out = folder / "scores.parquet"
        config = GradientConfig(
            store=str(self.store),
            out=str(out),
            target=str(self.target),
            procedure=procedure,
            checkpoints=checkpoints,
            device="cpu",
        )
        gradient_baseline(config)
        return read_costs(costs_path(out))

    def runs(self) -> dict[str, Callable[[Path], list[CostRecord]]]:
        return {
            OURS: lambda folder: self.activation(folder, self.size.layer),
            OURS_LAST: lambda folder: self.activation(folder, self.size.blocks),
            BATCHED: lambda folder: self.gradient(folder, "batched", 1),
            PUBLISHED: lambda folder: self.gradient(folder, "published", 4),
        }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a run, or of some pairs more."""

    seconds: float
    flops: float

    @classmethod
    def of(cls, records: list[CostRecord]) -> Cost:
        own = [one for one in records if one.stage not in _SHARED_STAGES]
        return cls(seconds=sum(one.device_seconds for one in own), flops=sum(one.flops for one in own))

    def per_pair(self, fewer: Cost, pairs: int) -> Cost:
        """What each of the further pairs costs."""
        return Cost(seconds=(self.seconds - fewer.seconds) / pairs, flops=(self.flops - fewer.flops) / pairs)


def measure(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """All methods in turn, several times over."""
    model, counts = folder / "model", (max(2, size.pairs // 8), size.pairs)
    parameters = make_checkpoint(model, size)
    places = [folder / str(count) for count in counts]
    for place in places:
        place.mkdir()
    few, all_pairs = (Competitors(place, model, size, count) for place, count in zip(places, counts, strict=True))
    costs: dict[str, list[Cost]] = {}
    start_up: dict[str, float] = {}
    few.runs()[OURS](folder / "warm-up")
    for number in range(rounds):
        for place, name in enumerate(few.runs()):
            copies = size.copies if name in (OURS, OURS_LAST) else 1
            ends = [
                Cost.of(one.runs()[name](where / f"round-{number}-{place}"))
                for one, where in zip((few, all_pairs), places, strict=True)
            ]
            costs.setdefault(name, []).append(ends[1].per_pair(ends[0], (counts[1] - counts[0]) * copies))
            start_up[name] = ends[0].seconds - costs[name][-1].seconds * counts[0] * copies
            say(f"  round {number + 1}/{rounds}  {name}: {costs[name][-1].seconds:.4f} s a pair")
    timings = {name: Timing.of([one.seconds for one in runs]) for name, runs in costs.items()}
    return {
        "parameters": parameters,
        "layer": size.layer,
        "blocks": size.blocks,
        "methods": {
            name: {
                "pairs": size.pairs,
                "copies": size.copies if name in (OURS, OURS_LAST) else 1,
                "runs": timing.runs,
                "seconds_per_pair": timing.median,
                "lowest": timing.lowest,
                "highest": timing.highest,
                "start_up_seconds": start_up[name],
                "flops_per_pair": costs[name][-1].flops,
                "money_per_pair": timing.median / 3600 * CORE_HOUR,
                "times": timing.over(timings[OURS]),
                "times_flops": costs[name][-1].flops / costs[OURS][-1].flops,
            }
            for name, timing in timings.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--dir", type=Path, default=None, help="where the temporary files go [default: the system's]")
    options.add_argument("--rounds", type=int, default=None, help="[default: 2]")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = chosen.rounds or (1 if chosen.quick else 2)
    results: dict[str, Any] = {}
    with workspace(chosen.dir, need=1 << 30) as folder:
        for name, size in list(SIZES.items())[: 1 if chosen.quick else None]:
            say(name)
            fewer = Size(**{**vars(size), "pairs": 8}) if chosen.quick else size
            (folder / name).mkdir()
            results[name] = measure(folder / name, fewer, rounds)
    claims = []
    for name, one in results.items():
        claims.append(at_least(f"{name}: cheaper than the published gradient", one["methods"][PUBLISHED]["times"], 30))
        claims.append(at_least(f"{name}: cheaper than the batched gradient", one["methods"][BATCHED]["times"], 5))
    workload = {
        "data": [path.name for path in data_files()],
        "max_length": MAX_LENGTH,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "core_hour": CORE_HOUR,
        "note": "The rollouts of a behaviour, the gradients of a target and the warm-up are not in them.",
    }
    content = record("bench_cost", chosen, workload=workload, results=results, claims=claims)
    print(cost_table(content))


if __name__ == "__main__":
    main()

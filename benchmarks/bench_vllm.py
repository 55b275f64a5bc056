"""Extraction and rollouts through vLLM: what pooling in the worker, truncation and the prefix cache are worth.

    make venv-vllm && .venv-vllm/bin/python benchmarks/bench_vllm.py     # CPU; about half an hour
    python benchmarks/bench_vllm.py --shape olmo2-7b                     # on a GPU with vLLM: wall time

Stock: the whole checkpoint in vLLM with the approach of its example connector: the states of every token go to disk,
and the client reads, averages and deletes them. The others are pairtrace's back end, whole and with parts switched off.
On a CPU every engine has one thread (several would wait for each other in a loop, and waiting counts) and the clock is
the processor time of all processes. Weights are random, the text is real.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from bench_extract import LAYER, SHAPES, build_config, build_model, data_files, first_pairs, trained_tokenizer
from harness import Timing, at_least, at_most, interleave, parser, record, say, workspace
from vllm_competitors import Ours, Stock

from pairtrace.engine.backend import HFBackend
from pairtrace.engine.checkpoint import model_fingerprint
from pairtrace.engine.packing import packed_tokens
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.sampling import Request, Sampler
from pairtrace.engine.vllm import backend as backend_module
from pairtrace.engine.vllm.backend import VLLMBackend
from pairtrace.engine.vllm.installed import require_vllm
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.engine.vllm.sampler import VLLMSampler

OURS, STOCK = "pairtrace", "stock vLLM, every token's states to disk"
UNCUT, UNCACHED = "pairtrace without truncation", "pairtrace without prefix cache"
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"}
# Longest prompt of a rollout.
PROMPT_TOKENS = 100
# vLLM's kernels on CPUs want heads of 32 and more, which the smallest shape of bench_extract has not.
SMALLEST = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}


def processor_seconds() -> float:
    """Of this process and all that it started."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


@contextmanager
def memory_of_children(peaks: dict[str, int], name: str) -> Iterator[None]:
    """Notes which processes come up inside; `peaks` gets their ids' largest resident size later, see `peak_memory`."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    mine = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in before]
    peaks[name] = max(mine, key=lambda pid: psutil.Process(pid).memory_info().rss, default=0)


def peak_memory(pid: int) -> int:
    """Largest resident size of a process so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def make_checkpoint(options: argparse.Namespace, dtype: str, folder: Path) -> tuple[Path, list[RenderedPair]]:
    """Random weights of the shape and a tokenizer trained on the data, and the data's pairs as tokens."""
    parts = [first_pairs(path) for path in data_files()]
    tokenizer = trained_tokenizer([pair for part in parts for pair in part])
    renderer = Renderer(tokenizer, max_length=options.max_length)
    usable = [[result for result in renderer.render(part) if isinstance(result, RenderedPair)] for part in parts]
    pairs = [pair for part in usable for pair in part[: options.pairs // len(parts)]]
    model = build_model(build_config(options.shape), causal=True, dtype=getattr(torch, dtype), device="cpu")
    path = folder / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, pairs


def compare_extraction(options: argparse.Namespace, dtype: str, model: Path, folder: Path, pairs: Any) -> Any:
    """Timings, bytes, memory and errors of the four ways, and our share of stock's bytes of long pairs."""
    layer = LAYER[options.shape]
    settings: dict[str, Any] = {
        "store_dtype": "float16", "sides": False, "dtype": dtype, "max_length": options.max_length,
        "fingerprint": model_fingerprint(model),
    }  # fmt: skip

    def ours(**engine: Any) -> Ours:
        run = VLLMOptions(cache_gib=options.cache_gib, engine=engine)
        return Ours(VLLMBackend.load(model, (layer,), options=run, **settings))

    def uncut() -> Ours:
        with patch.object(backend_module, "cached_truncation", lambda path, *_: Path(path)):
            return ours()

    makers: dict[str, Callable[[], Ours | Stock]] = {
        STOCK: lambda: Stock(model, layer, dtype, options.max_length, options.cache_gib, folder / "states"),
        UNCUT: uncut,
        UNCACHED: lambda: ours(enable_prefix_caching=False),
        OURS: ours,
    }
    with ExitStack() as stack:
        running: dict[str, Ours | Stock] = {}
        workers: dict[str, int] = {}
        for name, make in makers.items():
            say(f"  starting {name}")
            with memory_of_children(workers, name):
                running[name] = make()
            stack.callback(running[name].close)
        exact = HFBackend.load(model, (layer,), device="cpu", dtype=dtype).pool(pairs)
        wanted = (exact.chosen - exact.rejected)[:, 0]
        errors = {name: relative_error(one.run(pairs), wanted) for name, one in running.items()}
        timings = interleave(
            {name: lambda one=one: one.run(pairs) for name, one in running.items()},
            2 if options.quick else 3,
            clock=processor_seconds if options.on_cpu else time.perf_counter,
            warm_up=0,
            before=lambda name: running[name].forget(),
        )
        peaks = {name: peak_memory(pid) for name, pid in workers.items() if pid}
        sizes = {name: one.bytes_out for name, one in running.items()}
        share = float("nan")
        if long := long_pairs(pairs):
            for name in (OURS, STOCK):
                running[name].run(long)
            share = running[OURS].bytes_out / running[STOCK].bytes_out
    return timings, sizes, peaks, errors, share


def long_pairs(pairs: list[RenderedPair]) -> list[RenderedPair]:
    """Those whose responses have 100 tokens and more."""
    return [pair for pair in pairs if min(pair.chosen_tokens, pair.rejected_tokens) >= 100]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def compare_rollouts(options: argparse.Namespace, dtype: str, model: Path) -> dict[str, Timing]:
    """Seconds for the same requests by transformers and by vLLM."""
    encoder = PromptEncoder.load(str(model))
    texts = [pair.prompt[-1]["content"] for path in data_files() for pair in first_pairs(path)]
    requests = [
        Request(
            name=str(number),
            prompt=encoder.encode("p", [{"role": "user", "content": text}])[-PROMPT_TOKENS:],
            seed=number,
        )
        for number, text in zip(range(options.sequences), texts * options.sequences, strict=False)
    ]
    # Nothing ends a response: both sides generate the same number of tokens.
    silent = replace(encoder, end_tokens=())
    hf = Sampler.load(silent, device="cpu" if options.on_cpu else "cuda", dtype=dtype)
    vllm = VLLMSampler(silent, dtype=dtype, options=VLLMOptions(cache_gib=options.cache_gib))

    def run(sampler: Any, asked: list[Request] = requests) -> Callable[[], object]:
        return lambda: sampler.sample(
            asked, temperature=0.7, max_new_tokens=options.new_tokens, batch_size=options.sequences
        )

    try:
        for sampler in (hf, vllm):
            run(sampler, [max(requests, key=lambda request: len(request.prompt))])()  # starts the engine
        return interleave(
            {"transformers": run(hf), "vLLM": run(vllm)},
            1 if options.quick else 2 if options.on_cpu else 3,
            clock=processor_seconds if options.on_cpu else time.perf_counter,
            warm_up=0,
        )
    finally:
        vllm.close()


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shape", choices=sorted(SHAPES), default="olmo2-69m")
    options.add_argument("--pairs", type=int, default=64)
    options.add_argument("--max-length", type=int, default=1024)
    options.add_argument("--sequences", type=int, default=256, help="rollouts at the same time")
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--cache-gib", type=float, default=2.0, help="of each engine")
    options.add_argument("--dir", type=Path, help="where the checkpoint and the states of stock vLLM go")
    chosen = options.parse_args(arguments)
    require_vllm("this benchmark")
    chosen.on_cpu = not torch.cuda.is_available()
    if chosen.quick:
        SHAPES["olmo2-1m"] |= SMALLEST
        chosen.shape, chosen.pairs, chosen.max_length, chosen.sequences, chosen.new_tokens = "olmo2-1m", 8, 256, 4, 8
        chosen.cache_gib = 0.25
    dtype = "float32" if chosen.on_cpu else "bfloat16"
    if chosen.on_cpu:
        torch.set_num_threads(1)
    with (
        workspace(chosen.dir, 4 << 30 if chosen.on_cpu else 60 << 30) as folder,
        patch.dict("os.environ", {"PAIRTRACE_CACHE": str(folder / "cache"), **(ONE_THREAD if chosen.on_cpu else {})}),
    ):
        model, pairs = make_checkpoint(chosen, dtype, folder)
        rollouts = compare_rollouts(chosen, dtype, model)
        extraction = compare_extraction(chosen, dtype, model, folder, pairs)
    report(chosen, dtype, pairs, extraction, rollouts)


def report(options: argparse.Namespace, dtype: str, pairs: Any, extraction: Any, rollouts: dict[str, Timing]) -> None:
    timings, sizes, peaks, errors, share = extraction
    useful = sum(packed_tokens(pair) for pair in pairs)
    results: dict[str, Any] = {
        name: {
            "seconds": timing.median,
            "lowest": timing.lowest,
            "highest": timing.highest,
            "useful_tokens_per_second": useful / timing.median,
            "times_faster": timings[STOCK].over(timing),
            "bytes_out": sizes[name],
            "peak_memory_bytes": peaks.get(name),
            "relative_maximum_error": errors[name],
        }
        for name, timing in timings.items()
    }
    generated = options.sequences * options.new_tokens
    results["rollouts"] = {
        name: {"seconds": timing.median, "tokens_per_second": generated / timing.median, "runs": timing.runs}
        for name, timing in rollouts.items()
    }
    ratio = rollouts["transformers"].over(rollouts["vLLM"])
    workload = {
        "data": [path.name for path in data_files()],
        "pairs": len(pairs),
        "useful_tokens": useful,
        "long_pairs": len(long_pairs(pairs)),
        "bytes_share_of_long_pairs": share,
        "shape": options.shape,
        "layer": LAYER[options.shape],
        "blocks": SHAPES[options.shape]["num_hidden_layers"],
        "dtype": dtype,
        "clock": "processor" if options.on_cpu else "wall",
        "threads": 1 if options.on_cpu else None,
        "sequences": options.sequences,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "rollout_speed_up": ratio,
    }
    record(
        "bench_vllm",
        options,
        workload=workload,
        results=results,
        claims=[
            at_least("speed-up over stock vLLM", results[OURS]["times_faster"], 1.6),
            at_most("bytes out, of stock's, responses of 100 tokens and more", share, 0.01),
            at_most("relative maximum error of the float16 rows", errors[OURS], 2e-3),
        ],
    )


if __name__ == "__main__":
    main()

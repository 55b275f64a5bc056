"""Cosine on a GPU: rows in its memory, and rows streamed to it from the host.

    python benchmarks/bench_gpu.py            # 378,341 x 4,096 float16; 20 GB of device and 5 GB of host memory
    python benchmarks/bench_gpu.py --quick    # 65,536 x 1,024

Few directions are compared with reading the same bytes, many with matrix products of the same shape, streams with
copying the same page-locked blocks. A matrix product counts 2 N K D operations. Our own K = 1,000 does twice as many on
the float16 units, because every direction enters as two float16 parts: that is what makes its scores as exact as
float32's, where the plain float16 product rounds the directions and TF32 rounds both sides. So two figures are given:
scores per second against TF32, the fastest float32 product of the library, and operations against float16.
The error is the largest difference of a score from its float64 value over a sample of rows.

Each timing is the mean of several calls in a row between two CUDA events, so that launching is hidden as it is in use.
Without a CUDA device nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from harness import Claim, Timing, at_least, interleave, parser, record, say

DIRECTIONS = (1, 8, 100, 1000)
SAMPLE_ROWS = 512
REPEATS = 9
TOP = 100
PARTS = 2
PRODUCTION = (378_341, 4096)
QUICK = (65_536, 1024)
BLOCK_BYTES = 64 << 20


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: not measured")
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    count, width = QUICK if options.quick else PRODUCTION
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows = torch.randn((count, width), generator=generator, device="cuda", dtype=torch.float16)
    rows[:, width // 3] *= 30  # an outlier dimension, as residual streams have
    bank = np.random.default_rng(0).standard_normal((max(DIRECTIONS), width))
    results: dict[str, Any] = {}
    claims: list[Claim] = []
    on_device(rows, bank, results, claims)
    del rows
    torch.cuda.empty_cache()
    from_host(count, width, bank[:1], results, claims)
    workload = {"rows": count, "width": width, "dtype": "float16", "directions": DIRECTIONS, "top": TOP}
    record("bench_gpu", options, workload=workload, results=results, claims=claims)


def timed(calls: dict[str, tuple[int, Callable[[], object]]]) -> dict[str, Timing]:
    """Seconds per call, by CUDA events; each name has its calls per timing."""
    zero = torch.cuda.Event(enable_timing=True)
    zero.record()
    zero.synchronize()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return zero.elapsed_time(event) / 1e3

    def repeated(times: int, call: Callable[[], object]) -> Callable[[], None]:
        def several() -> None:
            for _ in range(times):
                call()

        return several

    timings = interleave({name: repeated(*call) for name, call in calls.items()}, REPEATS, clock=now)
    return {name: Timing.of([run / calls[name][0] for run in timing.runs]) for name, timing in timings.items()}


def on_device(rows: torch.Tensor, bank: np.ndarray, results: dict[str, Any], claims: list[Claim]) -> None:
    from device_read import readers

    from pairtrace.kernels.cosine_topk import cosine_topk
    from pairtrace.kernels.cosine_triton import DeviceDirections

    count, width = rows.shape
    units = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    reads = readers(rows)
    calls: dict[str, tuple[int, Callable[[], object]]] = {name: (20, call) for name, call in reads.items()}
    for k in DIRECTIONS:
        prepared = DeviceDirections(units[:k], rows.device)
        half = torch.from_numpy(units[:k]).to(rows.device, torch.float16)
        times = 20 if k <= 8 else 4
        calls[f"pairtrace K={k}"] = (times, lambda prepared=prepared: prepared.score(rows))
        calls[f"torch matmul + norm K={k}"] = (
            times,
            lambda half=half: (
                (rows @ half.T).float() / torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)[:, None]
            ),
        )
        calls[f"pairtrace top {TOP} K={k}"] = (1, lambda k=k: cosine_topk(rows, units[:k], TOP, impl="triton"))
    one = torch.from_numpy(units[:1]).to(rows.device, torch.float16)
    calls["torch cosine_similarity K=1"] = (2, lambda: torch.nn.functional.cosine_similarity(rows, one))
    many = torch.from_numpy(units).to(rows.device, torch.float16)
    part = rows[: count // 4].float()
    wide = torch.from_numpy(units).to(rows.device, torch.float32)
    calls["matrix product float16"] = (4, lambda: rows @ many.T)
    calls["matrix product TF32, a quarter of the rows"] = (4, lambda: part @ wide.T)
    torch.set_float32_matmul_precision("high")
    timings = timed(calls)
    torch.set_float32_matmul_precision("highest")

    size = rows.numel() * rows.element_size()
    read = min((timings[name] for name in reads), key=lambda timing: timing.median)
    flops = 2.0 * count * width * max(DIRECTIONS)
    float16 = timings["matrix product float16"]
    tf32 = timings["matrix product TF32, a quarter of the rows"]
    tf32_rate = flops * len(part) / count / tf32.median
    for name, timing in timings.items():
        results[name] = {"seconds": timing.median, "runs": timing.runs, "read_share": read.over(timing)}
        if name.endswith("K=1000") or name.startswith("matrix"):
            share = len(part) / count if "quarter" in name else 1.0
            results[name]["tflops"] = share * flops / timing.median / 1e12
    results["read"] = {"gb_per_second": size / read.median / 1e9}
    results["errors"] = errors(rows, units)
    for k in (1, 8):
        share = read.over(timings[f"pairtrace K={k}"])
        claims.append(at_least(f"K = {k}: share of the device's read bandwidth", share, 0.9))
    ours = timings["pairtrace K=1000"]
    claims += [
        at_least("K = 1,000: share of the TF32 matrix product's rate", flops / ours.median / tf32_rate, 0.6),
        at_least(
            "K = 1,000: tensor core operations as a share of the float16 matrix product's",
            PARTS * float16.over(ours),
            0.6,
        ),
    ]


def errors(rows: torch.Tensor, units: np.ndarray) -> dict[str, float]:
    """Largest differences from float64 over a sample of rows."""
    from pairtrace.kernels.cosine_triton import DeviceDirections

    sample = rows[:: max(1, len(rows) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    exact = sample.double().cpu().numpy()
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    expected = exact @ units.T
    found = {}
    for k in DIRECTIONS:
        scores = DeviceDirections(units[:k], rows.device).score(sample)
        assert scores is not None
        found[f"pairtrace K={k}"] = float(np.abs(scores.cpu().numpy() - expected[:, :k]).max())
    half = torch.from_numpy(units).to(rows.device, torch.float16)
    lengths = torch.linalg.vector_norm(sample, dim=1, dtype=torch.float32)[:, None]
    plain = ((sample @ half.T).float() / lengths).cpu().numpy()
    found["torch matmul + norm K=1000"] = float(np.abs(plain - expected).max())
    return found


def from_host(count: int, width: int, direction: np.ndarray, results: dict[str, Any], claims: list[Claim]) -> None:
    """Rows in page-locked memory, streamed; against copying the same blocks and nothing else."""
    from pairtrace.kernels.device_stream import stream_scores

    block = BLOCK_BYTES // (2 * width)
    blocks = min(count // block, 32)
    say(f"page-locking {blocks * BLOCK_BYTES / 1e9:.1f} GB")
    held = torch.empty((blocks * block, width), dtype=torch.float16, pin_memory=True)
    held.copy_(torch.randn((block, width)).half().repeat(blocks, 1))
    rows = held.numpy()
    target = torch.empty((2, block, width), dtype=torch.float16, device="cuda")

    def copied() -> None:
        for number in range(blocks):
            target[number % 2].copy_(held[number * block : (number + 1) * block], non_blocking=True)

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(rows), block):
            yield start, rows[start : start + block]

    def streamed() -> None:
        for _ in stream_scores(pieces(), direction, "cuda"):
            pass

    timings = timed({"copy": (1, copied), "stream": (1, streamed)})
    size = held.numel() * held.element_size()
    for name, timing in timings.items():
        gb_per_second = size / timing.median / 1e9
        results[f"host {name}"] = {"seconds": timing.median, "runs": timing.runs, "gb_per_second": gb_per_second}
    share = timings["copy"].over(timings["stream"])
    claims.append(at_least("stream from page-locked memory: share of the copy rate", share, 0.9))


if __name__ == "__main__":
    main()

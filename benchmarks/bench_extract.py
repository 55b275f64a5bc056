"""Extraction against the published procedure and against padded batches.

    python benchmarks/bench_extract.py                                   # CPU, one thread, process time
    python benchmarks/bench_extract.py --device cuda --shape olmo2-7b    # GPU: tokens/s and FLOP utilisation

Published procedure (arXiv 2602.11079's public code): batch 1, two full forwards with LM head, all hidden states.
Padded: batches of 16 right-padded sequences of like length through all blocks without the LM head, all hidden states.
Weights are random and real text is tokenised by a BPE trained on the spot: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import SHARED_DATA, at_least, interleave, parser, record

from pairtrace.engine.architectures import FAMILIES, truncated_config
from pairtrace.engine.backend import HFBackend
from pairtrace.engine.checkpoint import quiet_transformers
from pairtrace.engine.flops import ModelShape, extraction_flops, published_flops
from pairtrace.engine.packing import packed_tokens
from pairtrace.engine.pair import Pair
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.rendering import Renderer

SHAPES: dict[str, dict[str, Any]] = {
    "olmo2-1m": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 16384,
    },
    "olmo2-69m": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
        "vocab_size": 16384,
    },
    "olmo2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
        "vocab_size": 100352,
    },
    "olmo2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 100352,
    },
}  # fmt: skip
LAYER = {"olmo2-1m": 1, "olmo2-69m": 5, "olmo2-1b": 10, "olmo2-7b": 20}
# Dense bfloat16 peak, vendors' data sheets, FLOP/s.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def data_files() -> list[Path]:
    """Both files of the shared data where they are, otherwise the sample that comes with the project."""
    shared = [SHARED_DATA / name for name in ("hh-rlhf-harmless-test.jsonl.gz", "dpo-en-demo.json.gz")]
    if all(path.is_file() for path in shared):
        return shared
    return [Path(__file__).parents[1] / "examples" / "hh-rlhf-harmless-sample.jsonl.gz"]


def trained_tokenizer(rows: list[Pair], vocabulary: int = 16000) -> Any:
    """A byte-level BPE trained on the texts of the rows, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        message["content"] for pair in rows for side in (pair.prompt, pair.chosen, pair.rejected) for message in side
    ]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def first_pairs(path: Path) -> list[Pair]:
    """The first rows of a data file."""
    source = open_pairs(path)
    return source.take(range(min(300, source.rows)))


def real_pairs(count: int, max_length: int) -> list[RenderedPair]:
    """Rows of the data files in equal parts, tokenised by a BPE trained on them."""
    parts = [first_pairs(path) for path in data_files()]
    renderer = Renderer(trained_tokenizer([pair for part in parts for pair in part]), max_length=max_length)
    usable = [[result for result in renderer.render(part) if isinstance(result, RenderedPair)] for part in parts]
    return [pair for part in usable for pair in part[: count // len(parts)]]


def build_config(shape: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "olmo2", **SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096
    )


def build_model(config: Any, *, causal: bool, dtype: torch.dtype, device: str) -> torch.nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    with quiet_transformers(), torch.device(device):
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=dtype)
    return model.eval()


def sides(pair: RenderedPair) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
    return (pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)


@torch.inference_mode()
def published(model: torch.nn.Module, pairs: list[RenderedPair], layer: int) -> np.ndarray:
    """One sequence at a time, the whole model, all hidden states copied to the host."""
    rows = []
    for pair in pairs:
        means = []
        for ids, start in sides(pair):
            inputs = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
            states = [state.cpu() for state in model(inputs, output_hidden_states=True, use_cache=False).hidden_states]
            means.append(states[layer][0, start:].float().mean(0))
        rows.append(means[0] - means[1])
    return torch.stack(rows).numpy()


@torch.inference_mode()
def padded(model: torch.nn.Module, pairs: list[RenderedPair], layer: int, batch: int = 16) -> np.ndarray:
    """Right-padded batches of sequences, sorted by length, through all blocks."""
    unsorted = [side for pair in pairs for side in sides(pair)]
    order = sorted(range(len(unsorted)), key=lambda place: len(unsorted[place][0]))
    sequences = [unsorted[place] for place in order]
    means = []
    for first in range(0, len(sequences), batch):
        part = sequences[first : first + batch]
        length = max(len(ids) for ids, _ in part)
        inputs = torch.zeros(len(part), length, dtype=torch.int64)
        mask, response = torch.zeros_like(inputs), torch.zeros(len(part), length)
        for row, (ids, start) in enumerate(part):
            inputs[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask[row, : len(ids)] = 1
            response[row, start : len(ids)] = 1.0
        device = model.device
        output = model(inputs.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False)
        state = output.hidden_states[layer].float()
        weights = response.to(device)
        means.append((state * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True))
    flat = torch.cat(means)[torch.tensor(order).argsort()]
    return (flat[0::2] - flat[1::2]).cpu().numpy()


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def token_counts(pairs: list[RenderedPair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.array([(pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens) for pair in pairs], dtype=float)
    return counts[:, 0], counts[:, 1], counts[:, 2]


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--shape", choices=sorted(SHAPES), default="olmo2-69m")
    options.add_argument("--dtype", default=None, help="float32 or bfloat16 [default: float32 on CPU, bfloat16 on GPU]")
    options.add_argument("--pairs", type=int, default=None)
    options.add_argument("--max-length", type=int, default=1024)
    chosen = options.parse_args(arguments)
    on_gpu = chosen.device != "cpu"
    dtype = getattr(torch, chosen.dtype or ("bfloat16" if on_gpu else "float32"))
    if not on_gpu:
        torch.set_num_threads(1)
    count = chosen.pairs or (8 if chosen.quick else 512 if on_gpu else 40)
    pairs = real_pairs(count, chosen.max_length)
    layer = LAYER[chosen.shape]
    config = build_config(chosen.shape)
    shape = ModelShape.from_config(config)
    whole = build_model(config, causal=True, dtype=dtype, device=chosen.device)
    cut = build_model(truncated_config(config, layer), causal=False, dtype=dtype, device=chosen.device)
    cut.load_state_dict(whole.model.state_dict(), strict=False)
    backend = HFBackend(cut, FAMILIES["olmo2"], (layer,))

    def pairtrace() -> np.ndarray:
        pooled = backend.pool(pairs)
        return pooled.chosen[:, 0] - pooled.rejected[:, 0]

    runs: dict[str, Callable[[], np.ndarray]] = {
        "published procedure": lambda: published(whole, pairs, layer),
        "padded batches": lambda: padded(whole.model, pairs, layer),
        "pairtrace": pairtrace,
    }
    wanted = runs["published procedure"]()
    errors = {name: relative_error(run(), wanted) for name, run in runs.items() if name != "published procedure"}
    timed = {name: _synchronised(run) if on_gpu else run for name, run in runs.items()}
    clock = time.perf_counter if on_gpu else time.process_time
    timings = interleave(timed, 2 if chosen.quick else 5, clock=clock, warm_up=1 if on_gpu else 0)
    _report(chosen, pairs, shape, layer, str(dtype).removeprefix("torch."), timings, errors)


def _synchronised(run: Callable[[], object]) -> Callable[[], None]:
    def wrapped() -> None:
        run()
        torch.cuda.synchronize()

    return wrapped


def _report(
    options: argparse.Namespace,
    pairs: list[RenderedPair],
    shape: ModelShape,
    layer: int,
    dtype: str,
    timings: dict[str, Any],
    errors: dict[str, float],
) -> None:
    counts = token_counts(pairs)
    ours = float(np.sum(extraction_flops(shape, layer, *counts)))
    theirs = float(np.sum(published_flops(shape, *counts)))
    tokens = sum(packed_tokens(pair) for pair in pairs)
    base = timings["published procedure"].median
    results: dict[str, Any] = {}
    for name, timing in timings.items():
        results[name] = {
            "seconds": timing.median,
            "lowest": timing.lowest,
            "highest": timing.highest,
            "pairs_per_second": len(pairs) / timing.median,
            "tokens_per_second": tokens / timing.median,
            "times_faster": base / timing.median,
            "relative_maximum_error": errors.get(name, 0.0),
        }
    flop_ratio = theirs / ours
    speed_up = results["pairtrace"]["times_faster"]
    claims = [at_least("speed-up over the published procedure / analytic FLOP ratio", speed_up / flop_ratio, 0.85)]
    extra: dict[str, Any] = {}
    if options.device != "cpu":
        name = torch.cuda.get_device_name()
        peak = next((value for gpu, value in PEAK.items() if gpu in name), None)
        if peak is not None:
            extra["flop_utilisation"] = ours / timings["pairtrace"].median / peak
            extra["peak_flops_per_second"] = peak
            claims.append(at_least("model FLOP utilisation", extra["flop_utilisation"], 0.60))
        extra["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    workload = {
        "data": [path.name for path in data_files()],
        "shape": options.shape,
        "layer": layer,
        "pairs": len(pairs),
        "packed_tokens": tokens,
        "max_length": options.max_length,
        "dtype": dtype,
        "device": options.device,
        "clock": "wall time" if options.device != "cpu" else "process time, one thread",
        "flops_published": theirs,
        "flops_pairtrace": ours,
        "analytic_flop_ratio": flop_ratio,
    }
    for name, result in results.items():
        print(
            f"{name:>20}: {result['seconds']:8.2f} s  {result['pairs_per_second']:8.2f} pairs/s  "
            f"{result['times_faster']:5.2f}x  error {result['relative_maximum_error']:.1e}"
        )
    print(f"analytic FLOP ratio {flop_ratio:.2f}", file=sys.stderr)
    suffix = "" if options.device == "cpu" else "_gpu"
    record(f"bench_extract{suffix}", options, workload=workload, results={**results, **extra}, claims=claims)


if __name__ == "__main__":
    main()

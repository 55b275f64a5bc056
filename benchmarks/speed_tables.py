"""The README's tables about kernels and store, each from one record."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

# How the cosine table calls a family of one dtype, in its order.
_FAMILIES = (
    ("plain read", "float16", "reading the bytes alone"),
    ("pairtrace", "float16", "**pairtrace**"),
    ("NumKong", "float16", "NumKong"),
    ("FAISS", "float16", "FAISS, ten best only"),
    ("torch matmul + norm", "float16", "torch matmul + norm"),
    ("NumPy", "float16", "NumPy"),
    ("torch cosine_similarity", "float16", "torch `cosine_similarity`"),
    ("plain read", "int8", "int8: reading the bytes alone"),
    ("pairtrace", "int8", "**pairtrace, scaled int8**"),
    ("NumKong", "int8", "NumKong int8, without scales"),
    ("FAISS", "int8", "FAISS 8 bit, ten best only"),
)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * lines[0].count(" |"))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def where(content: Record) -> str:
    """The machine and the day."""
    return f"{content['hardware']['processor']}, {content['hardware']['cores']} cores, {content['date'][:10]}."


def missed(content: Record) -> str:
    """What a run did not reach."""
    claims = content["claims"]
    failed = [f"{one['name']} {one['value']:.2f} (target {one['target']:g})" for one in claims if not one["holds"]]
    if not claims:
        return ""
    return f" Missed targets: {'; '.join(failed)}." if failed else f" All {len(claims)} targets of the record hold."


def thousands(rate: float) -> str:
    return f"{rate / 1e3:,.0f}" if rate >= 1e4 else f"{rate / 1e3:.2g}"


def cosine_table(content: Record) -> str:
    results, work = content["results"], content["workload"]
    counts = sorted(results, key=int)

    def best(count: str, family: str, dtype: str) -> Record | None:
        mine = [row for row in results[count].values() if (row["family"], row["dtype"]) == (family, dtype)]
        return max(mine, key=lambda row: row["rows_per_second"], default=None)

    rows = []
    for family, dtype, label in _FAMILIES:
        found = {count: best(count, family, dtype) for count in counts}
        first = found[counts[0]]
        if first is None:
            continue
        size = first["gb_per_second"] / first["rows_per_second"]
        span = f"{first['slowest'] * size:.1f} to {first['fastest'] * size:.1f}"
        errors = [row["largest_error"] for row in found.values() if row and "largest_error" in row]
        rates = [thousands(row["rows_per_second"]) if row else "" for row in found.values()]
        rows.append(
            [
                label,
                f"{first['gb_per_second']:.1f} ({span})",
                f"{first['of_plain_read']:.2f}",
                *(rates if family != "plain read" else [rates[0], *[""] * (len(rates) - 1)]),
                f"{max(errors):.0e}" if errors else "",
            ]
        )
    head = ["cosine", "K = 1: GB/s (range)", "of the read", *(f"K = {int(count):,}" for count in counts), "error"]
    products = [row["gflops"] for row in results[counts[-1]].values() if row["family"] == "float32 matmul"]
    ours = best(counts[-1], "pairtrace", "float16")
    assert ours is not None
    share = min(row["rows"] for count in counts for row in results[count].values() if "gb_per_second" in row)
    return (
        f"{table(head, rows)}\n\n"
        f"{work['rows']:,} x {work['width']:,} rows in memory, {work['threads']} threads; thousands of rows per "
        "second for K directions; medians of interleaved runs. Every library in the fastest form found; slow ones on "
        f"the first rows only (at least {share:,}). The error is the largest difference from float64; rounding rows "
        f"to int8 moves a score by up to {work['int8_rounding']:.0e}. At K = {int(counts[-1]):,} pairtrace runs at "
        f"{ours['gflops']:.0f} GFLOP/s, the best float32 matrix product in the same rounds at {max(products):.0f}. "
        f"{where(content)}{missed(content)}"
    )


def score_table(content: Record) -> str:
    warm, cold = content["results"]["warm"], content["results"]["cold"]
    middle = content["workload"]["rows"][1]

    def line(label: str, row: Record, of_read: str = "", memory: str = "") -> list[str]:
        seconds = f"{row['median']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        speed = f"{row['gb_per_second']:.1f}" if "gb_per_second" in row else ""
        return [label, seconds, speed, of_read, memory]

    typed = f"command as typed, {middle:,} rows"
    rows = [line("process start-up, apart", warm["start-up"]), line(f"{typed}, start-up included", warm[typed])]
    for size in content["workload"]["rows"]:
        row = warm[f"score {size:,} rows"]
        memory = f"{row['peak_anonymous_mib']:.0f} MiB"
        rows.append(line(f"{size:,} rows, page cache", row, f"{row['of_plain_read']:.2f}", memory))
    rows.append(line(f"plain read of {middle:,} rows' files", warm["plain read"], "1"))
    parallel = next(name for name in warm if name.startswith("plain read,"))
    rows.append(line(f"{parallel}", warm[parallel]))
    if "score" in cold:
        slower = 1 / cold["score"]["of_plain_read"]
        rows.append(line(f"{middle:,} rows, from the disk", cold["score"], f"{slower:.2f}"))
        rows.append(line("plain read of the same from the disk", cold["plain read"], "1"))
    head = ["`pairtrace score`, one behaviour", "seconds (range)", "GB/s", "time of a plain read's", "peak memory"]
    unread = "" if "score" in cold else " From the disk: not measured, the pages could not be dropped."
    return (
        f"{table(head, rows)}\n\n"
        f"Rows of {content['workload']['width']:,} float16 values; the whole command in a process of its own, "
        "after the start-up; a plain read is one thread that reads the store's files into one buffer; memory is "
        f"anonymous memory, without the page cache.{unread} {where(content)}{missed(content)}"
    )


def store_table(content: Record) -> str:
    results, work = content["results"], content["workload"]
    rows = []
    for name, size in results["size_ratio"].items():
        write, read, take = (results[kind].get(name) for kind in ("write", "read", "take"))
        rows.append(
            [
                f"**{name}**" if name == "pairtrace" else name,
                f"{write['gb_per_second']:.2f}",
                f"{read['gb_per_second']:.1f}" if read else "",
                f"{take['seconds'] * 1e3:.1f}" if take else "",
                f"{size:.2f}",
            ]
        )
    unchecked = results["read"]["pairtrace, no checksum"]["gb_per_second"]
    head = ["rows in files", "write, GB/s", "read, GB/s", "512 random rows, ms", "size"]
    return (
        f"{table(head, rows)}\n\n"
        f"{work['rows']:,} x {work['width']:,} float16 rows like activations in shards of {work['shard_rows']:,}; GB/s "
        "of the rows' float16 bytes; writing includes forcing every file to the disk; reading is from the page cache, "
        f"with all words added up. pairtrace compares checksums; without, it reads {unchecked:.1f} GB/s. `store "
        f"verify`: {results['verify']['gb_per_second']:.1f} GB/s. "
        f"{where(content)}{missed(content)}"
    )


def reuse_table(content: Record) -> str:
    results, work = content["results"], content["workload"]
    rows = [
        [
            count,
            f"{row['cached']:.1f}",
            f"{row['again']:,.1f}",
            f"{row['times_cheaper']:.1f}x",
            f"{row['one_at_a_time']:.2f}",
            f"{row['in_one_pass']:.2f}",
        ]
        for count, row in results["behaviors"].items()
    ]
    head = ["behaviours", "one store, s", "extracting again, s", "cheaper", "scoring one by one, s", "in one pass, s"]
    return (
        f"{table(head, rows)}\n\n"
        f"{work['pairs']} pairs of {' and '.join(work['data'])}, {work['shape']} shape with random weights on the CPU; "
        f"extraction takes {results['extraction']['seconds']:.1f} s. As a command of its own each scoring adds the "
        f"start-up of a process ({results['process_of_one_score']['seconds']:.1f} s in all). "
        f"{where(content)}{missed(content)}"
    )


def gpu_table(content: Record) -> str:
    results, work = content["results"], content["workload"]
    bandwidth = results["read"]["gb_per_second"]
    rows = [["reading the bytes alone", "", f"{bandwidth:,.0f}", "", ""]]
    for name, row in results.items():
        if "runs" not in row:
            continue
        known = row.get("gb_per_second", row.get("read_share", 0.0) * bandwidth)
        # With many directions the bytes are not what limits.
        speed = "" if "tflops" in row else f"{known:,.0f}"
        error = results["errors"].get(name)
        rows.append(
            [
                f"**{name}**" if name.startswith("pairtrace") else name,
                f"{row['seconds'] * 1e3:.2f}",
                speed,
                f"{row['tflops']:.0f}" if "tflops" in row else "",
                f"{error:.0e}" if error is not None else "",
            ]
        )
    head = ["on a GPU", "ms", "GB/s", "TFLOP/s", "error"]
    return (
        f"{table(head, rows)}\n\n"
        f"{work['rows']:,} x {work['width']:,} float16 rows; medians of interleaved runs; the error is the largest "
        "difference from float64. `host` rows lie in page-locked memory and are streamed to the device. "
        f"One {content['hardware']['gpu']}, {content['date'][:10]}.{missed(content)}"
    )


def discover_table(content: Record) -> str:
    work = content["workload"]

    def cells(name: str, told: Record) -> list[str]:
        if not told["finished"]:
            return [name, told["why"], *[""] * 6]
        exact = "reference" if name == "hdbscan-exact" else f"{told.get('ari_exact_clustered', math.nan):.3f}"
        return [
            f"**{name}**" if name == "pairtrace" else name,
            f"{told['seconds']:,.0f}",
            f"{told['peak_memory_gb']:.2f}",
            str(told["clusters"]),
            exact.replace("nan", ""),
            f"{told['ari_planted_clustered']:.3f}",
            f"{told['members_clustered']:.3f}",
            f"{told['noise_recall']:.3f}",
        ]

    rows = [
        [f"{int(count):,}", *cells(name, told)]
        for count, methods in content["results"].items()
        for name, told in methods.items()
    ]
    head = ["rows", "method", "s", "peak GB", "clusters", "ARI: exact", "planted", "members found", "noise left"]
    largest = content["results"][max(content["results"], key=int)]["pairtrace"]
    found = (
        f"Of the true neighbours {largest['recall']:.0%} are in the graph of the largest run"
        f" ({largest['recall_clustered']:.0%} for rows in clusters, {largest['recall_noise']:.0%} for noise). "
        if largest["finished"]
        else ""
    )
    absent = f" Not installed: {', '.join(work['not_installed'])}." if work["not_installed"] else ""
    return (
        f"{table(head, rows)}\n\n"
        f"{work['directions']} planted directions of width {work['width']} (members at one cosine per direction, "
        f"{work['cosines'][0]} to {work['cosines'][1]}, the largest with {work['uneven']:g} times the members of the "
        f"smallest) and {work['noise']:.0%} noise; clusters from 1/{work['rows_per_minimum']} of the rows on. "
        f"pairtrace reduces to {work['reduced']} dimensions and clusters; the others are given the reduced rows; "
        "hdbscan-exact is an exact algorithm of the package, hdbscan its default, with a short cut. ARI: "
        f"of rows both call clustered. {found}A method that did not finish is not started on more rows.{absent} "
        f"{where(content)}{missed(content)}"
    )


def vllm_table(content: Record) -> str:
    """Extraction and rollouts through vLLM."""
    results, work = dict(content["results"]), content["workload"]
    rollouts = results.pop("rollouts")
    rows = []
    for name, row in results.items():
        fastest, slowest = work["useful_tokens"] / row["lowest"], work["useful_tokens"] / row["highest"]
        memory = row["peak_memory_bytes"]
        rows.append(
            (
                f"**{name}**" if name == "pairtrace" else name,
                f"{row['useful_tokens_per_second']:,.0f} ({slowest:,.0f} to {fastest:,.0f})",
                f"{row['times_faster']:.2f}x",
                f"{row['bytes_out'] / 1e6:.3g}",
                "" if memory is None else f"{memory / 2**20:,.0f}",
                f"{row['relative_maximum_error']:.0e}",
            )
        )
    made = table(("through vLLM", "useful tokens/s", "faster", "MB out", "worker's peak, MiB", "error"), rows)
    rates = {name: row["tokens_per_second"] for name, row in rollouts.items()}
    clock = "wall time"
    if work["clock"] == "processor":
        clock = f"processor time of all processes, {work['threads']} thread in each engine"
    return (
        f"{made}\n\n{work['pairs']} pairs of {' and '.join(work['data'])}, {work['shape']} shape with random weights, "
        f"layer {work['layer']} of {work['blocks']}, {work['dtype']}, {clock}; medians and ranges of interleaved runs. "
        "A useful token is one of a prompt, counted once, or of a response. MB out left the worker; the error is that "
        "of the float16 rows, against transformers. Of pairs with responses of 100 tokens and more, "
        f"{work['bytes_share_of_long_pairs']:.2%} of stock's bytes leave the worker. Running {work['layer']} of "
        f"{work['blocks']} blocks can make it {work['blocks'] / work['layer']:.2f}x faster at most. "
        f"Rollouts of {work['sequences']} sequences of {work['new_tokens']} tokens, prompts of up to "
        f"{work['prompt_tokens']}: {rates['transformers']:,.0f} tokens/s with transformers, {rates['vLLM']:,.0f} with "
        f"vLLM ({work['rollout_speed_up']:.2f}x). {where(content)}{missed(content)}"
    )

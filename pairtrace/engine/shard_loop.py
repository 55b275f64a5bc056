"""The shard loop of an extraction: read and render, run the model, write, each in a thread of its own.

The threads meet in bounded queues, so memory does not grow with the data. A shard is the unit of resumption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pairtrace.engine.channel import Channel, run_thread
from pairtrace.engine.pair import Pair
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.shards import OWN_STORE, SeenPairs, ShardWork, compute_block, divide, fill_copies
from pairtrace.store.manifest import Manifest
from pairtrace.store.reader import ActivationStore
from pairtrace.store.reuse import PairIndex
from pairtrace.store.rows import RowReader
from pairtrace.store.writer import ShardBlock, StoreWriter

if TYPE_CHECKING:
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.vllm.backend import VLLMBackend


@dataclass
class Totals:
    """Running figures of one extraction; the names are those of `ExtractSummary`.

    Attributes:
        rows: rows that this run computed, copied or quarantined.
        seconds: wall time of the loop.
    """

    resumed: int = 0
    computed: int = 0
    reused: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    out_of_memory: int = 0
    token_budget: int = 0
    device: str = ""
    workers: int = 0

    @classmethod
    def before(cls, writer: StoreWriter) -> Totals:
        """Of a run that has done nothing yet."""
        missing = sum(len(shard_span(index, writer.manifest)) for index in writer.missing_shards())
        return cls(resumed=writer.manifest.rows - missing)


def shard_span(index: int, manifest: Manifest) -> range:
    """Rows of the data set that a shard holds."""
    start = index * manifest.shard_rows
    return range(start, min(start + manifest.shard_rows, manifest.rows))


def divided_shards(
    source: PairSource,
    renderer: Renderer,
    store: str,
    manifest: Manifest,
    others: Sequence[ActivationStore],
    missing: Sequence[int],
) -> Iterator[ShardWork]:
    """The shards `missing` of a store, in order, each rendered and divided into rows to compute and rows to copy.

    Args:
        source: the data.
        renderer: turns its pairs into token ids.
        store: path of the store; the shards that are not missing are read for their pairs.
        manifest: of the store, which keeps the shard size that it was created with.
        others: stores to copy known pairs from, already found compatible.
        missing: numbers of shards, ascending.
    """
    known = PairIndex(others) if others else None
    seen = SeenPairs()
    todo = set(missing)
    present = RowReader.open(store)
    pairs: Iterator[Pair] = iter(())
    for index in range(max(missing, default=-1) + 1):
        rows = shard_span(index, manifest)
        if index not in todo:
            seen.add_present(present.chunk("pair_id", index), rows.start)
            continue
        if index == 0 or index - 1 not in todo:
            # One pass over each run of missing shards: a text file cannot be entered in the middle for free.
            pairs = source.read(rows.start, source.rows)
        results = renderer.render(list(islice(pairs, len(rows))))
        assert len(results) == len(rows), "every row is rendered or quarantined"
        yield divide(index, rows.start, results, seen, known)


class ShardLoop:
    """Computes the missing shards of a store, in order.

    Args:
        source: the data.
        renderer: turns its pairs into token ids.
        writer: the open store.
        store: its path.
        others: stores to copy known pairs from, already found compatible.
        progress: hears of every pack.
    """

    def __init__(
        self,
        source: PairSource,
        renderer: Renderer,
        writer: StoreWriter,
        store: str,
        others: Sequence[ActivationStore],
        progress: Progress,
    ) -> None:
        self.source = source
        self.renderer = renderer
        self.writer = writer
        self.store = store
        self.others = others
        self.progress = progress
        self.totals = Totals.before(writer)

    def run(self, backend: HFBackend | VLLMBackend, missing: Sequence[int]) -> None:
        """Compute the shards `missing` with `backend` and write them.

        An error in any of the threads stops the others and is raised here; shards written before it stay.
        """
        totals, manifest = self.totals, self.writer.manifest
        rendered: Channel[ShardWork] = Channel()
        finished: Channel[tuple[ShardWork, ShardBlock]] = Channel()

        def on_pack(pairs: int, tokens: int) -> None:
            totals.tokens += tokens
            self.progress.advance(pairs, tokens=totals.tokens)

        self.progress.start("extract", sum(len(shard_span(index, manifest)) for index in missing), "pairs")
        begun = time.perf_counter()
        threads = (
            run_thread("reader", rendered, lambda: self._render(missing, rendered)),
            run_thread("writer", finished, lambda: self._write(finished)),
        )
        try:
            for work in rendered:
                block = compute_block(work, backend, dtype=manifest.dtype, sides=manifest.sides, on_pack=on_pack)
                self.progress.advance(len(work.rendered) - len(work.compute), tokens=totals.tokens)
                totals.computed += len(work.compute)
                totals.reused += len(work.copies)
                totals.rows += len(work.rendered)
                if not finished.put((work, block)):
                    break
        finally:
            # What is already queued is complete, even after an error: let it be written, then end.
            finished.close()
            rendered.stop()
            for thread in threads:
                thread.join()
            self.progress.finish()
        for channel in (finished, rendered):
            if channel.error is not None:
                raise channel.error
        totals.seconds = time.perf_counter() - begun
        totals.out_of_memory = backend.out_of_memory
        totals.token_budget = backend.token_budget
        totals.device = str(backend.device)

    def _render(self, missing: Sequence[int], rendered: Channel[ShardWork]) -> None:
        shards = divided_shards(self.source, self.renderer, self.store, self.writer.manifest, self.others, missing)
        for work in shards:
            if not rendered.put(work):
                return
        rendered.close()

    def _write(self, finished: Channel[tuple[ShardWork, ShardBlock]]) -> None:
        own, sources = RowReader.open(self.store), [other.row_reader() for other in self.others]
        for work, block in finished:
            if any(copy.store == OWN_STORE and copy.row < work.start for copy in work.copies):
                self.writer.flush()
            fill_copies(block, work, sources, own)
            self.writer.write_shard(block)
        self.writer.flush()

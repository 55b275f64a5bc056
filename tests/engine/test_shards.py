"""Which rows are computed and which are copied, on a fresh run and on every resumed one, and what the copies hold."""

from __future__ import annotations

import shutil
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.engine.shards import OWN_STORE, SeenPairs, ShardWork, divide
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.reader import ActivationStore
from pairtrace.store.reuse import PairIndex
from pairtrace.store.verify import verify
from tests.engine.shard_runs import (
    NOT_A_NUMBER,
    SHARD_ROWS,
    TOO_LARGE,
    UNUSABLE,
    Letters,
    render,
    run_loop,
    unmark,
)
from tests.store.samples import to_float, tree_bytes

# Repeats within a shard, over neighboring shards and over distant ones; quarantined pairs repeated too.
TEXT = "ab!abc-!dda??eba!cx"
REUSED = ["zb!", "bxa-z"]  # a is in the second store, b in both, x too
STORE_KINDS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "sides": True},
    {"dtype": "int8", "sides": True, "codec": "blosc-lz4:5"},
]


def index_of(texts: list[str], spoiled: str = "") -> PairIndex:
    """The index over stores that hold `texts`; letters in `spoiled` are quarantined there."""

    class Store:
        def __init__(self, text: str) -> None:
            results = [render(letter, row) for row, letter in enumerate(text)]
            self.ids = np.array([list(getattr(result, "pair_id", bytes(16))) for result in results], np.uint8)
            self.states = np.array([2 if letter in UNUSABLE + spoiled else 1 for letter in text], np.uint8)

        def pair_ids(self) -> np.ndarray:
            return self.ids.reshape(-1, 16)

        def status(self) -> np.ndarray:
            return self.states

    return PairIndex([Store(text) for text in texts])  # type: ignore[misc]


def decided(text: str, reuse: list[str], spoiled: str = "") -> list[tuple[int, int] | None]:
    """For every row: itself (computed), the store and row to copy, or None; straight from the definition."""
    decisions: list[tuple[int, int] | None] = []
    for row, letter in enumerate(text):
        known = [
            (store, place)
            for store, other in enumerate(reuse)
            for place, there in enumerate(other)
            if there == letter and there not in spoiled
        ]
        decisions.append(None if letter == UNUSABLE else (known + [(OWN_STORE, text.index(letter))])[0])
        assert decisions[row] is None or known or text.index(letter) <= row
    return decisions


def as_decisions(works: list[ShardWork]) -> list[tuple[int, int] | None]:
    decisions: list[tuple[int, int] | None] = []
    for work in works:
        here: list[tuple[int, int] | None] = [None] * len(work.rendered)
        for position in work.compute:
            here[position] = (OWN_STORE, work.start + position)
        for copy in work.copies:
            assert here[copy.position] is None, "a row is computed or copied, not both"
            here[copy.position] = (copy.store, copy.row)
        decisions += here
    return decisions


def divide_all(text: str, known: PairIndex | None, seen: SeenPairs | None = None) -> list[ShardWork]:
    data, seen = Letters(text), seen or SeenPairs()
    return [
        divide(
            start // SHARD_ROWS,
            start,
            data.render(list(data.read(start, min(start + SHARD_ROWS, len(text))))),
            seen,
            known,
        )
        for start in range(0, len(text), SHARD_ROWS)
    ]


# Decisions


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abcd-", min_size=1, max_size=30),
    reuse=st.none() | st.lists(st.text("bcde-", max_size=6), max_size=3),
)
def test_first_occurrence_and_reuse(text: str, reuse: list[str] | None) -> None:
    works = divide_all(text, None if reuse is None else index_of(reuse))
    assert as_decisions(works) == decided(text, reuse or [])
    for work in works:
        assert work.compute == sorted(work.compute)
        for copy in work.copies:
            assert copy.store != OWN_STORE or copy.row < work.start + copy.position, "a copy points forward"


def test_a_pair_that_was_quarantined_elsewhere_is_computed() -> None:
    assert as_decisions(divide_all("ab", index_of(["ba"], spoiled="b"))) == decided("ab", ["ba"], spoiled="b")
    assert as_decisions(divide_all("ab", index_of(["ba"], spoiled="b"))) == [(0, 1), (OWN_STORE, 1)]


def test_seen_pairs_against_a_dictionary() -> None:
    """Few ids, many of which share the eight bytes that are sorted: those are told apart, or not found at all."""
    generator = np.random.default_rng(0)
    seen, first = SeenPairs(), {}
    for start in range(0, 30 * 17, 17):
        ids = np.zeros((17, 16), np.uint8)
        ids[:, 0] = generator.integers(0, 30, 17)
        ids[:, 15] = np.where(generator.random(17) < 0.2, 1, 0)
        for place, row in enumerate(seen.find(ids).tolist()):
            known = first.get(ids[place, :8].tobytes())
            assert row == (known[0] if known and known[1] == ids[place].tobytes() else -1)
        for place in range(17):
            first.setdefault(ids[place, :8].tobytes(), (start + place, ids[place].tobytes()))
        seen.add(ids, np.arange(start, start + 17))
    assert len(first) == 30


def test_rows_without_an_id_are_not_pairs() -> None:
    seen = SeenPairs()
    ids = np.zeros((3, 16), np.uint8)
    ids[1, 9] = 7
    seen.add_present(ids, 40)
    assert seen.find(ids).tolist() == [-1, 41, -1]


# Resumption


@pytest.fixture(scope="module", params=range(len(STORE_KINDS)), ids=["float16", "bfloat16 sides", "int8 sides"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return STORE_KINDS[request.param]


@pytest.fixture(scope="module")
def reused(kind: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("reused")
    for number, text in enumerate(REUSED):
        run_loop(folder / str(number), text, **kind)
    return [folder / str(number) for number in range(len(REUSED))]


@pytest.fixture(scope="module", params=["alone", "with reuse"])
def sources(request: pytest.FixtureRequest, reused: list[Path]) -> list[Path]:
    return reused if request.param == "with reuse" else []


@pytest.fixture(scope="module")
def whole(
    kind: dict[str, Any], sources: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[ShardWork]]:
    path = tmp_path_factory.mktemp("whole") / "acts.zarr"
    works = run_loop(path, TEXT, sources, **kind)
    return path, [works[shard] for shard in sorted(works)]


def spoiled_in(kind: dict[str, Any]) -> str:
    """The pairs that are quarantined after they were computed."""
    return NOT_A_NUMBER if "dtype" in kind else NOT_A_NUMBER + TOO_LARGE


def resume_from(
    whole: Path, root: Path, shards: tuple[int, ...], sources: list[Path], kind: dict[str, Any]
) -> list[ShardWork]:
    """Run again with only the given shards there; returns what was decided for the others."""
    shutil.copytree(whole, root)
    for shard in range(-(-len(TEXT) // SHARD_ROWS)):
        if shard not in shards:
            unmark(root, shard)
    works = run_loop(root, TEXT, sources, **kind)
    assert not set(works) & set(shards)
    return [works[shard] for shard in sorted(works)]


def assert_resumes_alike(
    whole: tuple[Path, list[ShardWork]], tmp_path: Path, sources: list[Path], kind: dict[str, Any]
) -> None:
    path, works = whole
    every = range(len(works))
    # All subsets of one kind of store; of the others, which decide no differently, the smallest and largest.
    counts = (0, 1, len(works) - 1) if kind else every
    for number, shards in enumerate(chain.from_iterable(combinations(every, count) for count in counts)):
        root = tmp_path / str(number)
        again = resume_from(path, root, shards, sources, kind)
        expected = [work for work in works if work.index not in shards]
        assert [work.compute for work in again] == [work.compute for work in expected], shards
        assert [work.copies for work in again] == [work.copies for work in expected], shards
        assert tree_bytes(root) == tree_bytes(path), shards
        shutil.rmtree(root)


def test_any_shards_may_be_there_already(
    whole: tuple[Path, list[ShardWork]], tmp_path: Path, sources: list[Path], kind: dict[str, Any]
) -> None:
    assert_resumes_alike(whole, tmp_path, sources, kind)


def test_a_resumption_that_forgets_stored_pairs_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = run_loop(tmp_path / "whole", TEXT)
    monkeypatch.setattr(SeenPairs, "add_present", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_resumes_alike((tmp_path / "whole", list(works.values())), tmp_path, [], {})


def test_a_copy_holds_what_its_original_holds(
    whole: tuple[Path, list[ShardWork]], sources: list[Path], kind: dict[str, Any]
) -> None:
    path, works = whole
    assert verify(path).ok
    stores = [*(ActivationStore.open(source) for source in sources), ActivationStore.open(path)]
    own, spoiled = stores[-1], spoiled_in(kind)
    decisions = decided(TEXT, REUSED if sources else [], spoiled)
    assert as_decisions(works) == decisions
    assert sum(decision is not None and decision != (OWN_STORE, row) for row, decision in enumerate(decisions)) >= 8
    for row, (letter, decision) in enumerate(zip(TEXT, decisions, strict=True)):
        assert own.sources()[row] == f"source-{row}", "the source is the row's own"
        assert own.status()[row] == (2 if letter in UNUSABLE + spoiled else 1)
        assert bool(own.reasons()[row]) == (letter in UNUSABLE + spoiled)
        if decision is None:
            continue
        store, original = stores[decision[0]], decision[1]
        assert own.reasons()[row] == store.reasons()[original]
        assert own.pair_ids()[row].tolist() == store.pair_ids()[original].tolist()
        assert own.tokens()[row].tolist() == store.tokens()[original].tolist() == [1, 2, 1]
        for layer in own.layers:
            assert own.norms(layer)[row] == store.norms(layer)[original]
            for array in ("diff", "chosen", "rejected") if own.manifest.sides else ("diff",):
                mine, its = own.take(layer, [row], array), store.take(layer, [original], array)
                if own.manifest.dtype == "int8" and (decision[0], original // SHARD_ROWS) != (
                    OWN_STORE,
                    row // SHARD_ROWS,
                ):
                    # Rounded a second time: by half a step of its new row and columns at most.
                    rounding = 0.5 * scale_of(own, f"{array}/{layer}", row)
                    np.testing.assert_array_less(np.abs(mine[0] - its[0]), rounding * (1 + 1e-5) + 1e-30)
                else:
                    np.testing.assert_array_equal(mine, its)
                assert to_float(mine, own.manifest.dtype).any() == (letter not in spoiled)


def scale_of(store: ActivationStore, name: str, row: int) -> np.ndarray:
    """What one step of each value of an int8 row stands for, [D]."""
    scaled = store.row_reader().vectors(name, row // SHARD_ROWS)
    assert isinstance(scaled, ScaledRows)
    return scaled.row_scale[row % SHARD_ROWS] * scaled.column_scale


@pytest.mark.parametrize("harm", ["half mark", "no mark's rows", "no pair ids", "short diff"])
def test_a_marked_but_damaged_shard_is_computed_again(tmp_path: Path, harm: str) -> None:
    run_loop(tmp_path / "whole", TEXT)
    root = tmp_path / "harmed"
    shutil.copytree(tmp_path / "whole", root)
    mark = root / "status/c/1"
    if harm == "half mark":
        mark.write_bytes(mark.read_bytes()[:3])
    elif harm == "no mark's rows":
        mark.write_bytes(bytes(4) + bytes.fromhex("48674bc7")[::-1])
    elif harm == "no pair ids":
        (root / "pair_id/c/1/0").unlink()
    else:
        (root / "diff/2/c/1/0").write_bytes(b"short")
    assert list(run_loop(root, TEXT)) == [1]
    assert tree_bytes(root) == tree_bytes(tmp_path / "whole")

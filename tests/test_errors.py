"""Errors reach another process as they were raised."""

from __future__ import annotations

import pickle

import pytest

from pairtrace.errors import (
    ExamplesError,
    MissingDependencyError,
    PairtraceError,
    StoreDamagedError,
    StoreMismatchError,
)


@pytest.mark.parametrize(
    "error",
    [
        StoreDamagedError("array diff/2"),
        StoreMismatchError("layers", (2,), (3,), "choose another"),
        MissingDependencyError("dask", "discover", "a cluster"),
        ExamplesError("one class only", "both classes", "label 1 alone"),
        MissingDependencyError("s3fs", None, "the address"),
    ],
    ids=str,
)
def test_errors_survive_the_way_between_processes(error: PairtraceError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))

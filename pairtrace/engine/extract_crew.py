"""Which workers of a Dask cluster take part in an extraction, and whether they see what the client sees."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pairtrace.engine.extract_messages import ClusterRun, Joined
from pairtrace.engine.extract_worker import join_run
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, PairtraceError
from pairtrace.store.staging import sees_probe

logger = logging.getLogger(__name__)

GPU = "GPU"


@dataclass(frozen=True)
class Crew:
    """The workers that take part.

    Attributes:
        slots: by address, how many shards a worker computes or prepares at a time.
        resources: what a shard needs of its worker, as Dask takes it.
    """

    slots: dict[str, int]
    resources: dict[str, float]

    @classmethod
    def of(cls, workers: dict[str, dict[str, Any]], device: str) -> Crew:
        """The crew for a device ("auto", "cpu", "cuda", ...) among all workers of a scheduler, as Dask describes them.

        Where workers declare the resource GPU, those without one stay out, unless the device is the CPU.
        """
        gpus = {address: int(worker.get("resources", {}).get(GPU, 0)) for address, worker in workers.items()}
        if device == "cpu" or not any(gpus.values()):
            return cls({address: int(worker["nthreads"]) for address, worker in workers.items()}, {})
        slots = {address: min(count, int(workers[address]["nthreads"])) for address, count in gpus.items() if count}
        return cls(slots, {GPU: 1})


def muster(client: Any, crew: Crew, run: ClusterRun, address: str) -> None:
    """Have every worker of the crew compare what it sees, before any work.

    Args:
        client: of the scheduler.
        crew: the workers that take part.
        run: what they are to work on.
        address: of the scheduler, for messages.

    Raises:
        ConfigError: a worker does not see what the client sees, or the client not what it writes; or it is lost.
    """
    everybody = len(client.nthreads())
    if crew.resources:
        logger.info("%d of %d workers declare the resource GPU: they take the shards", len(crew.slots), everybody)
    elif run.config.device != "cpu":
        logger.info(
            "none of the %d workers declares the resource GPU: all of them take shards; where they have GPUs, start "
            'one per GPU: CUDA_VISIBLE_DEVICES=0 dask worker %s --nthreads 1 --resources "GPU=1"',
            everybody,
            address,
        )
    found = client.run(join_run, run, workers=list(crew.slots), on_error="return")
    for worker, answer in found.items():
        if isinstance(answer, PairtraceError):
            raise answer
        if isinstance(answer, Exception):
            raise ConfigError(
                f"the Dask worker at {worker} cannot take part: {answer!r}; run the same command again"
            ) from answer
        if not sees_probe(run.config.store, answer.probe):
            raise ConfigError(
                f"what the Dask worker at {worker} on {answer.host} writes to {run.config.store} does not arrive here; "
                "every worker has to see the same place"
            )
    _warn_of_differences(found)


def _warn_of_differences(found: dict[str, Joined]) -> None:
    """Say what does not stop a run but may surprise."""
    kinds = Counter(joined.device.partition(":")[0] for joined in found.values())
    if len(kinds) > 1:
        counts = " and ".join(f"{count} on {kind}" for kind, count in sorted(kinds.items()))
        logger.warning("the workers run on different devices (%s): rows differ in their last bits between them", counts)
    here = library_versions()
    for worker, joined in found.items():
        other = {name: version for name, version in joined.versions.items() if version != here.get(name)}
        if other:
            logger.warning(
                "the Dask worker at %s has %s where this machine has %s: rows may differ in their last bits",
                worker,
                ", ".join(f"{name} {version}" for name, version in other.items()),
                ", ".join(f"{name} {here.get(name)}" for name in other),
            )
    shared = Counter(joined.gpu for joined in found.values() if joined.gpu is not None)
    for gpu, count in shared.items():
        if count > 1:
            logger.warning(
                "%d workers use the same GPU (%s), each with a model of its own; start each with its own "
                "CUDA_VISIBLE_DEVICES",
                count,
                gpu,
            )

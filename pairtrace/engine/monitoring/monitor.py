"""The monitor: at every step that it is shown, the bag is asked, read through M0 and compared with M0's own answers.

What it leaves in its directory: `monitor.jsonl` (a line per step), `monitor.svg`, and for every step the answers as a
rollouts file and the directions of clusters that no discovery had. Letters: P items, K samples, D width.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.architectures import check_layers, family_of
from pairtrace.engine.atomic import one_writer
from pairtrace.engine.checkpoint import load_config, model_fingerprint, resolve_device, resolve_dtype
from pairtrace.engine.discovery.flags import shown_shares
from pairtrace.engine.discovery.prompt_bag import CHANGED, UNCHANGED, PromptBag, bag_items
from pairtrace.engine.journal import Journal
from pairtrace.engine.judge import RuleJudge, load_rules
from pairtrace.engine.monitoring.asked import Answer, AskedPrompts
from pairtrace.engine.monitoring.base_answers import BaseCache
from pairtrace.engine.monitoring.clusters import WatchedCluster, known_clusters, load_watched, save_watched, unit_rows
from pairtrace.engine.monitoring.config import MonitorConfig
from pairtrace.engine.monitoring.plot import write_plot
from pairtrace.engine.monitoring.reader import AnswerReader
from pairtrace.engine.monitoring.watch import Changes, Seen, Watch
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.prompts import load_prompts
from pairtrace.errors import DataFormatError, ModelError

if TYPE_CHECKING:
    import torch

    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.rollout_table import RolloutTable
    from pairtrace.engine.sampling import Sampler

logger = logging.getLogger(__name__)

LOG, PLOT = "monitor.jsonl", "monitor.svg"
# Items that a line of the log names per cluster.
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Where and how exactly models answer: M0 must do as the model in training does, or rounding looks like training.

    Attributes:
        device: of the forward passes.
        dtype: name of the dtype of the weights.
        autocast: dtype of the products, where it is another one.
    """

    device: torch.device
    dtype: str
    autocast: torch.dtype | None = None

    def context(self) -> AbstractContextManager[Any]:
        """In which models answer."""
        import torch

        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


class Monitor:
    """Watches one run; a context manager.

    Args:
        config: the settings.
        numerics: of the answers; None for those of `config`.
        progress: receives the stages.
        meter: counts tokens and operations.

    Attributes:
        logged: lines of the log, by step, ascending.
        encoder: of M0.
        numerics: of the answers.

    Raises:
        DataError: the prompts or the known clusters cannot be used, or the log is another run's.
        ConfigError, ModelError: an option or M0 cannot be used.
        StoreLockedError: another monitor writes to the directory.
    """

    def __init__(
        self,
        config: MonitorConfig,
        *,
        numerics: Numerics | None = None,
        progress: Progress = NULL_PROGRESS,
        meter: CostMeter | None = None,
    ) -> None:
        self.config = config
        self.logged: dict[int, dict[str, Any]] = {}
        self._out = Path(config.out)
        self._progress, self._meter = progress, meter
        self._stack = ExitStack()
        self.encoder = PromptEncoder.load(
            config.base, chat_template=config.chat_template, template_date=config.template_date
        )
        self._judge: RuleJudge | None = None if config.rules is None else load_rules(config.rules)
        prompts = load_prompts(config.prompts, mixed=True)
        self._asked = AskedPrompts(prompts, self.encoder, config.max_new_tokens)
        described = self.encoder.identity
        self._prints = {
            "model_fingerprint": model_fingerprint(config.base),
            **{name: str(described[name]) for name in ("tokenizer_fingerprint", "template_fingerprint")},
        }
        model_config = load_config(config.base)
        # Checkpoints of a run may be stored in another dtype than M0.
        dtype = str(resolve_dtype(config.dtype, model_config)).removeprefix("torch.")
        self.numerics = numerics or Numerics(device=resolve_device(config.device), dtype=dtype)
        layer = int(model_config.num_hidden_layers) if config.layer is None else config.layer
        self._known: list[WatchedCluster] = []
        if config.known is not None:
            layer, self._known = known_clusters(config.known, self._prints, config.layer)
        check_layers((layer,), model_config)
        family_of(model_config, config.max_length or None)
        self._layer = layer
        self._sampling = {
            **self._prints,
            "end_tokens": described["end_tokens"],
            "prompts_fingerprint": prompts.fingerprint,
            "null_temperature": config.resampling_temperature,
            **{name: getattr(config, name) for name in ("temperature", "null_samples", "max_new_tokens", "seed")},
            **{name: str(getattr(self.numerics, name)) for name in ("dtype", "autocast")},
        }
        self._reading = {
            "layer": layer,
            "reading_dtype": config.dtype,
            "max_length": config.max_length,
            "truncation": config.truncation,
        }
        self._reader = AnswerReader(
            config,
            self.encoder,
            layer=layer,
            fingerprint=self._prints["model_fingerprint"],
            device=str(self.numerics.device),
            meter=meter,
        )

    def __enter__(self) -> Monitor:
        """Open the log, and let M0 answer where that was not done before."""
        with ExitStack() as stack:
            stack.enter_context(one_writer(self._out))
            identity = {
                **self.config.identity(),
                **self._sampling,
                **self._reading,
                "judge": None if self._judge is None else self._judge.name,
                "known": [[one.name, one.threshold, one.flagged] for one in self._known],
            }
            self._journal = stack.enter_context(Journal(self._out / LOG, identity))
            for entry in self._journal.entries:
                _require_entry(entry, self._out / LOG)
            self.logged = {entry["step"]: entry for entry in self._journal.entries}
            self._prepare()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def items(self) -> int:
        """Number of items: prompts under their conditions."""
        return len(self._asked)

    @property
    def last_step(self) -> int:
        """The last step of the log; -1 for none. Earlier ones are not looked at again."""
        return max(self.logged, default=-1)

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """Alerts of the whole log, with their steps."""
        return [
            {"step": step, **one}
            for step, entry in self.logged.items()
            for one in entry["raised"]
            if one["severity"] != "note"
        ]

    def observe(self, step: int, sampler: Sampler, fingerprint: str | None = None) -> Seen:
        """Ask the model at a step, and log what has changed.

        Args:
            step: of training, later than those of the log.
            sampler: the model, with M0's encoder.
            fingerprint: of its checkpoint; None where there is none, as inside a training.

        Raises:
            ModelError: memory does not suffice for a single response, or no answer of a checkpoint can be read.
            ConfigError: a file cannot be written.
        """
        assert step > self.last_step, (step, self.last_step)
        begun = time.perf_counter()
        with self.numerics.context():
            answers = self._asked.ask(
                sampler,
                seed=(self.config.seed, "step", step),
                temperature=self.config.temperature,
                batch_size=self.config.batch_size,
                stage=f"answers at step {step}",
                progress=self._progress,
                meter=self._meter,
            )
        table = self._table(answers)
        bag = self._read(table)
        self._require_readable(bag, step, saved=fingerprint is not None)
        seen = self._watch.look(step, _changes(bag, None if self._judge is None else table))
        table.write(self._out / f"step-{step:08d}.rollouts.parquet")
        watched = [one for one in self._watch.clusters if one.kind != "known"] + self._watch.candidates
        save_watched(self._directions(step), watched, layer=self._layer, prints=self._prints)
        counts = bag.counts
        entry = {
            "step": step,
            "checkpoint": fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "items": len(self._asked),
            "changed": counts.pop(CHANGED, 0),
            "unchanged": counts.pop(UNCHANGED, 0),
            "unreadable": counts,
            "in_no_cluster": seen.rest,
            "clusters": [
                {**line.to_dict(), "examples": [bag.items[item] for item in line.members[:_EXAMPLES]]}
                for line in seen.lines
            ],
            "raised": [one.to_dict() for one in seen.raised],
            "watched": [one.name for one in watched],
            "seconds": round(time.perf_counter() - begun, 3),
        }
        self._journal.append([entry])
        self.logged[step] = entry
        write_plot(self._out / PLOT, list(self.logged.values()))
        for one in seen.raised:
            level = logging.INFO if one.severity == "note" else logging.WARNING
            logger.log(level, "%s at step %d: %s", one.severity, step, one.text)
        return seen

    def _require_readable(self, bag: PromptBag, step: int, *, saved: bool) -> None:
        """What cannot be read cannot have changed: a broken model must not pass for a clean one."""
        counts = bag.counts
        readable = counts.pop(CHANGED, 0) + counts.pop(UNCHANGED, 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        if not readable and saved:
            raise ModelError(
                f"none of the {len(self._asked)} answers at step {step} can be read ({reasons}): the checkpoint is "
                "damaged, or the training has broken the model"
            )
        if 2 * readable < len(self._asked):
            logger.warning("step %d: only %d of %d answers can be read (%s)", step, readable, len(self._asked), reasons)

    def _prepare(self) -> None:
        """M0's answers, how far they vary, and what the log says of earlier steps."""
        cache = BaseCache(Path(self.config.cache or self._out / "m0"), self._sampling)
        with self.numerics.context():
            answers = cache.answers(self._asked, self._load_base, self.config, self._progress, self._meter)
        free_memory(self.numerics.device)
        self._reference = answers.reference
        bags = [
            cache.bag(sample, self._reading, partial(self._read, self._table(further)))
            for sample, further in enumerate(answers.further)
        ]
        changes = [_changes(bag) for bag in bags]
        null = Changes(
            units=np.stack([one.units for one in changes]), readable=np.stack([one.readable for one in changes])
        )
        self._watch = Watch(config=self.config, null=null, clusters=list(self._known), tests=len(self.logged))
        for entry in self.logged.values():
            for one in entry["raised"]:
                self._watch.raised.setdefault(one["cluster"], set()).add(one["severity"])
        if self.logged:
            watched = load_watched(self._directions(self.last_step), self.logged[self.last_step]["watched"])
            self._watch.clusters += [one for one in watched if one.kind == "new"]
            self._watch.candidates = [one for one in watched if one.kind == "candidate"]

    def _load_base(self) -> Sampler:
        from pairtrace.engine.sampling import Sampler

        return Sampler.load(self.encoder, device=str(self.numerics.device), dtype=self.numerics.dtype)

    def _table(self, answers: list[Answer]) -> RolloutTable:
        """M0's answers and others, judged where there is a judge."""
        table = self._asked.table(self._reference, answers)
        return table if self._judge is None else table.judged(self._judge)

    def _read(self, table: RolloutTable) -> PromptBag:
        return self._reader.read(table, self._progress)

    def _directions(self, step: int) -> Path:
        return self._out / f"step-{step:08d}.safetensors"


def _require_entry(entry: Mapping[str, Any], log: Path) -> None:
    kinds = {"step": int, "clusters": list, "raised": list, "watched": list}
    damaged = next((name for name, kind in kinds.items() if not isinstance(entry.get(name), kind)), None)
    if damaged is not None:
        raise DataFormatError(
            f"{log} is damaged: an entry has {damaged} = {entry.get(damaged)!r}, expected {kinds[damaged].__name__}; "
            "remove the directory to begin again"
        )


def _changes(bag: PromptBag, table: RolloutTable | None = None) -> Changes:
    """How answers differ from M0's; with the verdicts of a judged table."""
    flips = None
    if table is not None:
        base, now = shown_shares(table, bag_items(table))
        flips = np.sign(np.nan_to_num(now - base)).astype(np.int8)
    readable = np.isin(np.array(bag.states, dtype=object), (CHANGED, UNCHANGED))
    return Changes(units=unit_rows(bag.vectors[:, 0]), readable=readable, flips=flips)


def free_memory(device: torch.device) -> None:
    """Give the weights of a model that is no longer referenced back to a GPU; on a CPU they are gone already."""
    if device.type == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()

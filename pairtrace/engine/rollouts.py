"""The rollouts stage: both checkpoints answer every prompt, under every condition, several times.

Finished batches are appended to `{out}.partial.jsonl`, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairtrace.engine.journal import require_same_run
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import DISTRACTOR, PLAIN, PromptSet, load_prompts
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollout_journal import Key, RolloutJournal
from pairtrace.engine.rollout_table import BASE, SCHEMA, TUNED, RolloutTable
from pairtrace.engine.vllm.options import VLLMOptions, check_backend
from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.sampling import Request, Sampled, Sampler
    from pairtrace.engine.vllm.adapters import Adapter
    from pairtrace.engine.vllm.sampler import VLLMSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What `sample_rollouts` does.

    Attributes:
        prompts: prompt file (yaml or jsonl).
        base: M0, the checkpoint from before preference training: a directory or a hub id.
        tuned: M1, the checkpoint after it; with the back end vllm also a LoRA adapter of `base`.
        out: parquet file to write.
        conditions: "plain", or "plain" and "distractor"; None takes what the prompts allow.
        temperature: of sampling; 0 takes the most likely token, and then one sample is all there is.
        samples: responses per prompt, condition and model.
        max_new_tokens: longest response, in tokens.
        batch_size: rollouts per forward pass; it does not change what is sampled.
        seed: every rollout derives its own seed from it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the forward pass; "auto" is the checkpoint's own.
        chat_template: file with a Jinja chat template that replaces the tokenizers' own.
        template_date: day (YYYY-MM-DD) for a chat template that prints the date: the day of training.
        backend: "hf" (transformers) or "vllm"; at a temperature they draw different random numbers.
        vllm: how vLLM is run; None for its defaults.
    """

    prompts: str
    base: str
    tuned: str
    out: str
    conditions: tuple[str, ...] | None = None
    temperature: float = 0.7
    samples: int = 8
    max_new_tokens: int = 256
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    chat_template: str | None = None
    template_date: str | None = None
    backend: str = "hf"
    vllm: VLLMOptions | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend, self.vllm)
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"--temperature 0 gives the same response each time, but {self.samples} were asked for; "
                "set --samples to 1 or raise the temperature"
            )
        if self.conditions is not None and self.conditions not in ((PLAIN,), (PLAIN, DISTRACTOR)):
            raise ConfigError(f"conditions are {self.conditions}; expected plain, or plain and distractor")


def sample_rollouts(
    config: RolloutConfig,
    progress: Progress = NULL_PROGRESS,
    meter: CostMeter | None = None,
    *,
    mixed: bool = False,
) -> RolloutTable:
    """Sample the rollouts of `config`, or go on with those of an interrupted run.

    A finished file made with the same settings is read instead. Verdicts are not given here. `meter` counts the tokens
    of this run and their operations. With `mixed`, distractors on some prompts only are allowed: every prompt is asked
    under the conditions that it has.

    Returns:
        The table, as written to `config.out`, sorted by prompt, condition, model and sample.

    Raises:
        DataFormatError: the prompt file is malformed.
        DataError: a chat template refuses a prompt.
        DataMismatchError: `out` or its unfinished file exists and was made with other settings, checkpoints,
            tokenizers, chat templates or end tokens.
        ConfigError, ModelError: an option or a checkpoint cannot be used.
        EngineError: vLLM does not start, or died; what it has answered is kept.
    """
    from pairtrace.engine.checkpoint import model_fingerprint, require_whole_weights, resolve_checkpoint
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.samplers import load_sampler, released
    from pairtrace.engine.versions import library_versions
    from pairtrace.engine.vllm.adapters import find_adapter

    prompts = load_prompts(config.prompts, mixed=mixed)
    conditions = config.conditions or prompts.conditions
    if not set(conditions) <= set(prompts.conditions):
        raise ConfigError(f"the distractor condition was asked for, but {config.prompts} has no distractors")
    adapter = find_adapter(config.tuned, config.base) if config.backend == "vllm" else None
    # An adapter is the same model to its tokenizer, and answers in the same batch.
    tuned = config.tuned if adapter is None else config.base
    encoders = {
        name: PromptEncoder.load(path, chat_template=config.chat_template, template_date=config.template_date)
        for name, path in ((BASE, config.base), (TUNED, tuned))
    }
    # Half a file of the tuned model must not cost the rollouts of the base.
    for model in {config.base, tuned}:
        require_whole_weights(resolve_checkpoint(model))
    # All of them before any weights are loaded: a prompt that one template refuses must not cost an hour of the other.
    encoded = {
        (name, condition, prompt.id): encoder.encode(
            f"prompt {prompt.id!r} ({condition})", prompt.conversation(condition), config.max_new_tokens
        )
        for name, encoder in encoders.items()
        for condition in conditions
        for prompt in prompts.under(condition)
    }
    identity = {
        "base_fingerprint": model_fingerprint(config.base),
        "tuned_fingerprint": model_fingerprint(tuned) if adapter is None else adapter.fingerprint(tuned),
        "prompts_fingerprint": prompts.fingerprint,
        "conditions": list(conditions),
        **{f"{name}_{key}": value for name, encoder in encoders.items() for key, value in encoder.identity.items()},
        **{name: getattr(config, name) for name in ("temperature", "samples", "max_new_tokens", "seed", "dtype")},
        # Files from before there was a choice say nothing of it.
        **({} if config.backend == "hf" else {"backend": config.backend}),
    }
    out = Path(config.out)
    if out.exists():
        table = read_rollouts(out)
        require_same_run(identity, table.manifest.get("identity"), out)
        logger.info("%s holds these rollouts already; they are used as they are", out)
        return table
    keys = [
        (model, condition, prompt.id, sample)
        for model in (BASE, TUNED)
        for condition in conditions
        for prompt in prompts.under(condition)
        for sample in range(config.samples)
    ]
    journal = RolloutJournal(journal_path(out), identity)
    with journal:
        for models in ((BASE,), (TUNED,)) if adapter is None else ((BASE, TUNED),):
            open_keys = [key for key in keys if key[0] in models and key not in journal.rows]
            if open_keys:
                requests = _requests(open_keys, encoded, config.seed, adapter)
                sampler = load_sampler(
                    encoders[models[0]],
                    backend=config.backend,
                    device=config.device,
                    dtype=config.dtype,
                    options=config.vllm,
                    adapter=adapter,
                )
                with released(sampler):
                    _sample(config, sampler, requests, open_keys, journal, progress, meter)
                _free_memory()
        manifest = {
            "schema_version": 1,
            "identity": identity,
            "config": {field.name: asdict(config)[field.name] for field in fields(config)},
            "versions": library_versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        table = RolloutTable(_table(keys, prompts, journal.rows, config.seed), manifest)
        table.write(out)
    journal.path.unlink(missing_ok=True)
    return table


def journal_path(out: Path) -> Path:
    """Where the finished rollouts of an unfinished run are kept."""
    return out.with_name(out.name + ".partial.jsonl")


def _requests(
    keys: list[Key], encoded: dict[tuple[str, str, str], list[int]], seed: int, adapter: Adapter | None
) -> list[Request]:
    from pairtrace.engine.sampling import Request, rollout_seed

    return [
        Request(
            name=f"prompt {identifier!r} ({condition})",
            prompt=encoded[model, condition, identifier],
            seed=rollout_seed(seed, model, condition, identifier, sample),
            adapter=None if adapter is None or model == BASE else str(adapter.path),
        )
        for model, condition, identifier, sample in keys
    ]


def _sample(
    config: RolloutConfig,
    sampler: Sampler | VLLMSampler,
    requests: list[Request],
    keys: list[Key],
    journal: RolloutJournal,
    progress: Progress,
    meter: CostMeter | None,
) -> None:
    from pairtrace.engine.flops import ModelShape

    shape = ModelShape.known(sampler.config)
    tokens = 0
    models = " and ".join(dict.fromkeys(key[0] for key in keys))
    progress.start(f"rollouts of {models}", len(keys), "responses")

    def on_batch(finished: list[tuple[int, Sampled]]) -> None:
        nonlocal tokens
        journal.append([(keys[position], sampled) for position, sampled in finished])
        tokens += sum(sampled.tokens for _, sampled in finished)
        if meter is not None:
            lengths = [(len(requests[position].prompt), sampled.tokens) for position, sampled in finished]
            flops = 0.0 if shape is None else sum(shape.generation_flops(*pair) for pair in lengths)
            meter.add(tokens=sum(map(sum, lengths)), flops=flops)
        progress.advance(len(finished), tokens=tokens)

    sampler.sample(
        requests,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        on_batch=on_batch,
    )
    progress.finish()


def _free_memory() -> None:
    """Give the weights of a model that is no longer referenced back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _table(keys: list[Key], prompts: PromptSet, rows: dict[Key, dict[str, Any]], seed: int) -> pa.Table:
    from pairtrace.engine.sampling import rollout_seed

    position = {prompt.id: number for number, prompt in enumerate(prompts.prompts)}
    known = prompts.by_id()
    records = [
        {
            "prompt_id": identifier,
            "condition": condition,
            "model": model,
            "sample": sample,
            "messages": json.dumps(known[identifier].conversation(condition), ensure_ascii=False),
            **rows[model, condition, identifier, sample],
            "verdict": None,
            "judge": "",
            "seed": rollout_seed(seed, model, condition, identifier, sample),
        }
        for model, condition, identifier, sample in sorted(
            keys, key=lambda key: (position[key[2]], key[1] == DISTRACTOR, key[0] == TUNED, key[3])
        )
    ]
    return pa.Table.from_pylist(records, schema=SCHEMA)

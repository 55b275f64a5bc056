"""Examples out of judged responses, read through a model. Legend: n responses, L layers, D width."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.pair import Pair
from pairtrace.engine.probes.config import ExamplesConfig
from pairtrace.engine.probes.examples import Block, Origin, content_digest, numbered, reasons_text, require_finite
from pairtrace.engine.probes.judged_responses import JudgedResponse, read_judged
from pairtrace.engine.progress import Progress
from pairtrace.engine.rendered import Quarantined, RenderedPair
from pairtrace.errors import ExamplesError

if TYPE_CHECKING:
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.rendering import Renderer

logger = logging.getLogger(__name__)

_CHUNK = 256
# The other side of the pair that a response is rendered as: short, and nothing of it is looked at.
_COMPANIONS = (".", "!")


@dataclass(frozen=True, kw_only=True)
class ResponseReader:
    """A checkpoint ready to read responses: settings and tokenizer at once, weights when they are needed.

    Attributes:
        config: names the checkpoint and the settings.
        encoder: its tokenizer and chat template.
        layers: to read, ascending.
        fingerprint: of its weights.
    """

    config: ExamplesConfig
    encoder: PromptEncoder
    layers: tuple[int, ...]
    fingerprint: str

    @classmethod
    def prepare(cls, config: ExamplesConfig) -> ResponseReader:
        """Find whatever could stop the reading before it begins.

        Raises:
            ConfigError, ModelError, LayerError: an option or the checkpoint cannot be used.
        """
        from pairtrace.engine.architectures import check_layers, family_of
        from pairtrace.engine.checkpoint import load_config, model_fingerprint, resolve_device, resolve_dtype
        from pairtrace.engine.prompt_encoder import PromptEncoder

        assert config.model is not None
        encoder = PromptEncoder.load(
            config.model, chat_template=config.chat_template, template_date=config.template_date
        )
        model_config = load_config(config.model)
        layers = config.layers or tuple(range(1, int(model_config.num_hidden_layers) + 1))
        check_layers(layers, model_config)
        family_of(model_config, config.max_length or None)
        resolve_device(config.device)
        resolve_dtype(config.dtype, model_config)
        return cls(
            config=config,
            encoder=encoder,
            layers=tuple(sorted(set(layers))),
            fingerprint=model_fingerprint(config.model),
        )

    def read(
        self, responses: Sequence[JudgedResponse], meter: CostMeter, progress: Progress
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Mean activations over the tokens of each response, teacher-forced after its prompt.

        Returns:
            float32 [n, L, D]; and the positions that could not be read, with the reason. Their rows are zero.
        """
        from pairtrace.engine.backend import HFBackend
        from pairtrace.engine.rendering import Renderer

        config = self.config
        assert config.model is not None
        renderer = Renderer(
            self.encoder.tokenizer,
            max_length=config.max_length or None,
            truncation=config.truncation,
            chat_template=self.encoder.chat_template,
        )
        backend = HFBackend.load(
            config.model,
            self.layers,
            device=config.device,
            dtype=config.dtype,
            max_length=config.max_length or None,
            token_budget=config.token_budget,
            fingerprint=self.fingerprint,
            meter=meter,
        )
        means = np.zeros((len(responses), len(self.layers), backend.width), np.float32)
        problems: dict[int, str] = {}
        progress.start("read responses", len(responses), "responses")
        for start in range(0, len(responses), _CHUNK):
            chunk = responses[start : start + _CHUNK]
            usable = []
            for result in _rendered(renderer, chunk):
                if isinstance(result, Quarantined):
                    problems[start + result.row] = result.code
                else:
                    usable.append(result)
            pooled = backend.pool(usable)
            for place, rendered in enumerate(usable):
                if place in pooled.failed:
                    problems[start + rendered.row] = "out_of_memory"
                else:
                    means[start + rendered.row] = pooled.chosen[place]
            progress.advance(len(chunk))
        progress.finish()
        return means, problems


def _rendered(renderer: Renderer, chunk: Sequence[JudgedResponse]) -> list[RenderedPair | Quarantined]:
    """Each response as the chosen side of a pair; `row` counts within the chunk."""
    pairs = []
    for row, one in enumerate(chunk):
        companion = _COMPANIONS[one.response.strip() == _COMPANIONS[0]]
        sides = [[{"role": "assistant", "content": text}] for text in (one.response, companion)]
        pairs.append(Pair(row=row, prompt=list(one.messages), chosen=sides[0], rejected=sides[1]))
    return renderer.render(pairs)


class RolloutExamples:
    """Judged responses in memory; implements `examples.Examples`."""

    def __init__(
        self, responses: Sequence[JudgedResponse], means: np.ndarray, layers: tuple[int, ...], origin: Origin
    ) -> None:
        """`means` is float32 [n, L, D], in the order of `responses` and `layers`."""
        assert means.shape[:2] == (len(responses), len(layers)), means.shape
        self.labels = np.array([one.label for one in responses], np.int8)
        self.prompts = numbered([one.prompt for one in responses])
        self.contents = np.array([content_digest(one.messages) for one in responses], np.uint64)
        self.layers = layers
        self.width = means.shape[2]
        self.origin = origin
        self.left_out: dict[str, int] = {}
        self._means = means
        self._file_rows = [one.row for one in responses]

    @classmethod
    def read(cls, config: ExamplesConfig, meter: CostMeter, progress: Progress) -> RolloutExamples:
        """Read the responses of `config.rollouts` through `config.model`.

        Raises:
            DataError: the file cannot be used.
            ConfigError, ModelError, LayerError: an option or the checkpoint cannot be used.
            ExamplesError: a verdict is unusable, or no response could be read.
        """
        assert config.rollouts is not None
        reader = ResponseReader.prepare(config)
        responses, left_out = read_judged(
            config.rollouts, label_column=config.label_column, answers_of=config.answers_of
        )
        if len(responses) > config.max_rows:
            left_out["beyond_max_rows"] = len(responses) - config.max_rows
            logger.info("%d of %d responses are read, drawn at random; --max-rows reads more", config.max_rows,
                        len(responses))  # fmt: skip
            drawn = np.random.default_rng(config.seed).permutation(len(responses))[: config.max_rows]
            responses = [responses[place] for place in np.sort(drawn).tolist()]
        if not responses:
            reasons = reasons_text(left_out) or "the file is empty"
            raise ExamplesError(f"{config.rollouts} has no judged responses", "at least one", reasons)
        means, problems = reader.read(responses, meter, progress)
        kept = [place for place in range(len(responses)) if place not in problems]
        if not kept:
            raise ExamplesError(
                f"{config.rollouts}: {config.model} can read none of the judged responses",
                "at least one",
                reasons_text(Counter(problems.values())),
            )
        origin = Origin(
            name=config.rollouts,
            model_fingerprint=reader.fingerprint,
            tokenizer_fingerprint=str(reader.encoder.identity["tokenizer_fingerprint"]),
            template_fingerprint=str(reader.encoder.identity["template_fingerprint"]),
            description={"rollouts": config.rollouts, "model": config.model},
        )
        examples = cls([responses[place] for place in kept], means[kept], reader.layers, origin)
        examples.left_out = dict(Counter(left_out) + Counter(problems.values()))
        return examples

    def blocks(self, layer: int) -> Iterator[Block]:
        """As `examples.Examples.blocks`: one block."""
        rows = np.ascontiguousarray(self._means[:, self.layers.index(layer)])
        require_finite(rows, lambda place: f"row {self._file_rows[place]}", layer, self.origin.name)
        yield np.arange(len(rows)), rows

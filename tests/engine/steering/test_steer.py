"""Steering against a plain decoder whose block is replaced, token by token; resuming; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.engine.architectures import FAMILIES, Family
from pairtrace.engine.directions import load_directions, save_directions
from pairtrace.engine.probes.probe_file import save_probes
from pairtrace.engine.steering import arms as arms_module
from pairtrace.engine.steering import steer as module
from pairtrace.engine.steering.arms import Steering
from pairtrace.engine.steering.config import SteerConfig
from pairtrace.engine.steering.report import SteerReport
from pairtrace.engine.steering.steer import steer
from pairtrace.errors import ConfigError, DirectionError, LayerError, UnsupportedModelError
from tests.engine.probes.cases import make_probe
from tests.engine.steering.cases import (
    BLOCKS,
    WIDTH,
    LengthJudge,
    answers_in,
    base_states,
    load,
    make_checkpoint,
    plain_answer,
    prompt_ids,
    report,
    settings,
    vectors,
    wrap,
    wrap_writers,
    write_directions,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m")


def run(config: SteerConfig) -> SteerReport:
    return steer(config, judge=LengthJudge())


def true_norms(model: str, answers: dict[str, list[int]]) -> dict[int, float]:
    """Mean length at the generated tokens, one sequence at a time, by hidden_states (before the norm for the last)."""
    plain, tokenizer = load(model)
    last: list[torch.Tensor] = []
    plain.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    lengths: dict[int, list[float]] = {layer: [] for layer in range(BLOCKS + 1)}
    for name, ids in prompt_ids(tokenizer).items():
        last.clear()
        with torch.no_grad():
            states = plain(torch.tensor([ids + answers[name]]), output_hidden_states=True).hidden_states
        for layer, state in enumerate([*states[:-1], last[0]]):
            lengths[layer] += state[0, len(ids) :].norm(dim=-1).tolist()
    return {layer: float(np.mean(values)) for layer, values in lengths.items()}


def answers_are_right(config: SteerConfig, found: SteerReport) -> bool:
    """Every arm along the direction against a plain decoder with a wrapped block, or with all that writes wrapped."""
    norms = true_norms(config.model, answers_in(config.out, "unsteered"))
    changed = 0
    for arm in found.arms:
        if arm.control:
            continue
        plain, tokenizer = load(config.model)
        wrapped = []
        if arm.layer is not None:
            unit = torch.from_numpy(vectors()[arm.layer] / np.linalg.norm(vectors()[arm.layer]))
            if arm.mode == "ablate":
                basis = torch.eye(WIDTH) - torch.outer(unit, unit)
                rest = torch.zeros(WIDTH)
                if config.ablate_to == "base":
                    rest = torch.outer(unit, unit) @ torch.from_numpy(base_states()[arm.layer]).float()

                def change(
                    states: torch.Tensor, basis: torch.Tensor = basis, rest: torch.Tensor = rest
                ) -> torch.Tensor:
                    return states @ basis + rest
            else:
                assert arm.scale is not None
                step = unit * (arm.scale * norms[arm.layer])

                def change(states: torch.Tensor, step: torch.Tensor = step) -> torch.Tensor:
                    return states + step

            wrapped = wrap_writers(plain, change) if arm.everywhere else wrap(plain, arm.layer, change)
        given = answers_in(config.out, arm.name)
        for name, ids in prompt_ids(tokenizer).items():
            expected = plain_answer(plain, ids, tokenizer.eos_token_id, wrapped, config.positions)
            if given[name] != expected:
                return False
            changed += arm.mode != "none" and given[name] != answers_in(config.out, "unsteered")[name]
    return changed > 0


@pytest.mark.parametrize("positions", ["all", "generated", "prompt_end"])
def test_answers_are_those_of_a_changed_model(model: str, tmp_path: Path, positions: Any) -> None:
    config = settings(
        tmp_path, model, layers=(1, 2, 3), scales=(-0.5, 0.5), ablate=True, controls=0, positions=positions
    )
    found = run(config)
    assert [arm.name for arm in found.arms[:4]] == [
        "unsteered",
        "harm, layer 1, -0.5",
        "harm, layer 1, +0.5",
        "harm, layer 1, ablated",
    ]
    for layer, norm in true_norms(model, answers_in(config.out, "unsteered")).items():
        if layer:
            assert found.norms[layer] == pytest.approx(norm, rel=1e-5)
            assert found.arm("harm", layer, 0.5).length == pytest.approx(norm / 2, rel=1e-5)
    assert answers_are_right(config, found)


@pytest.mark.parametrize("positions", ["all", "prompt_end"])
def test_projecting_to_the_base(model: str, tmp_path: Path, positions: Any) -> None:
    here: dict[str, Any] = {"layers": (1, 2), "scales": (), "ablate": True, "positions": positions, "controls": 1}
    zero = run(settings(tmp_path, model, **here))
    config = settings(tmp_path, model, ablate_to="base", **here)
    found = run(config)
    assert [arm.name for arm in found.arms[:3]] == [
        "unsteered",
        "harm, layer 1, ablated to the base's",
        "random-1, layer 1, ablated to the base's",
    ]
    assert answers_are_right(config, found)
    units = {
        arm.name: arm.unit for arm in arms_module.arms_of(config, arms_module.load_vectors(config, "2" * 64, WIDTH))
    }
    for arm in found.arms[1:]:
        assert arm.left == pytest.approx(base_states()[arm.layer or 0] @ units[arm.name])
    again = run(settings(tmp_path, model, **here))
    assert [one.to_dict() for one in again.arms] == [one.to_dict() for one in zero.arms], "answers are not mixed up"


@pytest.mark.parametrize("mutation", ["zero", "whole state", "every generated token"])
def test_projecting_to_something_else_is_caught(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    config = settings(
        tmp_path, model, layers=(1, 2), scales=(), ablate=True, ablate_to="base", controls=0, positions="prompt_end"
    )
    if mutation == "whole state":
        monkeypatch.setattr(
            Steering, "_changed", lambda self, states: torch.zeros_like(states) + self._left * self._unit
        )
    else:
        positions = "generated" if mutation == "every generated token" else "prompt_end"
        lost = mutation == "zero"
        monkeypatch.setattr(
            module,
            "Steering",
            lambda unit, length, _, left: arms_module.Steering(unit, length, positions, None if lost else left),
        )
    assert not answers_are_right(config, run(config))


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_projecting_out_everywhere(model: str, tmp_path: Path, positions: Any) -> None:
    """Answers of a model that cannot write the direction; not those of one layer, whose answers stay usable."""
    here: dict[str, Any] = {"layers": (1, 2), "scales": (0.5,), "ablate": True, "controls": 1, "positions": positions}
    own = run(settings(tmp_path, model, **here))
    once = answers_in(own.out, "harm, layer 2, ablated")
    config = settings(tmp_path, model, ablate_layers="all", **here)
    found = run(config)
    assert [arm.name for arm in found.arms[:5]] == [
        "unsteered",
        "harm, layer 1, +0.5",
        "harm, layer 1, ablated at all layers",
        "random-1, layer 1, +0.5",
        "random-1, layer 1, ablated at all layers",
    ]
    assert [arm.everywhere for arm in found.arms] == [False, *4 * [False, True]]
    assert answers_are_right(config, found)
    assert answers_in(config.out, "harm, layer 2, ablated at all layers") != once
    assert report(config.out)["arms"][2]["everywhere"] is True
    again = settings(tmp_path, model, **here)
    assert [one.to_dict() for one in run(again).arms] == [one.to_dict() for one in own.arms], "answers are not mixed up"


@pytest.mark.parametrize("mutation", ["own layer", "layers alone", "last token alone"])
def test_projecting_out_elsewhere_is_caught(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    config = settings(tmp_path, model, layers=(1, 2), scales=(), ablate=True, ablate_layers="all", controls=0)
    if mutation == "own layer":
        monkeypatch.setattr(module, "changed_everywhere", lambda model, change: module.changed_layer(model, 2, change))
    if mutation == "layers alone":
        monkeypatch.setitem(FAMILIES, "llama", Family(middle=None))
    if mutation == "last token alone":
        monkeypatch.setattr(
            module, "Steering", lambda unit, length, _, left: arms_module.Steering(unit, length, "generated", left)
        )
    assert not answers_are_right(config, run(config))


@pytest.mark.parametrize("mutation", ["layer above", "layer below", "sign", "every token", "norm of prompts"])
def test_other_steering_is_caught(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    config = settings(tmp_path, model, scales=(0.5, 1.0), controls=0, positions="generated")
    real_layer, real_norms = module.changed_layer, module.mean_norms
    shift = {"layer above": 1, "layer below": -1}.get(mutation, 0)
    monkeypatch.setattr(module, "changed_layer", lambda model, layer, change: real_layer(model, layer + shift, change))
    if mutation == "sign":
        monkeypatch.setattr(
            Steering, "_changed", lambda self, states: (states - self._length * self._unit).to(states.dtype)
        )
    if mutation == "every token":
        monkeypatch.setattr(Steering, "__call__", lambda self, hidden: self._changed(hidden))
    if mutation == "norm of prompts":
        monkeypatch.setattr(
            module,
            "mean_norms",
            lambda model, rows, layers, budget: {
                layer: 3 * norm for layer, norm in real_norms(model, rows, layers, budget).items()
            },
        )
    assert not answers_are_right(config, run(config))


def test_controls_are_random_and_of_the_same_length(model: str, tmp_path: Path) -> None:
    config = settings(tmp_path, model, controls=2, ablate=True)
    found = run(config)
    assert [(arm.direction, arm.control, arm.scale) for arm in found.arms[1:]] == [
        ("harm", False, 0.5), ("harm", False, None),
        ("random-1", True, 0.5), ("random-1", True, None),
        ("random-2", True, 0.5), ("random-2", True, None),
    ]  # fmt: skip
    assert len({arm.length for arm in found.arms if arm.scale}) == 1
    arms = arms_module.arms_of(config, arms_module.load_vectors(config, "2" * 64, WIDTH))
    units = np.stack([arm.unit for arm in arms if arm.scale])
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-12)
    cosines = units @ units.T
    assert np.abs(cosines[~np.eye(3, dtype=bool)]).max() < 0.8
    np.testing.assert_allclose(units[0], vectors()[2] / np.linalg.norm(vectors()[2].astype(float)), rtol=1e-6)


def test_report(model: str, tmp_path: Path) -> None:
    """Rates and paired differences from the responses themselves; surprise by transformers' own loss."""
    config = settings(tmp_path, model, scales=(2.0,), controls=1)
    found = run(config)
    plain, tokenizer = load(model)
    prompts = prompt_ids(tokenizer)
    verdicts = {}
    for arm in found.arms:
        given = answers_in(config.out, arm.name)
        texts = {
            name: tokenizer.decode([one for one in ids if one != 2], skip_special_tokens=True)
            for name, ids in given.items()
        }
        verdicts[arm.name] = {name: len(text) % 2 == 0 for name, text in texts.items()}
        total = 0.0
        for name, ids in given.items():
            labels = torch.tensor([[-100] * len(prompts[name]) + ids])
            with torch.no_grad():
                total += len(ids) * float(plain(torch.tensor([prompts[name] + ids]), labels=labels).loss)
        assert arm.surprise.value == pytest.approx(total / sum(map(len, given.values())), rel=1e-4)
        for group in arm.groups:
            names = {"harmful_format": ["h1"], "harmful": ["h2", "h3"], "benign": ["b1", "b2"]}[group.cell]
            assert group.rates["behavior"].value == np.mean([verdicts[arm.name][name] for name in names])
            assert group.rates["behavior"].method == "wilson"
            if arm.mode != "none":
                difference = arm.differences[list(arm.groups).index(group)]
                gaps = [verdicts[arm.name][name] - verdicts["unsteered"][name] for name in names]
                assert difference.value == np.mean(gaps) and difference.method == "newcombe"
    assert found.arms[0].differences == () and found.same_model is None
    assert found.arms[1].surprise.value > found.arms[0].surprise.value
    written = report(config.out)
    assert written["arms"][1]["length"] == found.arms[1].length and "surprise" in written["definitions"]
    assert len(found.to_rows()) == 3 * 3
    with pytest.raises(KeyError):
        found.arm("harm", 2, 9.0)


class Interrupt(Exception):
    pass


def test_an_interrupted_run_goes_on(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(settings(tmp_path, model, scales=(0.5, 1.0)))
    other = tmp_path / "again"
    other.mkdir()
    config = settings(other, model, scales=(0.5, 1.0))
    real, calls = module.judge_answers, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupt
        return real(*arguments)

    monkeypatch.setattr(module, "judge_answers", failing)
    with pytest.raises(Interrupt):
        run(config)
    asked = []
    real_sample = module.sample_answers

    def counted(*arguments: Any, **keywords: Any) -> Any:
        part = arguments[4]
        asked.append((keywords["title"], len(part.entries)))
        return real_sample(*arguments, **keywords)

    monkeypatch.setattr(module, "sample_answers", counted)
    resumed = run(config)
    assert [count for _, count in asked] == [5, 5, 5, 0, 0]
    for arm in whole.arms:
        assert answers_in(config.out, arm.name) == answers_in(str(tmp_path / "steer.json"), arm.name)
    assert [one.to_dict() for one in resumed.arms] == [one.to_dict() for one in whole.arms]


def test_nothing_is_left_on_the_model(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engine.probes.test_hooks import hooks_of

    seen = []
    real = module._Run.report

    def looking(self: Any, arm: Any, *rest: Any) -> Any:
        seen.append(hooks_of(self.checkpoint.sampler.model))
        return real(self, arm, *rest)

    monkeypatch.setattr(module._Run, "report", looking)
    run(settings(tmp_path, model, ablate=True))
    run(settings(tmp_path, model, ablate=True, ablate_layers="all"))
    assert len(seen) == 10 and all(one == seen[0] for one in seen)


def test_which_vector(model: str, tmp_path: Path) -> None:
    probes = [
        make_probe(width=WIDTH, layer=2),
        make_probe(name="harm-held-out-1", role="held-out", width=WIDTH, layer=2, seed=1),
        make_probe(name="harm-mean-difference", role="baseline", width=WIDTH, layer=2, seed=2),
    ]
    save_probes(tmp_path / "p.safetensors", probes, {})
    path = str(tmp_path / "p.safetensors")

    def chosen(**changed: Any) -> str:
        config = settings(tmp_path, model, directions=path, **changed)
        return arms_module.load_vectors(config, "2" * 64, WIDTH)[0].name

    assert chosen() == "harm"
    assert chosen(behavior="harm-mean-difference") == "harm-mean-difference"
    with pytest.raises(
        DirectionError, match=r"no vector 'harm-bank' to steer along; it has: harm \(vector\), harm-bank"
    ):
        run(settings(tmp_path, model, behavior="harm-bank"))
    save_probes(path, [probes[0], make_probe(name="other", width=WIDTH, layer=2)], {})
    with pytest.raises(ConfigError, match="choose one with --behavior: harm, other"):
        chosen()
    save_directions(path, load_directions(path), {"roles": ["training"]})
    with pytest.raises(DirectionError, match=r"the manifest is damaged: roles is \['training'\]"):
        chosen()


def test_refusals(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LayerError, match=r"holds no layer 9 of harm; its layers are \[0, 1, 2, 3\]"):
        run(settings(tmp_path, model, layers=(9,)))
    np.save(tmp_path / "plain.npy", np.ones(WIDTH, np.float32))
    with pytest.raises(DirectionError, match="does not say which layer"):
        run(settings(tmp_path, model, directions=str(tmp_path / "plain.npy")))
    np.save(tmp_path / "wide.npy", np.ones(WIDTH + 1, np.float32))
    with pytest.raises(DirectionError, match="has width 17; expected 16"):
        run(settings(tmp_path, model, directions=str(tmp_path / "wide.npy")))
    foreign = write_directions(tmp_path / "f.safetensors", tokenizer_fingerprint="9" * 64)
    with pytest.raises(DirectionError, match="made with the tokenizer with fingerprint 9999"):
        run(settings(tmp_path, model, directions=foreign))
    without = tmp_path / "without.safetensors"
    save_directions(without, load_directions(write_directions(tmp_path / "with.safetensors")), {})
    with pytest.raises(DirectionError, match=r"does not hold the base model's states.*`pairtrace shift`"):
        run(settings(tmp_path, model, directions=str(without), ablate=True, ablate_to="base"))
    monkeypatch.setattr("pairtrace.engine.probes.hooks.FAMILIES", {})
    with pytest.raises(UnsupportedModelError, match="it is not known where its blocks are"):
        run(settings(tmp_path, model))
    assert not (tmp_path / "steer.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scales": (0.5, 0.5)}, "expected distinct numbers"),
        ({"scales": (float("nan"),)}, "--scales is"),
        ({"scales": ()}, "nothing to do: give --scales, --ablate, or both"),
        ({"ablate": True, "ablate_layers": "each"}, "--ablate-layers is 'each'; expected own or all"),
        ({"ablate_layers": "all"}, "give --ablate as well"),
        ({"positions": "prompt"}, "--positions is 'prompt'"),
        ({"ablate": True, "ablate_to": "mean"}, "--ablate-to is 'mean'; expected zero or base"),
        ({"ablate_to": "base"}, "give --ablate as well"),
        ({"ablate": True, "ablate_to": "base", "ablate_layers": "all"}, "leave --ablate-layers out"),
        ({"layers": ()}, "--layers names no layer"),
        ({"controls": -1}, "--controls is -1"),
        ({"norm_responses": 0}, "--norm-responses is 0"),
        ({"temperature": -1.0}, "--temperature is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"out": "r.txt"}, "reports end in .json"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, "m", **changed)

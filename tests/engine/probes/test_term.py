"""The probe as a term of a loss: its value, and its gradient against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pairtrace.engine.probes import term as term_module
from pairtrace.engine.probes.hooks import reading_layers
from pairtrace.engine.probes.term import ProbeTerm, mean_activation
from pairtrace.errors import ExamplesError, ProbeMismatchError
from tests.engine.probes.cases import make_probe
from tests.engine.probes.test_hooks import IDS, build

MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)


def states_of(seed: int, dtype: torch.dtype = torch.float64, layers: tuple[int, ...] = (2,)) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(2, 6, 32, generator=generator, dtype=torch.float64).to(dtype) for layer in layers}


def reference(states: dict[int, torch.Tensor], probes: list) -> np.ndarray:
    """float64 [B], straight from the definition, token by token."""
    total = np.zeros(2)
    for probe in probes:
        for row in range(2):
            tokens = [states[probe.layer][row, t].double().numpy() for t in range(6) if MASK[row, t]]
            mean = sum(tokens) / len(tokens)
            members = [
                1 / (1 + np.exp(-(float(mean @ w.astype(np.float64)) + b)))
                for w, b in zip(probe.weight, probe.bias, strict=True)
            ]
            total[row] += np.mean(members) / len(probes)
    return total


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_probability_is_that_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    probes = [make_probe(), make_probe(members=3, layer=4, seed=1)]
    states = states_of(0, dtype, layers=(2, 4))
    found = ProbeTerm(probes)(states, MASK)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.numpy(), reference(states, probes), atol=tolerance)
    means = {layer: mean_activation(state.double(), MASK).numpy() for layer, state in states.items()}
    by_file = np.mean([probe.probabilities(means[probe.layer]) for probe in probes], axis=0)
    np.testing.assert_allclose(found.numpy(), by_file, atol=tolerance)


def gradient_is_right(probes: list) -> bool:
    states = {layer: state.requires_grad_() for layer, state in states_of(3, layers=(2, 4)).items()}
    term = ProbeTerm(probes)
    term(states, MASK).sum().backward()
    step, worst = 1e-6, 0.0
    for layer, state in states.items():
        assert state.grad is not None
        for place in [(0, 2, 0), (0, 4, 31), (0, 0, 5), (1, 1, 7), (1, 2, 8), (1, 5, 0)]:
            around = []
            for sign in (1, -1):
                moved = {key: value.detach().clone() for key, value in states.items()}
                moved[layer][place] += sign * step
                around.append(reference(moved, probes).sum())
            numeric = (around[0] - around[1]) / (2 * step)
            worst = max(worst, abs(numeric - float(state.grad[place])))
    return worst < 1e-8


def test_gradient_against_finite_differences() -> None:
    probes = [make_probe(), make_probe(members=3, layer=4, seed=1)]
    assert gradient_is_right(probes)
    states = {layer: state.requires_grad_() for layer, state in states_of(3, layers=(2, 4)).items()}
    term = ProbeTerm(probes)
    assert torch.autograd.gradcheck(lambda one, two: term({2: one, 4: two}, MASK), (states[2], states[4]))


def test_a_gradient_of_all_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [make_probe(), make_probe(members=3, layer=4, seed=1)]
    monkeypatch.setattr(term_module, "mean_activation", lambda hidden, mask: hidden.mean(dim=1))
    assert not gradient_is_right(probes)


def parameter_gradients(checkpointing: bool, layer: int) -> dict[str, torch.Tensor]:
    model = build().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    term = ProbeTerm([make_probe(layer=layer)])
    with reading_layers(model, term.layers) as states:
        output = model(IDS, labels=IDS)
        (output.loss + 3.0 * term(states, MASK).mean()).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradient_reaches_the_blocks_below_the_layer_and_no_others() -> None:
    model = build().train()
    term = ProbeTerm([make_probe(layer=2)])
    with reading_layers(model, term.layers) as states:
        model(IDS)
        term(states, MASK).mean().backward()
    reached = {name.split(".")[2] for name, value in model.named_parameters() if value.grad is not None}
    assert reached == {"0", "1", "weight"}  # the last one is the embedding's
    # Of the whole model, against finite differences in float64.
    model, weight = build().double(), 0
    parameter = model.model.layers[1].mlp.down_proj.weight

    def value() -> torch.Tensor:
        with reading_layers(model, term.layers) as states:
            model(IDS)
            return term(states, MASK).mean()

    value().backward()
    with torch.no_grad():
        for place in [(0, 0), (7, 21), (31, 63)]:
            ends = []
            for sign in (1, -1):
                parameter[place] += sign * 1e-5
                ends.append(float(value()))
                parameter[place] -= sign * 1e-5
            weight += abs(float(parameter.grad[place]))
            assert float(parameter.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-11)
    assert weight > 0


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    plain, saving = parameter_gradients(False, 3), parameter_gradients(True, 3)
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, msg=name)


def test_a_monitor_may_have_asked_before() -> None:
    states, term = states_of(0), ProbeTerm([make_probe()])
    with torch.inference_mode():
        before = term(states_of(0), MASK)
    after = term({2: states[2].requires_grad_()}, MASK)
    after.sum().backward()
    assert torch.equal(before, after) and states[2].grad.any()


def test_padding_may_hold_nan() -> None:
    states = states_of(0)
    clean = ProbeTerm([make_probe()])(states, MASK)
    states[2][0, 5] = torch.nan
    states[2].requires_grad_()
    found = ProbeTerm([make_probe()])(states, MASK)
    assert torch.equal(found, clean)
    found.sum().backward()
    assert torch.isfinite(states[2].grad).all()


def test_autocast_does_not_round_the_product() -> None:
    states = states_of(0, torch.float32)
    term = ProbeTerm([make_probe()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(term(states, MASK), term(states, MASK.long()))
        found = term(states, MASK)
    assert torch.equal(found, term(states, MASK))


def test_refusals() -> None:
    term = ProbeTerm([make_probe()])
    with pytest.raises(ProbeMismatchError, match="not read at the layer of the probe: expected 2, found 3"):
        term({3: states_of(0)[2]}, MASK)
    with pytest.raises(ProbeMismatchError, match="another width: expected 32, found 31"):
        term({2: states_of(0)[2][..., :31]}, MASK)
    with pytest.raises(ProbeMismatchError, match=r"expected \[2, 6\], found \[2, 5\]"):
        term(states_of(0), MASK[:, :5])
    with pytest.raises(ExamplesError, match="sequence 1 of the batch has no response token"):
        term(states_of(0), MASK & torch.tensor([[True], [False]]))

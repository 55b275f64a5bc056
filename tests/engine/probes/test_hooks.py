"""Reading and changing the residual stream: the right layer, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pairtrace.engine.architectures import FAMILIES
from pairtrace.engine.probes import hooks
from pairtrace.engine.probes.hooks import changed_everywhere, changed_layer, reading_layers
from pairtrace.errors import LayerError, UnsupportedModelError
from tests.models import make_config

IDS = torch.tensor([[5, 9, 301, 44, 17, 8], [7, 7, 23, 500, 2, 31]])


def build(model_type: str = "llama", **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(model_type, **settings)).eval()


def hooks_of(model: Any) -> dict[str, list[int]]:
    kinds = [name for name in vars(torch.nn.Module()) if "_hooks" in name]
    return {
        f"{name}.{kind}": list(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    }


def true_states(model: Any) -> list[torch.Tensor]:
    """The residual stream as transformers gives it; the last one caught before the final norm."""
    decoder = getattr(model, model.base_model_prefix)
    norm = getattr(decoder, FAMILIES[model.config.model_type].final_norm)
    before: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
    handle.remove()
    return [*output.hidden_states[:-1], before[0]]


def layers_are_right(model: Any, layers: Sequence[int]) -> bool:
    expected = true_states(model)
    with torch.no_grad(), reading_layers(model, layers) as states:
        model(IDS)
        return all(torch.equal(states[layer], expected[layer]) for layer in layers)


def block_inputs(model: Any) -> list[torch.Tensor]:
    """What each block, and the final norm, is given; transformers records a state before it can be changed."""
    seen: list[torch.Tensor] = []
    places = [*model.model.layers, model.model.norm]
    handles = [place.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for place in places]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "olmo2", "gemma2", "mixtral", "phi"])
def test_layers_are_numbered_as_transformers_does(model_type: str) -> None:
    assert layers_are_right(build(model_type), range(5))


@pytest.mark.parametrize("shift", [-1, 1])
def test_another_numbering_is_caught(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    real: Callable[..., Any] = hooks._hooks

    def shifted(model: Any, actions: dict[int, Any]) -> Any:
        return real(model, {layer + shift: action for layer, action in actions.items()})

    monkeypatch.setattr(hooks, "_hooks", shifted)
    assert not any(layers_are_right(build(), (layer,)) for layer in (1, 2, 3))
    with pytest.raises(AssertionError):
        test_a_change_acts_at_its_layer_alone(2)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_change_acts_at_its_layer_alone(layer: int) -> None:
    """Adding at layer l is the same as running the remaining blocks on the sum."""
    model = build()
    plain = block_inputs(model)
    shift = torch.linspace(-1, 1, 32)
    with torch.no_grad(), changed_layer(model, layer, lambda hidden: hidden + shift):
        changed = block_inputs(model)
    assert all(torch.equal(changed[before], plain[before]) for before in range(layer))
    torch.testing.assert_close(changed[layer], plain[layer] + shift)
    for after in range(layer + 1, 5):
        # Block l + 1 by hand, on the changed state.
        positions = torch.arange(IDS.shape[1])[None]
        rotary = model.model.rotary_emb(changed[after - 1], positions)
        mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
        with torch.no_grad():
            expected = model.model.layers[after - 1](
                changed[after - 1], attention_mask=mask, position_ids=positions, position_embeddings=rotary
            )
        torch.testing.assert_close(changed[after], expected)


# What writes to the residual stream in a block, where it is not `self_attn.o_proj` and `mlp.down_proj`.
WRITERS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "mixtral": ("self_attn.o_proj", "mlp"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "qwen3_moe": ("self_attn.o_proj", "mlp"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}


def never_written(model: Any, unit: torch.Tensor) -> Any:
    """The model made unable to write a direction: weights orthogonal to it, and where a norm or experts come last, what
    they give (Arditi et al., arXiv 2406.11717, section 4.1)."""
    decoder = getattr(model, model.base_model_prefix)
    basis = torch.eye(len(unit)) - torch.outer(unit, unit)
    model.get_input_embeddings().weight.data @= basis
    for block in decoder.layers:
        for name in WRITERS.get(model.config.model_type, ("self_attn.o_proj", "mlp.down_proj")):
            writer = block.get_submodule(name)
            if isinstance(writer, torch.nn.Linear):
                writer.weight.data = basis @ writer.weight.data
                if writer.bias is not None:
                    writer.bias.data = basis @ writer.bias.data
            else:
                writer.register_forward_hook(lambda module, args, output: output @ basis)
    return model


def nothing_reads_it(model_type: str, **settings: Any) -> bool:
    """A projection everywhere against the model that never writes the direction; own layers alone are not enough."""
    torch.manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(32), dim=0)

    def project(hidden: torch.Tensor) -> torch.Tensor:
        return hidden - (hidden @ unit)[..., None] * unit

    # Weights large enough that what blocks write matters beside the embedding.
    model = build(model_type, initializer_range=0.2, **settings)
    with torch.no_grad():
        plain = model(IDS).logits
        with changed_everywhere(model, project):
            found = model(IDS).logits
        with changed_layer(model, 2, project):
            once = model(IDS).logits
        assert torch.equal(model(IDS).logits, plain)
        expected = never_written(model, unit)(IDS).logits
    scale = float((expected - plain).abs().max())
    assert scale > 1e-3 and float((expected - once).abs().max()) > scale / 10
    return float((found - expected).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_projection_everywhere_is_a_direction_never_written(model_type: str) -> None:
    assert nothing_reads_it(model_type)


def test_a_block_whose_mlp_reads_what_attention_wrote() -> None:
    assert nothing_reads_it("gpt_neox", use_parallel_residual=False)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2"])
@pytest.mark.parametrize("mutation", ["middle", "embedding", "last"])
def test_a_place_left_out_is_caught(monkeypatch: pytest.MonkeyPatch, model_type: str, mutation: str) -> None:
    if mutation == "middle":
        monkeypatch.setitem(FAMILIES, model_type, replace(FAMILIES[model_type], middle=None))
    real: Callable[..., Any] = hooks._hooks
    left_out = {"embedding": 0, "last": 4}.get(mutation)

    def without(model: Any, actions: dict[int, Any]) -> Any:
        return real(model, {layer: action for layer, action in actions.items() if layer != left_out})

    monkeypatch.setattr(hooks, "_hooks", without)
    assert not nothing_reads_it(model_type)


def fail(hidden: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("inside the block")


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_model_is_the_same_afterwards(model_type: str) -> None:
    model = build(model_type)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before, hooked = model(IDS).logits, hooks_of(model)
        with changed_layer(model, 2, lambda hidden: hidden * 2), reading_layers(model, (0, 3)) as states:
            assert not torch.equal(model(IDS).logits, before)
        assert not states
        with changed_everywhere(model, lambda hidden: hidden + 1):
            assert not torch.equal(model(IDS).logits, before)
        with pytest.raises(RuntimeError, match="inside the block"), changed_layer(model, 1, fail):
            model(IDS)
        with pytest.raises(RuntimeError, match="inside the block"), changed_everywhere(model, fail):
            model(IDS)
        with pytest.raises(ZeroDivisionError), reading_layers(model, (1,)):
            raise ZeroDivisionError
        assert hooks_of(model) == hooked
        assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_hook_that_stays_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_remove", lambda handles: None)
    with pytest.raises(AssertionError):
        test_the_model_is_the_same_afterwards("llama")


def test_refusals() -> None:
    model = build()
    for layer in (-1, 5):
        with pytest.raises(LayerError, match=f"layer {layer} is outside this model"), reading_layers(model, (layer,)):
            pass
    assert not hooks_of(model)
    model.config.model_type = "mamba"
    with pytest.raises(UnsupportedModelError, match="mamba"), reading_layers(model, (1,)):
        pass
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile"), reading_layers(torch.compile(build()), (1,)):
        pass


def test_wrapped_models() -> None:
    from peft import LoraConfig, get_peft_model

    model = build()
    expected = true_states(model)[3]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad(), reading_layers(wrapped, (3,)) as states:
        wrapped(IDS)
        torch.testing.assert_close(states[3], expected)

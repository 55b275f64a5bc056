"""A model is asked while it is trained: it answers as it would from disk, and nothing about it changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pairtrace.engine.monitoring.live_model import same_random_state, shared_view
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.sampling import Request, Sampler
from pairtrace.engine.training.pair_trainer import drop_attention_mask
from pairtrace.errors import UnsupportedModelError


@pytest.fixture
def model(m0: Path) -> Any:
    """As training leaves it between two steps: training mode, hooks, a replaced forward."""
    model = AutoModelForCausalLM.from_pretrained(m0).train()
    drop_attention_mask(model)
    model.forward = lambda *_, **__: pytest.fail("the forward of training was called")
    model.model.layers[1].eval()
    return model


def ask(sampler: Sampler, m0: Path) -> list[str]:
    encoder = PromptEncoder.load(str(m0))
    prompts = ("Hello", "How do I clean a car that stood in the mud for a week?", "Why?")
    requests = [
        Request(name=text, prompt=encoder.encode(text, [{"role": "user", "content": text}]), seed=1) for text in prompts
    ]
    return [one.response for one in sampler.sample(requests, temperature=0, max_new_tokens=8, batch_size=3)]


def test_it_answers_as_the_checkpoint_does(model: Any, m0: Path) -> None:
    encoder = PromptEncoder.load(str(m0))
    expected = ask(Sampler.load(encoder, device="cpu"), m0)
    assert len(set(expected)) == 3
    assert ask(Sampler(shared_view(model), encoder), m0) == expected


def test_the_model_stays_as_it_was(model: Any, m0: Path) -> None:
    modes = {name: module.training for name, module in model.named_modules()}
    before = dict(model.__dict__), model.generation_config, dict(model.base_model._forward_pre_hooks)
    view = shared_view(model)
    ask(Sampler(view, PromptEncoder.load(str(m0))), m0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert model.__dict__ == before[0]
    assert model.generation_config is before[1]
    assert dict(model.base_model._forward_pre_hooks) == before[2] != {}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in view.modules())
    shared = zip(model.parameters(), view.parameters(), strict=True)
    assert all(one is other for one, other in shared), "the weights are not copied"


def test_an_adapter_takes_part(m0: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(m0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    ids = torch.arange(5, 15)[None]
    view = shared_view(model.train())
    with torch.inference_mode():
        answered = view(input_ids=ids).logits
        assert torch.equal(answered, model.eval()(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.allclose(answered, model(input_ids=ids).logits, atol=1e-3)


def test_weights_that_are_elsewhere_are_refused(m0: Path) -> None:
    config = AutoConfig.from_pretrained(m0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="monitor --follow"):
        shared_view(model)


def test_generators_stand_where_they_stood() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with same_random_state():
        draw()
    assert draw() == expected

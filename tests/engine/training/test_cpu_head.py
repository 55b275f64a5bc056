"""The LM head for CPUs against the one of TRL that it stands in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl.trainer.utils

from pairtrace.engine.training import cpu_head
from pairtrace.engine.training.cpu_head import head_for_cpu

TILED = trl.trainer.utils._ChunkedLogProbFunction


def values_and_gradients(function: Any, **settings: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((37, 16), (53, 16), (53,)))
    parameters = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets = torch.randint(0, 53, (37,), generator=generator)
    values = function(*parameters, targets, settings["temperature"], 20, settings["softcap"], settings["scale"], ())[0]
    (values * torch.linspace(-1, 1, 37)).sum().backward()
    return [values.detach(), *(parameter.grad for parameter in parameters if parameter.grad is not None)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_trl(softcap: float | None, scale: float, temperature: float) -> None:
    settings = {"softcap": softcap, "scale": scale, "temperature": temperature}
    expected = values_and_gradients(TILED.apply, **settings)
    with head_for_cpu(53, torch.device("cpu")):
        actual = values_and_gradients(trl.trainer.utils._ChunkedLogProbFunction.apply, **settings)
    assert len(actual) == len(expected) == 4
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_large_matrices_go_through_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_head, "_LARGEST_LOGITS", 100)
    settings = {"softcap": None, "scale": 1.0, "temperature": 1.0}
    expected = values_and_gradients(TILED.apply, **settings)
    with head_for_cpu(53, torch.device("cpu")):
        actual = values_and_gradients(trl.trainer.utils._ChunkedLogProbFunction.apply, **settings)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_trl_is_as_before_afterwards() -> None:
    names = ("_use_triton", "_CHUNKED_LOGPROB_CHUNK_SIZE", "_ChunkedLogProbFunction")
    before = [getattr(trl.trainer.utils, name) for name in names]
    with pytest.raises(KeyboardInterrupt), head_for_cpu(53, torch.device("cpu")):
        raise KeyboardInterrupt
    assert [getattr(trl.trainer.utils, name) for name in names] == before
    with head_for_cpu(53, torch.device("meta")):
        assert [getattr(trl.trainer.utils, name) for name in names] == before

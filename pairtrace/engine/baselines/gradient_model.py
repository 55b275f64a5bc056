"""M0 with a LoRA adapter: the policy. The same model with the adapter disabled is the reference.

Legend: P parameters of the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtrace.engine.checkpoint import load_config, load_model, resolve_checkpoint, resolve_device
from pairtrace.engine.flops import ModelShape
from pairtrace.errors import MissingDependencyError, UnsupportedModelError

_ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True, slots=True, eq=False)
class LinearCall:
    """One pass through a matrix of the adapter.

    Attributes:
        name: of the matrix.
        input: [..., in].
        output: [..., out], part of the graph.
    """

    name: str
    input: Tensor
    output: Tensor


class LoraModel:
    """A causal language model with LoRA on every linear layer but the LM head (arXiv 2106.09685).

    In a mixture of experts these are the attention's: experts are fused into one tensor there.

    Attributes:
        network: the transformers model that holds the adapter's layers.
        parameters: the matrices of the adapter by name, float32 [out, in]; a gradient [P] has them one after the
            other in this order, each row by row.
        offsets: where each begins in such a gradient.
        shape: sizes for the FLOP formulas.
        device: of the model.
    """

    def __init__(self, wrapped: Any, device: torch.device) -> None:
        self._wrapped = wrapped.to(device).eval()
        self.network = wrapped.get_base_model()
        self.device = device
        self.shape = ModelShape.from_config(self.network.config)
        self._layers: dict[str, torch.nn.Linear] = {}
        for name, module in self.network.named_modules():
            if name.endswith((f".lora_A.{_ADAPTER}", f".lora_B.{_ADAPTER}")):
                assert type(module) is torch.nn.Linear and module.bias is None
                self._layers[name] = module
        self.parameters: dict[str, Tensor] = {name: layer.weight for name, layer in self._layers.items()}
        trained = {id(parameter) for parameter in self.network.parameters() if parameter.requires_grad}
        assert trained == {id(parameter) for parameter in self.parameters.values()}
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, parameter in self.parameters.items():
            self.offsets[name] = self.size
            self.size += parameter.numel()

    @classmethod
    def load(
        cls, model: str | Path, *, rank: int, alpha: float, seed: int, device: str = "auto", dtype: str = "auto"
    ) -> LoraModel:
        """Load a checkpoint and put a fresh adapter on it; the second factor is zero, so that it changes nothing yet.

        Raises:
            MissingDependencyError: peft is not installed.
            ModelError: the checkpoint cannot be loaded.
            ConfigError: the device or dtype cannot be used.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingDependencyError("peft", "train", "the gradient baseline") from error
        from transformers import AutoModelForCausalLM

        path = resolve_checkpoint(model)
        where = resolve_device(device)
        base = load_model(AutoModelForCausalLM, path, load_config(path), dtype)
        # peft's "all-linear" would also wrap the fused experts and routers of mixtures, which no hook can see into.
        linear = [
            name
            for name, module in base.named_modules()
            if type(module) is torch.nn.Linear and module is not base.get_output_embeddings()
        ]
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, task_type="CAUSAL_LM")
        # peft draws the first factor from torch's generator, which is the caller's.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers under a name that is to change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            wrapped = get_peft_model(base, settings)
        return cls(wrapped, where)

    def reference(self) -> AbstractContextManager[None]:
        """Within this context the model is M0 itself."""
        disabled: AbstractContextManager[None] = self._wrapped.disable_adapter()
        return disabled

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the parameters, on the host."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set_adapter(self, values: dict[str, Tensor]) -> None:
        """Put these values in place of the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def recording(self) -> Iterator[list[LinearCall]]:
        """Within this context every pass through a matrix of the adapter is appended to the list.

        Raises:
            UnsupportedModelError: at the end, when a matrix was not used exactly once (weights that are shared or
                that only some tokens pass through).
        """
        calls: list[LinearCall] = []

        def hook(name: str) -> Any:
            def record(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                calls.append(LinearCall(name, inputs[0].detach(), output))

            return record

        handles = [layer.register_forward_hook(hook(name)) for name, layer in self._layers.items()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()
        if sorted(call.name for call in calls) != sorted(self._layers):
            raise UnsupportedModelError(
                "a linear layer of this architecture is not passed exactly once per forward pass, so batched per-pair "
                "gradients would be wrong; give --procedure published"
            )

"""AdamW with fp32 gradients, moments and weights for models of any dtype, and the learning rate.

A bf16 weight has 8 bits of mantissa: an update smaller than 1/256 of it is rounded away, and at the
learning rates of distillation most updates are. So 16-bit weights have an fp32 master copy. A sum
over micro-batches loses as much, so a gradient is added to the fp32 gradient of the master as soon
as a backward pass has computed it, and its 16-bit memory is freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esr_train.config import OptimConfig
from esr_train.models import ModelError

GRAD_CLIP = 1.0  # L2 norm of the whole gradient
MASTER, _STATE = "master/", "adamw/"


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step 1 to `steps`: linear warm-up, then constant or a cosine that ends near 0."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - 1 - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW without weight decay over a model's trainable parameters.

    Gradients are those of `masters`: for an fp32 parameter that is the parameter itself. `close`
    detaches the optimizer from a model that is trained on by another one.

    Raises:
        ModelError: nothing in the model is trainable.
    """

    def __init__(self, model: Any, betas: Sequence[float] = (0.9, 0.999)) -> None:
        self.betas = (betas[0], betas[1])
        self.restart(model)

    def restart(self, model: Any) -> None:
        """Begin anew, with the parameters that a model has now."""
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ModelError(
                "the student has no trainable weights: an adapter is only trained by student.lora, "
                "on a whole model; `esr-train export --merge` makes one of an adapter"
            )
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float()
            for name, p in self.parameters.items()
        }
        # Fused: one pass over memory for each parameter, where the plain one takes ten.
        self.adamw = torch.optim.AdamW(
            self.masters.values(), betas=self.betas, weight_decay=0.0, fused=True
        )
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_adds_to(self.masters[name]))
            for name, parameter in self.parameters.items()
            if self.masters[name] is not parameter
        ]

    def close(self) -> None:
        """Remove the hooks on the model's parameters; gradients are theirs again."""
        for hook in self._hooks:
            hook.remove()

    def weight_grad(self, weight: Tensor) -> Tensor | None:
        """The fp32 memory that gradients of a 16-bit parameter are summed in, else None.

        What computes a gradient in fp32 adds it there, instead of rounding it to weight.grad.
        """
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter is weight and master is not parameter:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                return master.grad
        return None

    def step(self, lr: float) -> None:
        """One update from the gradients of the model's parameters, which are cleared."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        self.zero_grad()

    def clip(self) -> Tensor:
        """Scale the gradient down to norm GRAD_CLIP; returns the norm before, a 0-d tensor."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), GRAD_CLIP)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded ones

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by parameter name."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{_STATE}{key}/{name}"] = value
            if master is not self.parameters[name]:
                tensors[MASTER + name] = master
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `state_tensors`, for parameters of the same names."""
        for full_name, tensor in tensors.items():
            if full_name.startswith(MASTER):
                self.masters[full_name.removeprefix(MASTER)].data.copy_(tensor)
                continue
            key, name = full_name.removeprefix(_STATE).split("/", 1)
            master = self.masters[name]
            # Moments are on the device of the weights; the step counter is on the CPU without CUDA.
            device = tensor.device if key == "step" and not master.is_cuda else master.device
            self.adamw.state[master][key] = tensor.to(device).clone()


def _adds_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves the gradient of a parameter into that of its master."""

    def add(parameter: Tensor) -> None:
        if parameter.grad is None:  # the loss has added it to `weight_grad`
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add

"""Hidden states and output head of a transformers causal language model, known by its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class OutputHead(NamedTuple):
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float

    def arguments(self, side: str) -> dict[str, Any]:
        """Keyword arguments of `linear_divergence` for side "student" or "teacher"."""
        return {
            f"{side}_weight": self.weight,
            f"{side}_bias": self.bias,
            f"{side}_softcap": self.softcap,
            f"{side}_logit_scale": self.scale,
        }


def output_head(model: Any) -> OutputHead:
    """The head of a model, PEFT-wrapped or not, read from its layer and its config.

    Raises:
        ValueError: the head trains more than weight and bias, such as a LoRA.
    """
    layer = model.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and parameter is not weight and parameter is not bias:
            raise ValueError(
                f"{type(model).__name__}: its head trains {name} beside weight and bias, which a "
                "loss from hidden states would leave out; remove the head from target_modules"
            )
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(weight, bias, softcap, _scale(config))


def _scale(config: Any) -> float:
    # Cohere, Muse and Falcon-H1 multiply by these; Granite and MiniCPM3 divide by the last one.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / divisor


def last_hidden(model: Any, **inputs: Any) -> Tensor:
    """[B, L, D], the states that the head of a causal model is applied to.

    Raises:
        ValueError: prompt tuning and its kind, whose virtual tokens the decoder alone does not get.
    """
    if hasattr(model, "get_base_model"):  # PEFT; its layers are inside of the base model
        configs = getattr(model, "peft_config", {}).values()
        if any(getattr(config, "is_prompt_learning", False) for config in configs):
            raise ValueError("prompt-learning adapters are not supported; use one such as LoRA")
        model = model.get_base_model()
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no decoder below its head")
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden


def inside_forward(
    wrapped: nn.Module, model: nn.Module, function: Callable[..., Any], **tensors: Any
) -> Any:
    """function(**tensors) as the forward of `wrapped`, which DDP or FSDP prepares for and follows.

    `model` is the module below the wrapper, or `wrapped` itself.
    """
    own = model.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own  # type: ignore[method-assign]

    def forward(**given: Any) -> Any:
        restore()  # `function` may call the model
        return function(**given)

    model.forward = forward  # type: ignore[method-assign]
    try:
        return wrapped(**tensors)
    finally:
        restore()

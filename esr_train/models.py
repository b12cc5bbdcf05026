"""Loads causal language models, and gives access to their decoder and output head.

The loss works on hidden states and head weights, so that [tokens, vocab] logits never exist. `Head`
holds what turns hidden states into logits: weight, bias, soft-cap and scale. `check_head`, which
every `PrefixRollout` calls once, refuses a model whose logits are computed in another way.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from esr_train.adapters import add_lora, base_of, load_adapter
from esr_train.config import Config, ModelConfig, RuntimeConfig
from esr_train.fetch import fetch_smollm2, hub_problem
from esr_train.placement import own_device, shares
from esr_train.tasks import BUILTIN_MODELS, builtin_model_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelError(RuntimeError):
    """A model that cannot be found, loaded or used; the message says what was tried."""


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    # fp32 [V, D] memory that the loss adds the weight's gradient to; None: it goes to weight.grad.
    weight_grad: Tensor | None = None

    def first(self, classes: int) -> Head:
        """The head of the first `classes` tokens of the vocabulary."""
        bias = None if self.bias is None else self.bias[:classes]
        return replace(self, weight=self.weight[:classes], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in fp32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def device() -> torch.device:
    """CUDA where there is one (CUDA_VISIBLE_DEVICES="" hides it), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(spec: ModelConfig, runtime: RuntimeConfig) -> Any:
    """The tokenizer that belongs to a model."""
    source = _source(spec)
    try:
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=runtime.trust_remote_code, **_where(source)
        )
    except (OSError, ValueError) as error:
        raise ModelError(_not_loaded(spec, source, "tokenizer", error)) from error


def load_model(spec: ModelConfig, runtime: RuntimeConfig, on: torch.device | None = None) -> Any:
    """Load a causal language model, with its adapter if it has one, in eval mode on `device()`.

    A directory may hold a whole model or, as a LoRA run leaves it, an adapter that names its base.
    """
    return _completed(_base(spec, runtime, on), spec)


def stored_dtype(spec: ModelConfig) -> torch.dtype:
    """The dtype that a model's weights have on disk."""
    source = _source(spec)
    return AutoConfig.from_pretrained(source, **_where(source)).dtype or torch.float32


def load_pair(config: Config) -> tuple[Any, Any]:
    """The student, with a fresh LoRA if `student.lora` asks for one, and the teacher; of one that a
    server has its configs alone, as a model on the meta device.

    With LoRA nothing changes the student's own weights. A teacher that is made of the same ones,
    with layers dropped or an adapter or neither, shares their memory unless it has a placement.
    """
    spec, runtime = config.student, config.runtime
    if spec.lora and base_of(_source(spec)):
        raise ModelError(f"student.lora: {spec.model!r} is an adapter itself; merge it by export")
    student = _base(spec, runtime)
    if config.teacher.url:
        teacher = _on_meta(config.teacher, runtime, torch.float32)
    elif shares(config, _source(spec), _source(config.teacher)):
        # Before the student is changed.
        teacher = _completed(share_weights(student), config.teacher)
    else:
        teacher = load_model(config.teacher, runtime, own_device(config.teacher))
    student = _completed(student, spec)
    if spec.lora:
        student = add_lora(student, spec.lora).eval()
    if runtime.gradient_checkpointing:
        _checkpoint_layers(student)
    return student, teacher


def _base(spec: ModelConfig, runtime: RuntimeConfig, on: torch.device | None = None) -> Any:
    """The model below any adapter that its directory holds, all of its layers there."""
    source = _source(spec)
    source = base_of(source) or source
    on_cuda = device().type == "cuda"
    dtype = runtime.dtype if runtime.dtype != "auto" else "bfloat16" if on_cuda else "float32"
    attention: str | None = runtime.attention
    if attention == "auto":
        on_gpu = on_cuda and getattr(spec, "placement", None) != "cpu"
        flash = on_gpu and dtype != "float32" and importlib.util.find_spec("flash_attn")
        # None is sdpa where the model has it: not Gemma 2, whose scores are soft-capped.
        attention = "flash_attention_2" if flash else None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            trust_remote_code=runtime.trust_remote_code,
            use_safetensors=True,  # a pickle can run any code
            **_where(source),
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(_not_loaded(spec, source, "model", error)) from error
    model.to(on or device()).eval()
    if runtime.liger and getattr(spec, "placement", None) != "cpu":
        _use_liger_layers(model)
    return model


def meta_pair(config: Config, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """Student and teacher as `load_pair` gives them, made of their config files alone: every
    parameter has its shape and dtype, on the meta device; and whether they share their weights.

    Raises:
        AdapterError, ModelError: as `load_pair`, where configs and shapes can tell.
    """
    spec = config.student
    if spec.lora and base_of(_source(spec)):
        raise ModelError(f"student.lora: {spec.model!r} is an adapter itself; merge it by export")
    shared = shares(config, _source(spec), _source(config.teacher))
    teacher = _completed(_on_meta(config.teacher, config.runtime, dtype), config.teacher)
    student = _completed(_on_meta(spec, config.runtime, dtype), spec)
    if spec.lora:
        student = add_lora(student, spec.lora)
    if config.runtime.gradient_checkpointing:
        _checkpoint_layers(student)
    return student, teacher, shared


def _on_meta(spec: ModelConfig, runtime: RuntimeConfig, dtype: torch.dtype) -> Any:
    source = base_of(_source(spec)) or _source(spec)
    trust = runtime.trust_remote_code
    attention = None if runtime.attention == "auto" else runtime.attention
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **_where(source))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust, attn_implementation=attention
            ).eval()
        with contextlib.suppress(OSError):  # some have none
            model.generation_config = GenerationConfig.from_pretrained(source, **_where(source))
        return model
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(_not_loaded(spec, source, "config", error)) from error


def _completed(model: Any, spec: ModelConfig) -> Any:
    """`model` without the layers that `spec` drops, and with the adapter that it names."""
    if spec.drop_layers:
        drop_layers(model, spec.drop_layers)
    adapter, source = getattr(spec, "adapter", None), _source(spec)
    if base_of(source):
        if adapter:
            raise ModelError(f"teacher.adapter: {spec.model!r} is an adapter itself; name its base")
        adapter = source
    return load_adapter(model, adapter).eval() if adapter else model


def share_weights(model: Any) -> Any:
    """A second model on the parameters and buffers of the first: modules are copied, memory is not.

    What is done to the modules of one, such as adding an adapter or removing layers, does not show
    in the other; what is written into a parameter does.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _checkpoint_layers(model: Any) -> None:
    """Have each layer recompute its activations in the backward pass, while in training mode."""
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise ModelError(
            f"runtime.gradient_checkpointing: {type(model).__name__} has no layers that support it"
        )
    # The first name is that of newer versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextlib.contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Inside, adapters have their dropout and checkpointed layers recompute, backward included.

    The rest stays in eval mode: a student is trained on the distribution that it sampled from, so
    the dropout of its pretraining is off.
    """
    switched = [
        module
        for name, module in model.named_modules()
        if ("lora_dropout" in name and isinstance(module, nn.Dropout))
        or (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing)
    ]
    try:
        for module in switched:
            module.training = True  # train() would reach all that is below
        yield
    finally:
        for module in switched:
            module.training = False


def decoder(model: Any) -> nn.Module:
    """The part of a causal model below its output head."""
    inner: nn.Module = model.get_decoder()
    return inner


def compiled(model: Any, runtime: RuntimeConfig) -> Callable[..., Any] | None:
    """The decoder as `torch.compile` has it, for any length; None if `runtime` does not ask for it.

    It computes with the model's own modules, which sampling goes on calling one by one.
    """
    return torch.compile(decoder(model), dynamic=True) if runtime.compile else None


def head(model: Any) -> Head:
    """The output head of a causal model, read from its weights and config."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies by it
    divisor = getattr(config, "logits_scaling", None)  # Granite divides by it
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
    )


def max_positions(model: Any) -> int | None:
    """The context length that the model declares, or None."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer, by the tokenizer, the generation config or the config."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for owner in (tokenizer, generation, model.config):
        ids = getattr(owner, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return sorted(found)


def check_head(model: Any) -> None:
    """Raise ModelError unless decoder and `Head` together give the model's own logits."""
    known = head(model)
    layer, weight = model.get_output_embeddings(), known.weight
    for name, parameter in layer.named_parameters():
        # An adapter may leave the logits unchanged before the first step only.
        if parameter.requires_grad and parameter is not weight and parameter is not known.bias:
            raise ModelError(
                f"{type(model).__name__}: its head trains {name} besides weight and bias, which "
                "logits from hidden states do not include; remove the head from target_modules"
            )
    ids = torch.arange(4, device=weight.device).remainder(weight.shape[0])[None]
    with torch.no_grad(), _own_forward(model):
        own = model(input_ids=ids).logits.float()
        below = decoder(model)(input_ids=ids)
        if not hasattr(below, "last_hidden_state"):
            raise ModelError(f"{type(model).__name__}: its decoder returns no last_hidden_state")
        ours = known.logits(below.last_hidden_state)
    # bf16 logits are rounded on one side only
    tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
    if own.shape != ours.shape:
        how: str | None = f"shape {list(own.shape)}, not {list(ours.shape)}"
    elif torch.allclose(
        own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max()), equal_nan=True
    ):
        how = None
    else:
        how = f"difference {float((own - ours).abs().max()):.3g}"
    if how:
        raise ModelError(
            f"{type(model).__name__}: its logits are not scale, bias and soft-cap on a linear head "
            f"over its decoder ({how}), so sampling and loss from hidden states would be of "
            "another distribution; this architecture, hook or kind of adapter is not supported"
        )


@contextlib.contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Inside, the model computes in the dtype of its weights, as its decoder does when it samples:
    Accelerate's mixed precision has put an autocast around `forward`."""
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def drop_layers(model: Any, layers: list[int]) -> None:
    """Remove decoder layers in place, and from the config, so that the model saves and loads."""
    inner: Any = decoder(model)
    count = len(inner.layers)
    bad = sorted({layer for layer in layers if not 0 <= layer < count})
    if bad or len(set(layers)) >= count:
        raise ModelError(
            f"drop_layers: got {layers}, must be layers 0 to {count - 1}, and not all of them"
        )
    kept = [index for index in range(count) if index not in set(layers)]
    inner.layers = nn.ModuleList([inner.layers[index] for index in kept])
    for position, layer in enumerate(inner.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the slot in the KV cache
                module.layer_idx = position
    config = model.config.get_text_config(decoder=True)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]


def _source(spec: ModelConfig) -> str:
    """Where `from_pretrained` finds a model: a directory or a hub id."""
    model = spec.model
    if model == "smollm2":
        return str(fetch_smollm2())
    if model.startswith("builtin:"):
        name = model.removeprefix("builtin:")
        try:
            path = builtin_model_path(name)
        except ValueError as error:
            raise ModelError(
                f"{spec.key} {model!r}: no such built-in model, there are "
                + ", ".join(f"builtin:{known}" for known in BUILTIN_MODELS)
            ) from error
        return str(path)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{spec.key} {model!r}: no such directory{spec.hint}")
    return model


def _where(source: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`: only files that are here, if the hub cannot be asked."""
    return {"local_files_only": not Path(source).is_dir() and hub_problem() is not None}


def _not_loaded(spec: ModelConfig, source: str, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if Path(source).is_dir():
        return f"{spec.key}: {what} {spec.model!r}: {source} could not be loaded: {reason}"
    return (
        f"{spec.key}: {what} {spec.model!r}: not a local directory, and not loaded from the "
        f"Hugging Face hub ({type(error).__name__}: {reason}). Give builtin:NAME, smollm2, the "
        f"path of a model directory, or a hub id that this machine can reach{spec.hint}"
    )


def _use_liger_layers(model: Any) -> None:
    """liger-kernel's rotary embedding, norm and MLP on this instance; not its losses."""
    if device().type != "cuda" or not importlib.util.find_spec("liger_kernel"):
        raise ModelError(
            "runtime.liger: needs a GPU and liger-kernel (pip install 'esr-distill[gpu]')"
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )

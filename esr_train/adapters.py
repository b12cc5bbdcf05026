"""LoRA adapters, by peft: made, loaded, stored and merged. peft is imported where it is needed.

An adapter is stored as peft stores it, in safetensors only: adapter_config.json and
adapter_model.safetensors. A model that carries one is a `PeftModel`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from esr_train.config import LoraConfig
from esr_train.fetch import hub_problem

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SEED = 0  # of A; B starts at zero, and with it what the adapter adds


class AdapterError(RuntimeError):
    """An adapter that cannot be made, found or used; the message says what was tried."""


def add_lora(model: Any, config: LoraConfig) -> Any:
    """`model`, frozen, with fp32 adapters that are trained, always the same initial ones.

    Its linear layers are replaced in place; only the returned PeftModel should be used.
    """
    peft = _peft("student.lora")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:  # no layer has such a name
            raise AdapterError(f"student.lora: {error}") from error


def is_adapted(model: Any) -> bool:
    """Whether `model` carries an adapter: what is stored of it is the adapter alone."""
    return hasattr(model, "peft_config")


def base_of(directory: str) -> str | None:
    """The model that the adapter in a directory is for; None if the directory holds no adapter."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        return None
    base: str | None = json.loads(path.read_text()).get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{path} does not say which model the adapter is for")
    return base


def load_adapter(model: Any, source: str) -> Any:
    """`model` with the frozen adapter of a directory or a hub repository."""
    peft = _peft(f"adapter {source!r}")
    directory = _directory(source)
    try:
        settings = peft.PeftConfig.from_pretrained(str(directory))
        settings.inference_mode = True
        settings.base_model_name_or_path = None  # peft warns if it is not where the model came from
        tensors = load_file(directory / WEIGHTS)
        model = peft.get_peft_model(model, settings)
        put_adapter(model, tensors)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"adapter {source!r} cannot be used with this model: {error}") from error
    return model.requires_grad_(False)


def save_adapter(
    model: Any, directory: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter of `model`, without the model; of `weights` where they are given."""
    # peft would look for the base's vocabulary on the hub to learn whether embeddings have changed.
    model.save_pretrained(directory, save_embedding_layers=False, state_dict=weights)


def put_adapter(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a stored adapter into that of `model`; raise ValueError if some differ."""
    peft = _peft("adapter")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [list(t[name].shape) if name in t else None for t in (own, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[0]} in the model, {shapes[1]} in the file")
    if not any(tensor.is_meta for tensor in own.values()):  # that has shapes alone
        peft.set_peft_model_state_dict(model, tensors)


def merged(model: Any) -> Any:
    """The plain model whose weights are those of `model` with its adapter added in, in place."""
    return model.merge_and_unload()


def _directory(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
            raise AdapterError(f"adapter {source!r}: no such directory")
        try:
            path = Path(
                snapshot_download(
                    source,
                    allow_patterns=[CONFIG, WEIGHTS],
                    local_files_only=hub_problem() is not None,
                )
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise AdapterError(
                f"adapter {source!r}: not a local directory and not to be had from the Hugging "
                f"Face hub: {reason}"
            ) from error
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise AdapterError(f"adapter {source!r}: {path} has no {name}")
    return path


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise AdapterError(f"{what}: needs peft: pip install 'esr-distill[lora]'") from error
    return peft

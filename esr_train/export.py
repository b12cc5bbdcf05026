"""`esr-train export`: the model of a run as a directory that other tools load.

A fully trained model is copied as it is, and so is an adapter, for `PeftModel`. With `merge` an
adapter is added into its base, in fp32, and the sum stored in the dtype of the base: a model for
`AutoModelForCausalLM`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from esr_train import adapters, checkpoint
from esr_train.config import Config, ConfigError, load_config
from esr_train.models import load_model, load_tokenizer, stored_dtype


def export(run_dir: Path, out: Path, arm: str, seed: int | None, best: bool, merge: bool) -> Path:
    """Write the final, or the best, model of a run to `out`, which must not hold anything.

    `arm` is "train" for a run of `train`; seed None is the first one.

    Raises:
        ConfigError: there is no such run, or nothing of it to export; or `out` is not empty.
        AdapterError, ModelError: the base of an adapter cannot be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is not empty")
    config = load_config(run_dir / "config.yaml")
    model = find_model(
        run_dir / "arms" / arm / f"seed{config.seeds[0] if seed is None else seed}", best
    )
    if not (model / adapters.CONFIG).is_file():
        if merge:
            raise ConfigError(f"--merge: {model} is a whole model already")
        shutil.copytree(model, out, dirs_exist_ok=True)
    elif merge:
        _merge(config, model, out)
    elif config.student.drop_layers:
        raise ConfigError(
            f"{model} is an adapter for {config.student.model} without layers "
            f"{config.student.drop_layers}, which no other tool would drop: use --merge"
        )
    else:
        shutil.copytree(model, out, dirs_exist_ok=True)
    return out


def find_model(directory: Path, best: bool) -> Path:
    """The directory of a model: where `compare` leaves it, or in a checkpoint."""
    if not directory.is_dir():
        arms = directory.parents[1]
        runs = sorted(path.relative_to(arms) for path in arms.glob("*/seed*"))
        found = ", ".join(map(str, runs)) or "none"
        raise ConfigError(f"no run {directory}; --arm and --seed may be those of {found}")
    kept = directory / ("best" if best else "model")
    checkpoints = directory / "checkpoints"
    if kept.is_dir():
        return kept
    saved = checkpoint.best(checkpoints) if best else checkpoint.latest(checkpoints)
    if saved is None:
        what = "best model; see checkpoint.keep_best" if best else "checkpoint"
        raise ConfigError(f"{directory} has no {what}")
    return saved if best else saved / "model"


def _merge(config: Config, adapter: Path, out: Path) -> None:
    base = load_model(config.student, config.runtime.model_copy(update={"dtype": "float32"}))
    model = adapters.merged(adapters.load_adapter(base, str(adapter)))
    model.to(stored_dtype(config.student)).save_pretrained(out)
    load_tokenizer(config.student, config.runtime).save_pretrained(out)

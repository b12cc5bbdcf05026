"""The configuration: frozen models from YAML plus dotted overrides, strict in keys and types.

    config = load_config(Path("configs/demo.yaml"), ["optim.lr=1e-4", "steps=20"])

sections.py   what there is to set: a class a section
servers.py    what may be set of a teacher or a sampler on a server
loading.py    how it is read, changed and checked, and what is said of a mistake
"""

from esr_train.config.errors import ConfigError
from esr_train.config.loading import arm_config, load_config, to_yaml, with_overrides
from esr_train.config.sections import (
    EVAL_PROBLEMS,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ReportConfig,
    RolloutConfig,
    RuntimeConfig,
    TeacherConfig,
    TrackingConfig,
    TuneConfig,
)

__all__ = [
    "EVAL_PROBLEMS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ReportConfig",
    "RolloutConfig",
    "RuntimeConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TuneConfig",
    "arm_config",
    "load_config",
    "to_yaml",
    "with_overrides",
]

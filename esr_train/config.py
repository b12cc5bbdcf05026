"""The configuration: frozen models from YAML plus dotted overrides, strict in keys and types.

    config = load_config(Path("configs/demo.yaml"), ["optim.lr=1e-4", "steps=20"])

An unknown key is an error that names the nearest known key. A value of the wrong type or out of
range is an error that names the key, the value and what is allowed. `null` is allowed only where
the type says `| None`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

EVAL_PROBLEMS = 64  # at most, where `eval.problems` is null


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what is allowed."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(_Strict):
    """Low-rank adapters: weight + alpha / r * B @ A; A [r, in] and B [out, r] are trained."""

    r: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapters' inputs; in training, not in sampling
    # Linear layers that get an adapter: "all-linear", which is all but the head, or ends of names.
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


_TopP = Annotated[float, Field(gt=0, le=1)]
_MinP = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(_Strict):
    model: str = Field(min_length=1)  # builtin:NAME, smollm2, a hub id, or a local directory
    drop_layers: list[int] = []  # decoder layers to remove after loading


class StudentConfig(ModelConfig):
    lora: LoraConfig | None = None  # train adapters (peft) and freeze the rest; null = all weights


class TeacherConfig(ModelConfig):
    adapter: str | None = None  # directory or hub id of a peft adapter that the teacher has


class RuntimeConfig(_Strict):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 on CUDA, else fp32
    attention: str = "auto"  # auto: flash_attention_2 on CUDA where installed, else sdpa or eager
    gradient_checkpointing: bool = False  # keep a layer's inputs alone, and run it again backward
    compile: bool = False  # torch.compile forward passes over whole sequences; not the sampling
    liger: bool = False  # norm, rotary embedding and MLP of liger-kernel; needs CUDA
    trust_remote_code: bool = False  # run model code that comes with a hub repository


class DataConfig(_Strict):
    """Where problems come from; `subset` to `grader` are for files and hub datasets."""

    # sums, prompts, prompts:PATH.txt, reasoning_gym:NAME, a .jsonl, .json or .parquet file, a
    # dataset of the Hugging Face hub, or an import path a.b:name of an esr_train.tasks.Task
    task: str = Field(default="sums", min_length=1)
    subset: str | None = None  # of a hub dataset, such as main
    split: str = "train"  # the split that is trained on
    # What is held out: a file, the name of another split, or null for every 10th problem
    heldout: str | None = None
    prompt: str = "prompt"  # column with text, or with a list of {role, content} messages
    answer: str | None = None  # column that the grader compares with; null = answers are not graded
    teacher_prompt: str | None = None  # column with the teacher's own prompt; null = the student's
    grader: str | None = None  # exact, math, function_call, python, or an import path a.b:function
    allow_code: bool = False  # grader python: run the code in answers, in a process without network
    chat: bool | None = None  # through the chat template; null = if the tokenizer has one
    system: str | None = None  # system message before every prompt
    chat_template_kwargs: dict[str, Any] = {}  # such as {enable_thinking: false}


class RolloutConfig(_Strict):
    prompts: PositiveInt = 16  # prompts per step
    samples: PositiveInt = 1  # responses sampled per prompt
    max_new_tokens: PositiveInt = 100  # N: response tokens sampled and trained on, EOS included
    temperature: float = 1.0  # of the sampling; 0 = greedy
    top_k: NonNegativeInt = 0  # sample from the k most probable tokens; 0 = all
    top_p: _TopP = 1.0  # from the fewest tokens with this share of the probability; 1 = all
    min_p: _MinP = 0.0  # from tokens of at least this share of the largest probability
    max_tokens_in_flight: PositiveInt | None = None  # KV cache; null = half of free GPU memory

    @property
    def filters(self) -> dict[str, Any]:
        """What cuts the distribution that is sampled, by the names of `SamplingParams`."""
        return {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if value != 0 and value < 1e-6:
            raise ValueError("must be 0 (greedy) or a finite number of at least 1e-6")
        return value


class LossConfig(_Strict):
    # reverse_kl, forward_kl, jeffreys, jsd, skew_forward_kl, skew_reverse_kl, total_variation
    divergence: str = "reverse_kl"
    denominator: Literal["token", "trajectory", "fixed"] = "token"  # what the sum is divided by
    fixed_length: PositiveInt | None = None  # "fixed" divides by responses x fixed_length
    window: Literal["first", "last", "middle", "random"] = "first"  # part that is trained on
    window_tokens: PositiveInt | None = None  # length of the window; null = the whole response
    temperature: PositiveFloat = 1.0  # both models' logits are divided by this
    train_on_eos: bool = True  # the EOS token is part of the answer
    merge_terminators: bool = False  # all ways to end an answer, of both models, are one class
    impl: Literal["auto", "torch", "triton", "reference"] = "auto"  # reference = plain PyTorch

    @model_validator(mode="after")
    def _check_denominator(self) -> LossConfig:
        if self.denominator == "fixed" and self.fixed_length is None:
            raise ConfigError(
                "loss.fixed_length: got None, must be a number of tokens where loss.denominator is "
                "'fixed'"
            )
        return self


class OptimConfig(_Strict):
    lr: PositiveFloat = 1e-5  # AdamW, peak learning rate
    warmup_steps: NonNegativeInt = 0  # linear, from lr / warmup_steps
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    micro_batch: PositiveInt | None = None  # responses per forward and backward; null = all at once
    # Tokens of prompts and responses per forward and backward, padding included; a response that is
    # longer is alone in its own. null = no limit; with micro_batch, both limits hold.
    max_tokens: PositiveInt | None = None


class EvalConfig(_Strict):
    every: NonNegativeInt = 0  # steps between evaluations; 0 = no evaluation
    problems: PositiveInt | None = None  # held-out problems; null = all, but at most 64
    samples: PositiveInt = 1  # sampled answers a problem, beside the greedy one: avg@k, pass@k
    max_new_tokens: PositiveInt = 256  # longest answer in an evaluation
    teacher_text: NonNegativeInt = 0  # tokens of teacher text a problem to measure KL on; 0 = off
    student_text: NonNegativeInt = 0  # the same on the student's own sampled answers
    # Positions at which divergences are also reported apart: 0-31, 32-99, ... and the rest
    position_bins: list[PositiveInt] = []

    @field_validator("position_bins")
    @classmethod
    def _check_bins(cls, bins: list[int]) -> list[int]:
        if bins != sorted(set(bins)):
            raise ValueError("must be increasing")
        return bins


class CheckpointConfig(_Strict):
    every: NonNegativeInt = 0  # steps between checkpoints; 0 = only at the end
    keep: PositiveInt = 2  # newest checkpoints kept
    keep_best: bool = True  # also keep the model with the best report.metric
    keep_models: bool = True  # `compare` keeps the final and the best model of each run
    # auto: resume from the newest one; never: `train` refuses, `compare` replaces what is there
    resume: Literal["auto", "never"] = "auto"  # whether an earlier run in --out is resumed


class TrackingConfig(_Strict):
    # Accelerate's trackers of these names get every row of metrics.jsonl and every evaluation
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    project: str = Field(default="esr", min_length=1)  # what a tracker files the runs under


class ReportConfig(_Strict):
    metric: str = "greedy_accuracy"  # evaluation metric that the report is about
    threshold: float = 0.9  # value of it that "time to reach" means
    higher_is_better: bool = True  # False for divergences
    baseline: str | None = None  # name of the arm that ratios refer to; null = no ratios


class Config(_Strict):
    """One experiment.

    `arms` are for `compare`: each has a `name` and the keys that differ, for example
    {name: esr-32, max_new_tokens: 32} (short for rollout.max_new_tokens) or
    {name: last-32, loss.window: last, loss.window_tokens: 32}.
    """

    student: StudentConfig  # the model that is trained
    teacher: TeacherConfig  # the model that it is trained to match
    runtime: RuntimeConfig = RuntimeConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    report: ReportConfig = ReportConfig()
    steps: PositiveInt = 100  # optimizer steps
    seeds: list[int] = [0]  # `train` uses the first, `compare` all
    arms: list[dict[str, Any]] = []  # what `compare` compares

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError("must be different integers, at least one")
        return seeds

    @model_validator(mode="after")
    def _check_arms(self) -> Config:
        names: list[Any] = [arm.get("name") for arm in self.arms]
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[^./\\][^/\\]*", name):
                raise ConfigError(f"arms: each needs a name that can be a directory, got {name!r}")
            if names.count(name) > 1:
                raise ConfigError(f"arms: the name {name!r} is used twice")
        baseline = self.report.baseline
        if baseline is not None and baseline not in names:
            allowed = ", ".join(map(repr, names)) or "null without arms"
            raise ConfigError(
                f"report.baseline: got {baseline!r}, must be the name of an arm ({allowed})"
                + _did_you_mean(baseline, names)
            )
        for arm in self.arms:
            for key in arm:
                if key.partition(".")[0] in _COMMON:
                    raise ConfigError(
                        f"arm {arm['name']}: {key} cannot differ between arms, which share their "
                        "models; make a comparison for each value"
                    )
            arm_config(self, arm)
        return self


# Sections that the arms of a comparison have in common.
_COMMON = ("student", "teacher", "runtime")
# Keys that are about the model named beside them.
_OF_A_MODEL = {"drop_layers": "[]", "adapter": "null"}
# Keys of an arm that may be written without their section.
_ARM_SHORT = {"max_new_tokens": "rollout.max_new_tokens"}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, and 1e-4 is a float as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            problem = f"{twice[0]!r} is given twice in the mapping"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML), apply "section.key=value" overrides (values in YAML), and check."""
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file")
    data = _from_yaml(path.read_bytes(), f"config: {path} is not valid YAML") or {}
    changes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override: got {override!r}, expected section.key=value")
        changes[key.strip()] = _from_yaml(text, f"override {key}")
    return _validated(data, changes)


def with_overrides(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted keys replaced, checked."""
    return _validated(config.model_dump(), changes)


def arm_config(config: Config, arm: Mapping[str, Any]) -> Config:
    """The configuration that one arm of a comparison trains with."""
    changes = {_ARM_SHORT.get(key, key): value for key, value in arm.items() if key != "name"}
    try:
        return with_overrides(config, {"arms": [], "report.baseline": None, **changes})
    except ConfigError as error:
        raise ConfigError(f"arm {arm['name']}: {error}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same Config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, width=100)


def _from_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _validated(data: Any, changes: Mapping[str, Any]) -> Config:
    """The Config of plain data with dotted keys replaced."""
    if not isinstance(data, dict):
        raise ConfigError(f"config: got {data!r}, must be a mapping of keys to values")
    _check_of_the_model(data, changes)
    for key, value in changes.items():
        if key not in _known_keys():
            raise ConfigError(_unknown(key))
        data = _replaced(data, key.split("."), value)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _first_error(error) from error


def _replaced(data: Any, path: list[str], value: Any) -> Any:
    """`data` with the value at `path` replaced; what is no mapping stays, to be an error later."""
    if not path:
        return value
    data = {} if data is None else data
    if not isinstance(data, dict):
        return data
    return {**data, path[0]: _replaced(data.get(path[0]), path[1:], value)}


def _check_of_the_model(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise ConfigError if another model would get what was meant for the one it replaces."""
    for section in ("student", "teacher"):
        before, model = data.get(section), changes.get(f"{section}.model")
        if model is None or not isinstance(before, dict):
            continue
        if before.get("model") in (None, model):
            continue
        for name, nothing in _OF_A_MODEL.items():
            key = f"{section}.{name}"
            if before.get(name) and key not in changes:
                raise ConfigError(
                    f"{key}: {before[name]} is for {before['model']}; with {section}.model={model} "
                    f"give {key} as well, {key}={nothing} for none"
                )


def _first_error(error: ValidationError) -> ConfigError:
    """One of pydantic's errors in one line; unknown keys first, which may cause a missing one."""
    unknown = ("extra_forbidden", "invalid_key")
    found = min(error.errors(), key=lambda item: item["type"] not in unknown)
    key, cause = ".".join(map(str, found["loc"])), found.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    if found["type"] in unknown:
        return ConfigError(_unknown(key))
    if found["type"] == "missing":
        model = key.removesuffix(".model") + ".model"
        return ConfigError(f"{model}: missing; give builtin:NAME, smollm2, a hub id or a path")
    key = re.sub(r"\.(\d+)", r"[\1]", key)
    allowed = re.sub(r"^\w+ should", "must", found["msg"].removeprefix("Value error, "))
    if found["type"] in ("model_type", "dict_type"):
        allowed = "must be a mapping of keys to values"
    return ConfigError(f"{key}: got {found['input']!r}, {allowed}")


def _unknown(key: Any) -> str:
    return f"unknown key {key!r}{_did_you_mean(str(key), _known_keys())}"


def _known_keys(section: Any = None) -> list[str]:
    """Dotted keys of a section, those of sections in it included; of Config if none is given."""
    keys = []
    for name, field in (section or Config).model_fields.items():
        keys.append(name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if hasattr(inner, "model_fields"):
                keys += [f"{name}.{key}" for key in _known_keys(inner)]
    return keys


def _did_you_mean(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    nearest += [key for key in known if key.endswith("." + word)]  # written without its section
    return f"; did you mean {nearest[0]!r}?" if nearest else ""

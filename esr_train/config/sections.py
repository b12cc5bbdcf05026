"""The sections of a configuration: each key with its type, range, default and help.

The models are frozen and strict: no unknown key, no value of another type. `null` is allowed only
where the type says `| None`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from esr_train.config.errors import ConfigError
from esr_train.config.servers import Url, check_served_losses, check_served_rollout, check_teacher

EVAL_PROBLEMS = 64  # at most, where `eval.problems` is null


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
    key: ClassVar[str] = "model"  # of the configuration; errors about the model name it
    model: str = Field(min_length=1)  # builtin:NAME, smollm2, a hub id, or a local directory
    drop_layers: list[int] = []  # decoder layers to remove after loading

    @property
    def hint(self) -> str:
        """What else to think of where `model` is not found."""
        return ""


class StudentConfig(ModelConfig):
    key: ClassVar[str] = "student.model"
    lora: LoraConfig | None = None  # train adapters (peft) and freeze the rest; null = all weights


class TeacherConfig(ModelConfig):
    key: ClassVar[str] = "teacher.model"
    adapter: str | None = None  # directory or hub id of a peft adapter that the teacher has
    # Server of the teacher; `model` then gives tokenizer and config alone. null = this process
    url: Url | None = None
    served_name: str | None = None  # the teacher's name at that server; null = as `model`
    logprobs: PositiveInt = 20  # of the most probable tokens, that a server is asked for a position
    # fsdp: a part on each of several processes (FSDP2); cuda:1 or cpu: all of it there. null = all
    # of it beside the student
    placement: str | None = None

    @field_validator("placement")
    @classmethod
    def _check_placement(cls, placement: str | None) -> str | None:
        if placement is not None and not re.fullmatch(r"fsdp|cpu|cuda(:\d+)?", placement):
            raise ValueError("must be null, fsdp, cpu, cuda or cuda:N")
        return placement

    @property
    def hint(self) -> str:
        return "; its name at teacher.url is teacher.served_name" if self.url else ""

    @model_validator(mode="after")
    def _check_url(self) -> TeacherConfig:
        check_teacher(self)
        return self


def _increasing(values: list[int]) -> list[int]:
    if values != sorted(set(values)):
        raise ValueError("must be increasing")
    return values


_Increasing = Annotated[list[PositiveInt], AfterValidator(_increasing)]


class RuntimeConfig(_Strict):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 on CUDA, else fp32
    attention: str = "auto"  # auto: flash_attention_2 on CUDA where installed, else sdpa or eager
    gradient_checkpointing: bool = False  # keep a layer's inputs alone, and run it again backward
    compile: bool = False  # torch.compile forward passes over whole sequences; not the sampling
    # Of several processes each keeps a part of the student and of its optimizer state (FSDP2)
    fsdp: bool = False
    liger: bool = False  # norm, rotary embedding and MLP of liger-kernel; needs CUDA
    trust_remote_code: bool = False  # run model code that comes with a hub repository
    requests: PositiveInt = 32  # that a process has waiting at a server (teacher.url, rollout.url)
    request_seconds: PositiveFloat = 600.0  # without a byte, after which a request is sent again


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
    # Whose answers are trained on: the student's of every step; the initial student's, frozen; the
    # teacher's. Frozen ones and the teacher's are sampled once a prompt.
    source: Literal["student", "initial_student", "teacher"] = "student"
    # Server that samples the answers of a frozen source; it has the same model. null = this process
    url: Url | None = None
    served_name: str | None = None  # that model's name at rollout.url; null = as `model`
    pool: PositiveInt | None = None  # different prompts that a run sees; null = all of the task
    # N of the first step, from where it grows linearly to max_new_tokens at the last; null = fixed
    grow_from: PositiveInt | None = None

    def length(self, step: int, steps: int) -> int:
        """Response tokens that step 1, ..., `steps` samples at most."""
        if self.grow_from is None or steps == 1:
            return self.max_new_tokens
        grown = (self.max_new_tokens - self.grow_from) * (step - 1) / (steps - 1)
        return self.grow_from + round(grown)

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

    @model_validator(mode="after")
    def _check_url(self) -> RolloutConfig:
        check_served_rollout(self)
        return self

    @model_validator(mode="after")
    def _check_growth(self) -> RolloutConfig:
        if self.grow_from is None:
            return self
        if self.grow_from > self.max_new_tokens:
            raise ConfigError(
                f"rollout.grow_from: got {self.grow_from}, must be at most "
                f"rollout.max_new_tokens, {self.max_new_tokens}"
            )
        if self.source != "student":
            raise ConfigError(
                f"rollout.grow_from: got {self.grow_from}, must be null where rollout.source is "
                f"{self.source!r}: its answers are sampled once"
            )
        return self


class LossConfig(_Strict):
    # reverse_kl, forward_kl, jeffreys, jsd, skew_forward_kl, skew_reverse_kl, total_variation; or
    # cross_entropy: fine-tuning on the teacher's answers, where rollout.source is teacher
    divergence: str = "reverse_kl"
    denominator: Literal["token", "trajectory", "fixed"] = "token"  # what the sum is divided by
    fixed_length: PositiveInt | None = None  # "fixed" divides by responses x fixed_length
    # Part of each response that is trained on. scattered: positions drawn at random; selected:
    # those with the largest signal
    window: Literal["first", "last", "middle", "random", "scattered", "selected"] = "first"
    window_tokens: PositiveInt | None = None  # tokens of the window; null = the whole response
    # The signal of window=selected; the product of several
    select_by: list[Literal["student_entropy", "teacher_entropy", "divergence"]] = []
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

    @model_validator(mode="after")
    def _check_selection(self) -> LossConfig:
        if (self.window == "selected") != bool(self.select_by):
            raise ConfigError(
                f"loss.select_by: got {self.select_by}, must name a signal where loss.window is "
                "'selected', and none elsewhere"
            )
        if self.select_by and self.window_tokens is None:
            raise ConfigError(
                "loss.window_tokens: got None, must be the tokens of a response that "
                "loss.window=selected trains on"
            )
        return self

    @model_validator(mode="after")
    def _check_cross_entropy(self) -> LossConfig:
        if self.divergence == "cross_entropy" and (self.merge_terminators or self.select_by):
            key = "merge_terminators" if self.merge_terminators else "select_by"
            raise ConfigError(
                f"loss.{key}: got {getattr(self, key)}, must be left out where loss.divergence is "
                "'cross_entropy', which compares no distributions"
            )
        return self


_Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class OptimConfig(_Strict):
    lr: PositiveFloat = 1e-5  # AdamW, peak learning rate
    # Decay of the means of gradients and of their squares; [0.9, 0.95] forgets the first steps soon
    betas: _Betas = [0.9, 0.999]
    warmup_steps: NonNegativeInt = 0  # linear, from lr / warmup_steps
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    micro_batch: PositiveInt | None = None  # responses per forward and backward; null = all at once
    # Tokens of prompts and responses per forward and backward, padding included; a response that is
    # longer is alone in its own. null = no limit; with micro_batch, both limits hold.
    max_tokens: PositiveInt | None = None


class EvalConfig(_Strict):
    every: NonNegativeInt = 0  # steps between evaluations; 0 = no evaluation
    problems: PositiveInt | None = None  # held-out problems; null = all, but at most 64
    validation: bool = False  # held-out problems that are not those of a test, as for `--tune`
    samples: PositiveInt = 1  # sampled answers a problem, beside the greedy one: avg@k, pass@k
    max_new_tokens: PositiveInt = 256  # longest answer in an evaluation
    teacher_text: NonNegativeInt = 0  # tokens of teacher text a problem to measure KL on; 0 = off
    student_text: NonNegativeInt = 0  # the same on the student's own sampled answers
    # Positions at which divergences are also reported apart: 0-31, 32-99, ... and the rest
    position_bins: _Increasing = []


class CheckpointConfig(_Strict):
    every: NonNegativeInt = 0  # steps between checkpoints; 0 = only at the end
    keep: PositiveInt = 2  # newest checkpoints kept
    keep_best: bool = True  # also keep the model with the best report.metric
    keep_models: bool = True  # `compare` keeps the final and the best model of each run
    # auto: resume from the newest one; never: `train` refuses, `compare` replaces what is there
    resume: Literal["auto", "never"] = "auto"  # whether an earlier run in --out is resumed


class DiagnoseConfig(_Strict):
    """What `diagnose` measures, on held-out problems; answers are those of `eval` in number and
    length, and training those of `arms` and `seeds`."""

    problems: PositiveInt = 64  # as many as there are, if fewer
    prefixes: _Increasing = [8, 32, 64, 128]  # tokens after which a teacher goes on
    arms: list[str] | None = None  # trained and compared with the start; null = first and last
    run: str | None = None  # a run directory whose final models are taken; null = train them


class TrackingConfig(_Strict):
    # Accelerate's trackers of these names get every row of metrics.jsonl and every evaluation
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    project: str = Field(default="esr", min_length=1)  # what a tracker files the runs under


class ReportConfig(_Strict):
    metric: str = "greedy_accuracy"  # evaluation metric that the report is about
    threshold: float = 0.9  # value of it that "time to reach" means
    higher_is_better: bool = True  # False for divergences
    baseline: str | None = None  # name of the arm that ratios refer to; null = no ratios


class TuneConfig(_Strict):
    """What `compare --tune` does before the test: a grid of optim.lr for each arm."""

    rates: list[PositiveFloat] = []  # the grid of every arm
    seeds: list[int] = [1000, 1001]  # validation seeds, other than `seeds`
    # Directory of an earlier tuned comparison whose choice the arms' optim.lr are; checked
    chosen_in: str | None = None

    @field_validator("rates", "seeds")
    @classmethod
    def _check_different(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("must be different from each other")
        return values


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
    tune: TuneConfig = TuneConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
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
    def _check_served_teacher(self) -> Config:
        check_served_losses(self)
        return self

    @model_validator(mode="after")
    def _check_sections_together(self) -> Config:
        if self.loss.divergence == "cross_entropy" and self.rollout.source != "teacher":
            raise ConfigError(
                f"rollout.source: got {self.rollout.source!r}, must be 'teacher' where "
                "loss.divergence is 'cross_entropy': a student learns nothing from its own tokens"
            )
        sharded = self.runtime.fsdp or self.teacher.placement == "fsdp"
        if self.runtime.compile and sharded:
            raise ConfigError(
                "runtime.compile: got True, must be false where runtime.fsdp or "
                "teacher.placement=fsdp shards a model"
            )
        if self.tune.rates and not self.tune.seeds:
            raise ConfigError("tune.seeds: got [], must be at least one where tune.rates is given")
        common = sorted(set(self.seeds) & set(self.tune.seeds))
        if self.tune.rates and common:
            raise ConfigError(
                f"tune.seeds: got {self.tune.seeds}, of which {common} are in seeds; a rate is "
                "chosen on other seeds than those that are reported"
            )
        return self

"""What the diagnostics share: problems, the texts that models write on them, and their scores.

Everything is sampled on the same held-out problems with the same noise, row by row, so that models
are compared on pairs. A text, and what is measured on it, is made when a diagnostic first asks for
it, and kept. What is of the untrained student is made before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esr_train.adapters import CONFIG as ADAPTER_FILE
from esr_train.adapters import load_adapter
from esr_train.arms import Arms
from esr_train.config import (
    Config,
    ConfigError,
    LossConfig,
    ModelConfig,
    arm_config,
    with_overrides,
)
from esr_train.diagnose.intervals import position_edges
from esr_train.diagnose.measure import TokenValues, token_values
from esr_train.diagnose.progress import Progress
from esr_train.evaluate import SEED
from esr_train.export import find_model
from esr_train.models import load_model
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.vocabulary import Vocabulary


@dataclass(frozen=True)
class Trained:
    """A student after training, and values [B, N] on three sorts of text."""

    arm: str
    seed: int
    window: int  # tokens of an answer that were trained on
    steps: int
    answers: RolloutBatch  # its own
    own: TokenValues  # on its own answers
    student: TokenValues  # on those of the untrained student
    teacher: TokenValues  # on the teacher's


class Bench:
    """Models and problems of a configuration with a `diagnose` section.

    Args:
        run_dir: where the trained students are, or will be: arms/NAME/seedS.
        trains: train those that are not there.

    Raises:
        ConfigError: a key that the diagnostics cannot use.
        ContextError: a problem whose answers do not fit the context of a model.
    """

    def __init__(self, config: Config, run_dir: Path, trains: bool, progress: Progress) -> None:
        check_keys(config)
        self.config, self.keys, self.progress = config, config.diagnose, progress
        self.run_dir, self.trains = run_dir, trains
        self.arms = Arms(training_config(config))
        experiment = self.experiment = self.arms.experiment
        self.student, self.teacher = experiment.student, experiment.teacher
        self.vocabulary = experiment.alignment.vocabulary
        if not self.vocabulary.same_tokens:
            raise ConfigError(
                "diagnose: student and teacher must have a tokenizer in common, since each reads "
                "what the other has begun"
            )
        self.task, tokenized = experiment.tokenized.task, experiment.tokenized
        try:
            self.problems = self.task.problems("heldout", problem_count(config, self.task), SEED)
        except ValueError as error:
            raise ConfigError(f"diagnose.problems: {error}") from error
        self.samples, self.limit = config.eval.samples, config.eval.max_new_tokens
        self.rows = [problem for problem in self.problems for _ in range(self.samples)]
        self.prompts = [tokenized.ids(problem) for problem in self.rows]
        own = [tokenized.teacher_ids(problem) for problem in self.rows]
        self.teacher_prompts = None if None in own else [ids for ids in own if ids]
        self.student.check_fits(self.prompts, self.limit)
        self.teacher.rollout.check_fits(self.teacher_prompts or self.prompts, self.limit)
        self.arms.check()

    @property
    def scored(self) -> bool:
        """Whether the task can check answers."""
        return self.problems[0].answer is not None

    @cached_property
    def edges(self) -> list[int]:
        """Positions at which bins begin."""
        longest = max(int(x.lengths.max()) for x in (self.student_answers, self.teacher_answers))
        return position_edges(longest, windows(self.config))

    @cached_property
    def student_answers(self) -> RolloutBatch:
        """Sampled by the untrained student."""
        return self.write(self.student, "answers of the student")

    @cached_property
    def teacher_answers(self) -> RolloutBatch:
        """Sampled by the teacher; `prompts` are those that the student reads."""
        return self.write(self.teacher.rollout, "answers of the teacher")

    @cached_property
    def on_student(self) -> TokenValues:
        """Of the untrained student on its own answers."""
        return self.values(self.student, self.student_answers)

    @cached_property
    def on_teacher(self) -> TokenValues:
        """Of the untrained student on the teacher's answers."""
        return self.values(self.student, self.teacher_answers)

    @cached_property
    def merged(self) -> tuple[TokenValues, TokenValues]:
        """`on_student` and `on_teacher` with all ways to stop as one class."""
        classes = self.experiment.classes(LossConfig(merge_terminators=True))
        return (
            self.values(self.student, self.student_answers, classes),
            self.values(self.student, self.teacher_answers, classes),
        )

    @cached_property
    def trained(self) -> list[Trained]:
        """The trained students that the configuration asks for."""
        before = self.student_answers, self.teacher_answers, self.on_student, self.on_teacher
        return [
            self._trained(arm, seed, *before[:2])
            for arm in arm_names(self.config)
            for seed in self.config.seeds
        ]

    def write(
        self,
        rollout: PrefixRollout,
        what: str,
        begun: list[list[int]] | None = None,
        limit: int | None = None,
        key: tuple[int | str, ...] = (),
    ) -> RolloutBatch:
        """Sample an answer to each row's prompt, continuing the tokens `begun` [B].

        `limit` counts new tokens. Models that write with the same `key` draw the same noise. The
        teacher reads its own prompts.
        """
        of_teacher = rollout is self.teacher.rollout and self.teacher_prompts is not None
        prompts = self.teacher_prompts if of_teacher else self.prompts
        assert prompts is not None
        if begun is not None:
            prompts = [prompt + ids for prompt, ids in zip(prompts, begun, strict=True)]
        sampling, limit = self.config.rollout, limit or self.limit
        with self.progress.piece(f"{what} ({len(prompts)})", limit) as step:
            batch = rollout.generate(
                prompts,
                1,  # a row each: some caches cannot be repeated
                limit,
                sampling.temperature or 1.0,
                (SEED, "diagnose", *key),
                **sampling.filters,
                max_tokens_in_flight=sampling.max_tokens_in_flight,
                on_progress=step,
            )
        return RolloutBatch(self.prompts, batch.tokens, batch.lengths, batch.finished_by_eos)

    def values(
        self, student: PrefixRollout, texts: RolloutBatch, classes: Vocabulary | None = None
    ) -> TokenValues:
        """Values of a student and the teacher on texts."""
        return token_values(
            student.model,
            self.teacher,
            texts,
            self.teacher_prompts,
            classes or self.vocabulary,
            self.config.loss.impl,
        )

    def text(self, ids: list[int]) -> str:
        """Decoded, without special tokens."""
        found: str = self.experiment.tokenized.tokenizer.decode(ids, skip_special_tokens=True)
        return found

    def accuracy(self, answers: list[list[int]]) -> np.ndarray:
        """[B] the task's score of an answer to each row's problem."""
        scores = [
            (self.task.score(problem, self.text(ids)) or {}).get("accuracy", float("nan"))
            for problem, ids in zip(self.rows, answers, strict=True)
        ]
        return np.array(scores, dtype=float)

    def _trained(
        self, arm: str, seed: int, student_answers: RolloutBatch, teacher_answers: RolloutBatch
    ) -> Trained:
        config = self.arms.configs[arm]
        directory = self.run_dir / "arms" / arm / f"seed{seed}"
        if self.trains and not self.arms.finished(self.run_dir, arm, seed):
            with self.progress.piece(f"training {arm}, seed {seed}", config.steps) as step:
                self.arms.run(self.run_dir, arm, seed, lambda row, _: step(row["step"], 0))
            self.arms.restore()
        rollout = PrefixRollout(
            _load(config, find_model(directory, best=False)),
            self.experiment.tokenized.tokenizer,
            self.vocabulary.classes,
            stop_ids=self.experiment.stops[0],
        )
        answers = self.write(rollout, f"answers of {arm}, seed {seed}")
        own, student, teacher = (
            self.values(rollout, texts) for texts in (answers, student_answers, teacher_answers)
        )
        return Trained(
            arm,
            seed,
            trained_window(config, self.limit),
            config.steps,
            answers,
            own,
            student,
            teacher,
        )


def _load(config: Config, directory: Path) -> Any:
    """A trained student: a whole model, or an adapter on the student's own weights."""
    spec = config.student
    if (directory / ADAPTER_FILE).is_file():
        model = load_model(spec.model_copy(update={"lora": None}), config.runtime)
        return load_adapter(model, str(directory))
    return load_model(ModelConfig(model=str(directory)), config.runtime)


def check_keys(config: Config) -> None:
    """Raise ConfigError for what cannot be diagnosed: a teacher elsewhere, arms that are none."""
    if config.teacher.url:
        raise ConfigError(
            f"teacher.url: got {config.teacher.url!r}, must be null for diagnose, which reads the "
            "teacher's hidden states"
        )
    known = [arm["name"] for arm in config.arms] or ["train"]
    for name in config.diagnose.arms or []:
        if name not in known:
            allowed = ", ".join(map(repr, known))
            raise ConfigError(f"diagnose.arms: got {name!r}, allowed are {allowed}")


def training_config(config: Config) -> Config:
    """The runs whose students are diagnosed, as a comparison without evaluations."""
    arms: list[dict[str, Any]] = [arm for arm in config.arms if arm["name"] in arm_names(config)]
    if not config.arms:
        arms = [{"name": "train", "max_new_tokens": config.rollout.max_new_tokens}]
    changes = {
        "arms": arms,
        "report.baseline": None,
        "eval.every": 0,
        "checkpoint.keep_models": True,
        "checkpoint.resume": "auto",
    }
    return with_overrides(config, changes)


def trained_window(config: Config, limit: int) -> int:
    """How many of the first tokens of an answer an arm trains on; all that may be, `limit`, where
    it trains on another part."""
    loss, length = config.loss, min(config.rollout.max_new_tokens, limit)
    return min(length, loss.window_tokens or length) if loss.window == "first" else limit


def arm_names(config: Config) -> list[str]:
    """The arms whose students are compared with the untrained one."""
    if config.diagnose.arms is not None:
        return config.diagnose.arms
    names: list[str] = [arm["name"] for arm in config.arms] or ["train"]
    return names if len(names) < 3 else [names[0], names[-1]]


def problem_count(config: Config, task: Any) -> int:
    there = task.count("heldout")
    return config.diagnose.problems if there is None else min(config.diagnose.problems, there)


def windows(config: Config) -> list[int]:
    """Numbers of tokens that shares and selections are about: those that arms train on where it is
    not the whole answer, or without any that of rollouts, but at most a quarter of an answer."""
    limit = config.eval.max_new_tokens
    arms = [arm_config(config, arm) for arm in config.arms]
    sizes = {min(arm.rollout.max_new_tokens, arm.loss.window_tokens or limit) for arm in arms}
    sizes = {size for size in sizes if size < limit}
    return sorted(sizes) or [min(config.rollout.max_new_tokens, max(1, limit // 4))]

"""The answers that a step trains on, by `rollout.source`.

student           sampled by the student at every step, as long as `rollout.length` says
initial_student   sampled by the student before its first step, once a prompt, then frozen
teacher           sampled by the teacher, once a prompt

The latter two are sampled before training, in the parts in which the steps of the first epoch use
them, and kept in a file beside the checkpoints, since a resumed run has no initial student. What
was sampled before an error is kept there too. Time and tokens of a part are those of the step that
uses it first: costs by time and by tokens are as if each had been sampled when it was needed. With
`rollout.url`, or a teacher that has a server, that server samples them.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esr_train.checkpoint import CheckpointError
from esr_train.config import Config, ConfigError
from esr_train.data import PromptStream
from esr_train.experiment import Experiment
from esr_train.rollout import RolloutBatch

_WRITE_EVERY = 60.0  # seconds of sampling before training
_FIELDS = ("tokens", "lengths", "finished_by_eos", "logprob", "log_kept", "row_keys", "finished_by")


@dataclass(frozen=True)
class Answers:
    """The answers of a step, and what sampling them took if that was earlier."""

    batch: RolloutBatch
    tokens: int  # sampled for this step; 0 for answers that an earlier step has used
    seconds: float = 0.0  # of sampling them before training
    engine: dict[str, str] = field(default_factory=dict)  # {"engine": the server that sampled them}


class Source:
    """Where a run's answers come from.

    Raises:
        ConfigError: the teacher's answers are asked for, and its tokens are not the student's.
    """

    def __init__(
        self, config: Config, experiment: Experiment, prompts: PromptStream, path: Path, seed: int
    ) -> None:
        self.config, self.prompts, self.path, self.seed = config, prompts, path, seed
        self.frozen = config.rollout.source != "student"
        self._teachers = config.rollout.source == "teacher"
        if self._teachers and not experiment.alignment.vocabulary.same_tokens:
            raise ConfigError(
                "rollout.source: got 'teacher', must be the student where the teacher has another "
                "tokenizer"
            )
        self._world = experiment.world
        self._writer: Any = experiment.teacher.rollout if self._teachers else experiment.student
        self._kept: dict[str, Tensor] = {}
        self._engine: dict[str, str] = {}  # of what is kept, if that is a server

    def prepare(self, step: int) -> None:
        """Sample what is frozen, or read it for a run that goes on after `step`.

        Raises:
            CheckpointError: a run that goes on has no answers, or those of other settings.
        """
        if not self.frozen:
            return
        parts = -(-len(self._first_epoch()) // self.prompts.per_step)
        self._kept, self._engine = self._world.from_main(self._stored)
        if self._sampled_parts() == parts:
            return
        if step:
            raise CheckpointError(
                f"{self.path} is missing or of other settings: the run goes on at step {step + 1}, "
                f"where rollout.source={self.config.rollout.source} cannot be sampled again"
            )
        if self.config.rollout.url:
            from esr_train.remote.rollouts import remote_rollout  # nothing of it without a server

            self._writer = remote_rollout(self.config, self._writer)
        server = getattr(self._writer, "server", None)
        self._engine = {"engine": str(server)} if server else {}
        written = time.monotonic()
        try:
            while self._sampled_parts() < parts:
                self._sample_part(self._sampled_parts())
                if time.monotonic() - written > _WRITE_EVERY:
                    self._write()
                    written = time.monotonic()
        finally:
            self._write()

    def sampled_by(self, step: int) -> bool:
        """Whether the student's weights before a step are those that have sampled its answers, by
        an engine whose log-probs are worth a comparison."""
        of_server = self.config.rollout.source == "initial_student" and "engine" in self._engine
        return not self.frozen or (of_server and step == 1 and "logprob" in self._kept)

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the file of an earlier run has, if that had these settings, and its engine."""
        if self.path.is_file():
            with safe_open(self.path, "pt") as file:
                known = file.metadata() or {}
                if known.pop("of", None) == self._of():
                    return {name: file.get_tensor(name) for name in file.keys()}, known
        return {}, {}

    def answers(self, step: int) -> Answers:
        """The answers to the prompts of a step, samples of one prompt next to each other."""
        if not self.frozen:
            batch = self._sample(step, self.prompts.problem_numbers(step))
            return Answers(batch, int(batch.lengths.sum()))
        place = {problem: place for place, problem in enumerate(self._first_epoch())}
        samples = self.config.rollout.samples
        places = torch.tensor([place[number] for number in self.prompts.problem_numbers(step)])
        rows = (places[:, None] * samples + torch.arange(samples)).flatten()
        prompts = [ids for ids in self.prompts.prompts_for(step) for _ in range(samples)]
        kept = {name: self._kept[name][rows] for name in _FIELDS if name in self._kept}
        batch = RolloutBatch(prompts, **kept)
        if step > len(self._kept["seconds"]):
            return Answers(batch, 0, engine=self._engine)
        size = self.prompts.per_step * samples
        new = self._kept["lengths"][(step - 1) * size : step * size]
        seconds = float(self._kept["seconds"][step - 1])
        return Answers(batch, int(new.sum()), seconds, self._engine)

    def _first_epoch(self) -> list[int]:
        """The problems that the run sees, in the order in which it first does."""
        per_step = self.prompts.per_step
        used = min(len(self.prompts.problems), self.config.steps * per_step)
        steps = range(1, -(-used // per_step) + 1)
        return [number for step in steps for number in self.prompts.problem_numbers(step)][:used]

    def _sampled_parts(self) -> int:
        return len(self._kept.get("seconds", ()))

    def _sample_part(self, part: int) -> None:
        """Add the answers that are new in the step after `part` steps."""
        size = self.prompts.per_step
        begin = time.perf_counter()
        batch = self._sample(part + 1, self._first_epoch()[part * size : (part + 1) * size])
        new = {name: getattr(batch, name) for name in _FIELDS}
        new["seconds"] = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        self._kept = {
            name: torch.cat([*([self._kept[name]] if name in self._kept else []), value])
            for name, value in new.items()
            if value is not None  # a server's log-probs may be of another distribution
        }

    def _write(self) -> None:
        """Write what has been sampled, aside and renamed."""
        if not (self._world.main and self._kept):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(self._kept, temporary, metadata={"of": self._of(), **self._engine})
        os.replace(temporary, self.path)

    def _sample(self, step: int, numbers: list[int]) -> RolloutBatch:
        rollout, problems = self.config.rollout, [self.prompts.problems[n] for n in numbers]
        prompts = asked = [self.prompts.tokenized.ids(problem) for problem in problems]
        if self._teachers:
            own = [self.prompts.tokenized.teacher_ids(problem) for problem in problems]
            asked = [ids or known for ids, known in zip(own, prompts, strict=True)]
        batch = self._world.generate(
            self._writer,
            asked,
            rollout.samples,
            rollout.length(step, self.config.steps),
            rollout.temperature,
            (self.seed, "rollout", step),
            **rollout.filters,
            max_tokens_in_flight=rollout.max_tokens_in_flight,
        )
        return replace(batch, prompts=[ids for ids in prompts for _ in range(rollout.samples)])

    def _of(self) -> str:
        """What the answers depend on."""
        rollout = self.config.rollout
        any_server = {"url": rollout.url and "any", "served_name": None}
        rollout = rollout.model_copy(update=any_server)
        what = rollout, self.prompts.digest, self._first_epoch(), self.seed
        return hashlib.sha256(repr(what).encode()).hexdigest()

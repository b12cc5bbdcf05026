"""The training loop: sample, score, loss, step, log, save.

    trainer = Trainer(config, load_experiment(config), directory, seed)
    trainer.run()

`train` and every arm of `compare` run this. A step is a function of the weights, the configuration,
the seed and the step's number: runs repeat, and resume, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esr_train import checkpoint
from esr_train.alarms import Alarms
from esr_train.config import Config, TrackingConfig
from esr_train.data import PromptStream
from esr_train.evaluate import Evaluation
from esr_train.experiment import Experiment, check_context
from esr_train.logprob_gap import logprob_gap
from esr_train.metrics import Spans, read_rows, step_row
from esr_train.models import compiled
from esr_train.objective import Objective
from esr_train.optim import Optimizer, learning_rate
from esr_train.rollout import RolloutBatch
from esr_train.sources import Source
from esr_train.tracking import Trackers

_GAP_EVERY = 10  # steps between comparisons of the engine's log-probs with the trainer's


class TrainingError(RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class Trainer:
    """Trains the student in place to match the teacher; writes logs and checkpoints to `directory`.

    Args:
        config: of this run; an arm of a comparison shares `experiment` with the others.
        save: write checkpoints, and resume from the newest one if there is any.
        initial: evaluation of the initial weights, if it has been computed already.
        on_step: called after each step with its row of metrics.jsonl and the latest evaluation.
        on_first_rollout: called with the first batch that is sampled and the prompt that the
            teacher sees before its first response.
    """

    def __init__(
        self,
        config: Config,
        experiment: Experiment,
        directory: Path,
        seed: int,
        save: bool = True,
        initial: Evaluation | None = None,
        on_step: Callable[[dict[str, Any], dict[str, float]], None] | None = None,
        on_first_rollout: Callable[[RolloutBatch, list[int]], None] | None = None,
    ) -> None:
        self.config, self.seed, self.directory = config, seed, directory
        self.save = save
        self.save_end = True  # write a checkpoint after the last step, too
        self.initial, self.on_step, self.on_first_rollout = initial, on_step, on_first_rollout
        self.rollout, self.world = experiment.student, experiment.world
        self.tokenizer, self.evaluator = experiment.tokenized.tokenizer, experiment.evaluator
        self.student: Any = self.rollout.model
        pool = config.rollout.pool
        self.prompts = PromptStream(experiment.tokenized, config.rollout.prompts, seed, pool)
        answers = directory / "checkpoints" / "answers.safetensors"
        self.source = Source(config, experiment, self.prompts, answers, seed)
        self.optimizer = Optimizer(self.student, config.optim.betas)
        self.forward = compiled(self.student, config.runtime)
        self.objective = Objective(config, experiment, self.optimizer, self.forward)
        # Progress, as it is saved in checkpoints; `best` is the best evaluation, (value, step).
        self.state: dict[str, Any] = {"step": 0, "train_seconds": 0.0, "tokens": 0, "best": None}
        self.state["data"] = self.prompts.digest
        self.saved_step = -1
        self.latest_metrics: dict[str, float] = {}
        check_context(config, experiment, seed)

    def run(self) -> None:
        """Train to config.steps, from the newest whole checkpoint if there is one; call it once.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM; a checkpoint of the last whole step is saved.
            TrainingError: loss or gradient is not finite; a checkpoint is saved likewise.
            CheckpointError: a checkpoint could not be written or read.
        """
        self._resume()
        step = self.state["step"]
        self.source.prepare(step)
        self.metrics = self.world.log(self.directory / "metrics.jsonl", step)
        self.evals = self.world.log(self.directory / "evals.jsonl", step)
        self.samples = self.world.log(self.directory / "samples.jsonl", step)
        logs = (read_rows(self.directory / f"{name}.jsonl") for name in ("metrics", "evals"))
        self.alarms = Alarms(*logs)
        tracking = self.config.tracking if self.world.main else TrackingConfig()
        self.trackers = Trackers(tracking, self.directory)
        try:
            with checkpoint.Interrupt() as interrupt:
                self._loop(interrupt)
        finally:
            self.optimizer.close()
            for log in (self.metrics, self.evals, self.samples, self.trackers):
                log.close()

    def _loop(self, interrupt: checkpoint.Interrupt) -> None:
        every = self.config.checkpoint.every
        try:
            self._evaluate()
            while self.state["step"] < self.config.steps:
                row = self.step(self.state["step"] + 1, interrupt)
                alarms = self._evaluate()
                if self.on_step:
                    self.on_step({**row, "alarms": row["alarms"] + alarms}, self.latest_metrics)
                if every and row["step"] % every == 0:
                    self._save()
            if self.save_end:
                self._save()
        except checkpoint.CheckpointError:
            raise
        except BaseException:
            # The weights are those of state["step"]. If the last update made them infinite or NaN,
            # the older checkpoint is kept.
            if self.world.saves_alone and all(
                bool(p.isfinite().all()) for p in self.optimizer.parameters.values()
            ):
                with interrupt.hold():  # a launcher that stops all may send a signal, too
                    self._save()
            raise

    def step(self, step: int, interrupt: checkpoint.Interrupt) -> dict[str, Any]:
        """One optimizer step; returns the row that it writes to metrics.jsonl."""
        config, spans = self.config, Spans()
        with spans("rollout"):
            answers = self.source.answers(step)
        spans.charge("rollout", answers.seconds)
        batch = answers.batch
        if self.on_first_rollout:
            own = self.prompts.teacher_prompts_for(step)
            self.on_first_rollout(batch, batch.prompts[0] if own is None else own[0])
            self.on_first_rollout = None
        gap = {}
        if step % _GAP_EVERY == 1 and self.source.sampled_by(step):
            temperature = config.rollout.temperature
            with self.world.whole(self.student):
                gap["logprob_gap"] = logprob_gap(self.rollout, batch, temperature, self.forward)
        sums = self._gradient(step, batch, spans)
        with spans("student"):
            norm = float(self.optimizer.clip())
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"step {step}: loss {sums['loss']}, gradient norm {norm}; the weights are still "
                f"those of step {step - 1}. Try a lower optim.lr or a longer optim.warmup_steps"
            )
        rate = learning_rate(config.optim, step, config.steps)
        with interrupt.hold():
            with spans("student"):
                self.optimizer.step(rate)
            update = {"lr": rate, "grad_norm": norm, **gap, **answers.engine}
            row = step_row(step, sums, batch, answers.tokens, update, spans)
            row["alarms"] = self.alarms.of_step(row)
            self.state["step"] = step
            self.state["train_seconds"] += sum(spans.seconds.values())
            self.state["tokens"] += row["tokens"]
            self.metrics.write(row)
        self.trackers.log(row, step)
        return row

    def _gradient(self, step: int, batch: RolloutBatch, spans: Spans) -> dict[str, float]:
        """Accumulate the gradient of the batch; returns its loss and sums over its tokens."""
        own = self.prompts.teacher_prompts_for(step)  # one for each prompt, or None
        if own is not None:
            own = [prompt for prompt in own for _ in range(self.config.rollout.samples)]
        with self.world.scoring():
            return self.objective.backward(batch, own, self.seed, step, spans)

    def _evaluate(self) -> list[str]:
        """Evaluate if it is due at this step and has not been done; `train_seconds` excludes it.

        Returns the alarms of the evaluation.
        """
        every, step = self.config.eval.every, self.state["step"]
        due = every and (step % every == 0 or step == self.config.steps)
        if self.evaluator is None or not due or step in self.evals.steps:
            return []
        known = self.initial if step == 0 else None
        evaluation = known or self.evaluator.evaluate()
        if step == 0:
            self.initial = evaluation
        self.latest_metrics, samples = evaluation
        self._keep_best()
        for sample in samples:
            self.samples.write({"step": step, **sample})
        self.evals.write(
            {
                "step": step,
                "train_seconds": self.state["train_seconds"],
                "tokens": self.state["tokens"],
                "metrics": self.latest_metrics,
                "alarms": (alarms := self.alarms.of_evaluation(self.latest_metrics)),
            }
        )
        self.trackers.log({"eval": self.latest_metrics}, step)
        return alarms

    def _resume(self) -> None:
        directory = self.directory / "checkpoints"
        if not self.save:
            return
        if self.config.checkpoint.resume == "never" and checkpoint.latest(directory):
            raise checkpoint.CheckpointError(
                f"{directory} holds checkpoints and checkpoint.resume is never; "
                "choose another --out, or remove them"
            )
        state = self.world.resume(directory, self.student, self.optimizer)
        if state is None:
            return
        if state.get("data", self.state["data"]) != self.state["data"]:
            raise checkpoint.CheckpointError(
                f"{directory} was trained on other problems than data.task "
                f"{self.config.data.task!r} has now; choose another --out, or put the data back"
            )
        self.state, self.saved_step = state, state["step"]

    def _save(self) -> None:
        if self.save and self.saved_step != self.state["step"]:
            self.world.save(
                self.directory / "checkpoints",
                self.state,
                self.student,
                self.tokenizer,
                self.optimizer,
                self.config.checkpoint.keep,
            )
            self.saved_step = self.state["step"]

    def _keep_best(self) -> None:
        """Save the model if its evaluation, just made, is the best so far of a trained one."""
        report, step = self.config.report, self.state["step"]
        value = self.latest_metrics.get(report.metric)
        wanted = self.save and self.config.checkpoint.keep_best and step > 0
        if not wanted or value is None or math.isnan(value):
            return
        sign = 1 if report.higher_is_better else -1
        best = self.state["best"]
        if best is None or sign * value > sign * best[0]:
            self.state["best"] = [value, step]
            directory = self.directory / "checkpoints"
            self.world.save_best(directory, step, self.student, self.tokenizer)

"""Progress of a run: an estimate before it starts, then a bar over its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from esr_train.arms import Arms
from esr_train.config import Config
from esr_train.rollout import PrefixRollout

# Cost of a step besides its rollout, in forward passes over the batch: one of the teacher, one of
# the student, and a backward pass, which costs two.
_PASSES = 4
_TIMED_TOKENS = 8


def progress_bar(total: int, shown: bool = True) -> Any:
    """A bar over training steps, on stderr."""
    return tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.05, disable=not shown)


def progress_text(row: dict[str, Any], metrics: dict[str, float], metric: str) -> str:
    """One line on a step: its divergence, the newest evaluation, seconds by phase, memory."""
    seconds = row["seconds"]
    parts = [f"{row.get('divergence', row.get('cross_entropy', 0.0)):.3f} nats/token"]
    if metric in metrics:
        parts.append(f"{metric} {metrics[metric]:.3f}")
    parts.append("/".join(f"{seconds.get(p, 0.0):.2f}" for p in ("rollout", "teacher", "student")))
    peaks = [peak for peak in row["peak_bytes"].values() if peak is not None]
    if peaks:
        parts.append(f"{max(peaks) / 2**30:.2f} GiB")
    return ", ".join(parts)


def estimate(arms: Arms, runs: Iterable[tuple[str, int]], jobs: int) -> float:
    """Seconds that the runs of a comparison take if every response has its maximal length.

    A few tokens are timed on this process's threads. Contention for memory between runs
    and the start of worker processes are not included.
    """
    clock = _Clock(arms)
    ends = [0.0] * jobs
    for name, _ in runs:  # each goes to the job that is free first
        ends[ends.index(min(ends))] += clock.seconds(arms.configs[name])
    return max(ends)


def duration(seconds: float) -> str:
    """45 s, 3 min, 1 h 20 min."""
    if seconds < 55:
        return f"{max(5, math.ceil(seconds / 5) * 5)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Clock:
    """Seconds of decoding steps and of forward passes, measured once for each number of rows."""

    def __init__(self, arms: Arms) -> None:
        self.student: PrefixRollout = arms.experiment.student
        self.evaluator = arms.experiment.evaluator
        self.tokenized = arms.experiment.tokenized
        [problem] = self.tokenized.task.problems("train", 1, 0)
        self.prompt = self.tokenized.ids(problem)
        self.student.generate([self.prompt], 1, 2, 1.0, ("estimate",))  # warms up
        self._decode: dict[tuple[int, int], float] = {}
        self._pass: float | None = None

    def seconds(self, config: Config) -> float:
        """Seconds of a whole run."""
        rollout, steps = config.rollout, config.steps
        length, rows = rollout.max_new_tokens, rollout.prompts * rollout.samples
        tokens = rows * (len(self.prompt) + length)
        step = length * self.decode(rollout.prompts, rollout.samples)
        step += _PASSES * tokens * self.token()
        total = steps * step
        if self.evaluator is not None and config.eval.every:
            evaluations = 1 + math.ceil(steps / config.eval.every)
            prompts = len(self.evaluator.prompts)
            tokens = prompts * config.eval.teacher_text
            answers = config.eval.max_new_tokens * self.decode(2 * prompts, 1)
            total += evaluations * (answers + tokens * self.token())
        return total

    def decode(self, prompts: int, samples: int) -> float:
        """Seconds of one decoding step for all responses."""
        key = prompts, samples
        if key not in self._decode:
            ends = []
            for tokens in (1, 1 + _TIMED_TOKENS):
                start = time.perf_counter()
                self.student.generate([self.prompt] * prompts, samples, tokens, 1.0, ("estimate",))
                ends.append(time.perf_counter() - start)
            self._decode[key] = max(0.0, ends[1] - ends[0]) / _TIMED_TOKENS
        return self._decode[key]

    @torch.no_grad()
    def token(self) -> float:
        """Seconds of a forward pass per token, from one over 8 sequences of about 64 tokens."""
        if self._pass is None:
            model: Any = self.student.model
            ids = torch.tensor(self.prompt * math.ceil(64 / len(self.prompt)))[:64].expand(8, -1)
            start = time.perf_counter()
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._pass = (time.perf_counter() - start) / ids.numel()
        return self._pass

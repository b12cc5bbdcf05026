"""A trainer in a process of its own that makes one step at a time (`bench_train_step` asks).

    python -m bench.train_step NAME DIRECTORY

DIRECTORY has a student, a teacher and prompts.txt. For every number N on its standard input the
process makes a step with N new tokens a response and prints its seconds by phase, the peak of its
resident memory and its loss, as a line of JSON. Seconds are those that its processor worked on one
thread, so that other work on the machine is not in them; "wall" has the time on the clock.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback

from esr_train.config import Config
from esr_train.metrics import PeakMemory

SAMPLES, LEARNING_RATE = 2, 1e-5
PHASES = ("rollout", "teacher", "student", "optimizer")


def _commands() -> Iterator[int]:
    print("ready", flush=True)
    for line in sys.stdin:
        yield int(line)


class Clock:
    """Seconds of the phases of a step; what no phase has is the student's: forward and loss."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.memory = PeakMemory()
        self.wall, self.start = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def report(self, loss: float, peak_bytes: int | None = None) -> None:
        total, wall = time.process_time() - self.start, time.perf_counter() - self.wall
        self.seconds["student"] = total - sum(self.seconds.values())
        peak = self.memory.bytes() if peak_bytes is None else peak_bytes
        row = {**self.seconds, "step": total, "wall": wall, "loss": loss, "peak": peak}
        print(json.dumps(row), flush=True)


def esr_train_steps(directory: Path) -> None:
    """Ours: the loop of esr_train."""
    from esr_train.experiment import load_experiment
    from esr_train.train import Trainer

    config = Config.model_validate(
        {
            "student": {"model": str(directory / "student")},
            "teacher": {"model": str(directory / "teacher")},
            "data": {"task": f"prompts:{directory / 'prompts.txt'}"},
            "rollout": {"prompts": len(_prompts(directory)), "samples": SAMPLES},
            "optim": {"lr": LEARNING_RATE},
            "steps": 1000,
        }
    )
    experiment = load_experiment(config)
    asked, clock, length = _commands(), Clock(), 0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with clock(name):
                return function(*args, **kwargs)

        return run

    generate = timed("rollout", experiment.student.generate)
    experiment.student.generate = lambda prompts, samples, _, *args, **kwargs: generate(
        prompts, samples, length, *args, **kwargs
    )
    experiment.teacher.hidden_rows = timed("teacher", experiment.teacher.hidden_rows)
    trainer = Trainer(config, experiment, directory / "run", 0, save=False)
    for name in ("clip", "step"):
        setattr(trainer.optimizer, name, timed("optimizer", getattr(trainer.optimizer, name)))

    def begin() -> None:
        nonlocal clock, length
        length = next(asked, 0)
        if not length:
            raise SystemExit
        clock = Clock()

    def on_step(row: dict[str, Any], _: dict[str, float]) -> None:
        # The spans of the loop reset the mark of the memory at every phase.
        clock.report(row["loss"], max(row["peak_bytes"].values()))
        begin()

    trainer.on_step = on_step
    begin()
    trainer.run()


def trl_steps(directory: Path, name: str) -> None:
    """TRL's `DistillationTrainer`: as it is, patched, or our subclass with our rollouts."""
    import trl
    from datasets import Dataset

    from esr_kernels.integrations.trl import DistillationTrainer, patched
    from esr_train.rollout import PrefixRollout

    base: Any = DistillationTrainer if name == "subclass" else trl.DistillationTrainer
    asked, clock = _commands(), Clock()

    class Timed(base):
        def _generate(self, prompts: Any) -> Any:
            with clock("rollout"):
                return super()._generate(prompts)

        def _get_last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            of_teacher = model is self.accelerator.unwrap_model(self.teacher_model)
            with clock("teacher") if of_teacher else contextlib.nullcontext():
                return super()._get_last_hidden_state(model, *args, **kwargs)

        def _clip_grad_norm(self, model: Any) -> Any:
            with clock("optimizer"):
                return super()._clip_grad_norm(model)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.last_loss = loss.detach()
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = kwargs["optimizer"].step

            def timed(*args: Any, **kwargs: Any) -> Any:
                with clock("optimizer"):
                    return step(*args, **kwargs)

            kwargs["optimizer"].step = timed

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal clock
            clock = Clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.report(float(trainer.last_loss))
            control.should_training_stop = not begin()

    def begin() -> bool:
        length = next(asked, None)
        if length is not None:
            trainer.max_completion_length = length
            trainer.generation_config.max_new_tokens = length
            trainer.generation_kwargs["max_new_tokens"] = length
        return length is not None

    tokenizer = AutoTokenizer.from_pretrained(directory / "student", padding_side="left")
    # As the template of the tokenizer has them, each prompt SAMPLES times: TRL samples one answer.
    prompts = [line + "=" for line in _prompts(directory) for _ in range(SAMPLES)]
    args = trl.DistillationConfig(
        str(directory / "run"),
        per_device_train_batch_size=len(prompts),
        learning_rate=LEARNING_RATE,
        max_steps=1000,
        bf16=False,
        activation_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Timed(
        LlamaForCausalLM.from_pretrained(directory / "student"),
        LlamaForCausalLM.from_pretrained(directory / "teacher"),
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Steps()],
        **({"rollout": PrefixRollout} if name == "subclass" else {}),
    )
    with patched() if name == "patched" else contextlib.nullcontext():
        if begin():
            trainer.train()


def _prompts(directory: Path) -> list[str]:
    return (directory / "prompts.txt").read_text().splitlines()


def main(name: str, directory: Path) -> None:
    torch.set_num_threads(1)
    if name == "esr_train":
        esr_train_steps(directory)
    else:
        trl_steps(directory, name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

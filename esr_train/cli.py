"""The command line.

    esr-train train    CONFIG.yaml [key=value ...] [--out DIR] [--dry-run]
    esr-train compare  CONFIG.yaml [key=value ...] [--out DIR] [--steps N] [--jobs N] [--tune]
                       [--dry-run]
    esr-train diagnose CONFIG.yaml [key=value ...] [--out DIR] [--dry-run]
    esr-train evaluate CONFIG.yaml [key=value ...] [--model DIR] [--dry-run]
    esr-train export   RUN_DIR --out DIR [--merge] [--best] [--arm NAME] [--seed N]
    esr-train sample   CONFIG.yaml [key=value ...] --prompt TEXT [--samples G] [--teacher]
    esr-train report   RUN_DIR
    esr-train fetch    smollm2

`train`, `compare` and `evaluate` also run under torchrun and `accelerate launch`, on several
processes.

Exit codes: 0 done, 2 an error that is reported in one line, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from esr_kernels import SamplingParams
from esr_train.adapters import AdapterError
from esr_train.alarms import Announcer
from esr_train.checkpoint import CheckpointError, Interrupt
from esr_train.compare import Interrupted, cap_steps, compare
from esr_train.config import Config, ConfigError, load_config, to_yaml, with_overrides
from esr_train.dry_run import describe
from esr_train.estimate import HARDWARE
from esr_train.evaluate import Evaluator
from esr_train.experiment import Experiment, load_experiment
from esr_train.export import export
from esr_train.fetch import FetchError, fetch_smollm2
from esr_train.launch import launched, speaks, start
from esr_train.models import ModelError
from esr_train.progress import progress_bar, progress_text
from esr_train.report import summary_table, write_report
from esr_train.rollout import ContextError, RolloutBatch
from esr_train.run_dir import check_continues, write_run_files
from esr_train.sample import sample_text
from esr_train.train import Trainer, TrainingError
from esr_train.tune import tune
from esr_train.worker import ArmError
from esr_train.world import World, WorldError

ERRORS = (
    AdapterError,
    ArmError,
    CheckpointError,
    ConfigError,
    ContextError,
    FetchError,
    ModelError,
    TrainingError,
    WorldError,
    OSError,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parse(arguments)
    transformers_logging.disable_progress_bar()  # only our own bar is shown
    who = f"esr-train: rank {os.environ['RANK']}" if launched() > 1 else "esr-train"
    try:
        if launched() > 1 and options.run not in (_train, _evaluate, _compare):
            name = options.run.__name__[1:]
            raise ConfigError(
                f"{name} is for one process; train, compare and evaluate take several"
            )
        with Interrupt():
            options.run(options)
    except ERRORS as error:
        if speaks(error):
            print(f"{who}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # Out of memory is an exception of its own on a GPU; on a CPU only the message says so.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        first = str(error).split(". ")[0]
        advice = "Set optim.max_tokens, or lower rollout.prompts"
        if options.run is _sample:
            advice = "Lower --samples or --max-new-tokens"
        print(f"{who}: error: {first}. {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{who}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line that may have key=value at any position."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="esr-train", description="On-policy distillation with early stopping rollouts."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, summary in (
        (_train, "train a student to match a teacher; resumes where it stopped"),
        (_compare, "train with several rollout lengths and write a report"),
        (_diagnose, "measure where and why student and teacher differ, and write a report"),
        (_evaluate, "measure a student on held-out problems"),
    ):
        command = commands.add_parser(run.__name__[1:], help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("config", type=Path, help="YAML file, see configs/")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="optim.lr=1e-4")
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="read configs and tokenizers only; print the resolved config, memory and time",
        )
        command.add_argument(
            "--on", choices=HARDWARE, help="what --dry-run predicts for; default: this machine"
        )
        if run is _evaluate:
            command.add_argument("--model", help="evaluate this model instead of the student")
        else:
            command.add_argument("--out", type=Path, help="run directory; default runs/CONFIG...")
        if run is _compare:
            command.add_argument("--steps", type=_positive, help="limit of the steps of each arm")
            command.add_argument(
                "--tune",
                action="store_true",
                help="first choose each arm's learning rate from tune.rates, on tune.seeds",
            )
            command.add_argument(
                "--jobs",
                type=_positive,
                help="runs at a time; above 1, each in a process with one thread; default: as many "
                "as PyTorch has threads if the models are small and on the CPU, else 1",
            )
    _add_sample(commands)
    summary = "write the model of a run to a directory that other tools load"
    command = commands.add_parser("export", help=summary, description=summary)
    command.set_defaults(run=_export)
    command.add_argument("run_dir", type=Path)
    command.add_argument("--out", type=Path, required=True, help="a directory with nothing in it")
    command.add_argument("--merge", action="store_true", help="add an adapter into its base")
    command.add_argument("--best", action="store_true", help="the best model, not the final one")
    command.add_argument("--arm", default="train", help="of a comparison")
    command.add_argument("--seed", type=int, help="default: the first of the run")
    summary = "write report.html and the rest again from the files of a run"
    command = commands.add_parser("report", help=summary, description=summary)
    command.set_defaults(run=_report)
    command.add_argument("run_dir", type=Path)
    summary = "download, verify and cache the weights of a model"
    command = commands.add_parser("fetch", help=summary, description=summary)
    command.set_defaults(run=lambda _: print(fetch_smollm2()))
    command.add_argument("model", choices=["smollm2"])
    return parser


def _add_sample(commands: Any) -> None:
    summary = "sample answers to prompts, with the log-prob of each token"
    command = commands.add_parser("sample", help=summary, description=summary)
    command.set_defaults(run=_sample)
    command.add_argument("config", type=Path, help="YAML file, see configs/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="student.model=DIR")
    command.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    command.add_argument("--samples", type=_positive, help="per prompt; default rollout.samples")
    command.add_argument(
        "--max-new-tokens", type=_positive, help="of an answer; default rollout.max_new_tokens"
    )
    for name, meaning in (
        ("temperature", "0 is greedy; default rollout.temperature"),
        ("top_k", "sample from the k most probable tokens; default rollout.top_k"),
        ("top_p", "from the fewest tokens with this share of the probability; rollout.top_p"),
        ("min_p", "from tokens of at least this share of the largest probability; rollout.min_p"),
    ):
        option = f"--{name.replace('_', '-')}"
        command.add_argument(option, type=_sampling_parameter(name), help=meaning)
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    command.add_argument("--teacher", action="store_true", help="sample from the teacher")


def _train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    seed = config.seeds[0]
    # `train` is a comparison with one arm, so that one report serves both commands.
    arm = {"name": "train", "max_new_tokens": config.rollout.max_new_tokens}
    changes = {"seeds": [seed], "arms": [arm], "report.baseline": None}
    config = with_overrides(config, changes)
    run_dir = options.out or Path("runs") / options.config.stem
    if options.dry_run:
        check_continues(run_dir, config)
        return _print_plan(config, options.on)
    with start(config) as world:
        world.from_main(lambda: check_continues(run_dir, config))
        _train_on(world, config, run_dir, seed)


def _train_on(world: World, config: Config, run_dir: Path, seed: int) -> None:
    experiment = load_experiment(config, world)
    if world.main:
        print(experiment.notes)
    with progress_bar(config.steps, shown=world.main) as bar:
        announce = Announcer(bar.write)

        def on_step(row: dict, metrics: dict[str, float]) -> None:
            announce(row)
            bar.n = row["step"]
            bar.set_postfix_str(progress_text(row, metrics, config.report.metric))

        def first_rollout(*first: Any) -> None:
            bar.write(_decoded(experiment, *first))

        trainer = Trainer(
            config,
            experiment,
            run_dir / "arms" / "train" / f"seed{seed}",
            seed,
            on_step=on_step if world.main else None,
            on_first_rollout=first_rollout if world.main else None,
        )
        if world.main:
            write_run_files(run_dir, config)
        try:
            trainer.run()
        except KeyboardInterrupt as error:
            step = max(0, trainer.saved_step)
            raise Interrupted(
                f"interrupted: step {step} of {config.steps} is saved in {trainer.directory}; "
                "the same command resumes from there"
            ) from error
    if not world.main:
        return
    for line in announce.counts():
        print(line)
    print(f"model: {trainer.directory / 'checkpoints' / f'step_{config.steps:06d}' / 'model'}")
    print(write_report(run_dir))


def _compare(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        return _print_plan(cap_steps(config, options.steps), options.on)
    how = {"max_steps": options.steps, "jobs": options.jobs}
    with start(config) as how["world"]:
        stamp = how["world"].from_main(lambda: time.strftime("%Y%m%d-%H%M%S"))
        out = options.out or Path("runs") / f"{options.config.stem}-{stamp}"
        if options.tune:
            config = tune(config, out, **how)
        compare(config, out, **how)


def _diagnose(options: argparse.Namespace) -> None:
    # Its figures need matplotlib, which no other command imports before it has to.
    from esr_train.diagnose import describe_diagnosis, diagnose

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        print(to_yaml(config))
        return print(describe_diagnosis(config, options.on))
    out = options.out or Path("runs") / f"{options.config.stem}-diagnosis"
    try:
        print(diagnose(config, out))
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted: sections that are finished are in {out / 'sections'}; the same command "
            "goes on from there"
        ) from error


def _evaluate(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.model:
        config = with_overrides(config, {"student": {"model": options.model}})
    if options.dry_run:
        return _print_plan(config, options.on)
    with start(config) as world:
        experiment = load_experiment(config, world)
        evaluator = experiment.evaluator or Evaluator(
            config,
            experiment.student,
            experiment.teacher,
            experiment.tokenized,
            experiment.alignment,
            world,
        )
        metrics, samples = evaluator.evaluate()
        if world.main:
            found = {"metrics": metrics, "samples": samples}
            print(json.dumps(found, indent=2, ensure_ascii=False))


def _sample(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    rollout = config.rollout
    given: dict[str, Any] = {"temperature": rollout.temperature, **rollout.filters}
    for field in dataclasses.fields(SamplingParams):
        if getattr(options, field.name) is not None:
            given[field.name] = getattr(options, field.name)
    text = sample_text(
        config,
        config.teacher if options.teacher else config.student,
        options.prompt,
        options.samples or rollout.samples,
        options.max_new_tokens or rollout.max_new_tokens,
        SamplingParams(**given),
        options.seed,
    )
    print(text)


def _report(options: argparse.Namespace) -> None:
    try:
        path = write_report(options.run_dir)
        print(summary_table(options.run_dir))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(path)


def _export(options: argparse.Namespace) -> None:
    print(
        export(
            options.run_dir,
            options.out,
            options.arm,
            options.seed,
            best=options.best,
            merge=options.merge,
        )
    )


def _print_plan(config: Config, on: str | None) -> None:
    """The resolved config, and what each arm takes; raises what the run would raise, as far as
    configs and tokenizers can tell."""
    print(to_yaml(config))
    print(describe(config, on))


def _decoded(experiment: Experiment, batch: RolloutBatch, teacher_prompt: list[int]) -> str:
    """The first prompt and response with special tokens, as each model reads them."""
    response = batch.response(0)
    read = experiment.alignment.as_teacher_reads(batch, 0)
    lines = []
    for who, tokenizer, prompt, answer in (
        ("student", experiment.tokenized.tokenizer, batch.prompts[0], response),
        ("teacher", experiment.teacher_tokenizer, teacher_prompt, read),
    ):
        texts = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, answer))
        lines += [
            f"first {what}, to the {who}: {text!r}"
            for what, text in zip(("prompt", "response"), texts, strict=True)
        ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be a whole number of at least 1")
    return int(text)


def _sampling_parameter(name: str) -> Callable[[str], Any]:
    """A parser for a field of SamplingParams, which checks the value."""

    def parse(text: str) -> Any:
        value: Any
        try:
            value = int(text) if name == "top_k" else float(text)
        except ValueError as error:
            kind = "an integer" if name == "top_k" else "a number"
            raise argparse.ArgumentTypeError(f"{name} must be {kind}, got {text}") from error
        try:
            SamplingParams(**{name: value})
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse

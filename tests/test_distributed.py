"""Runs on two processes: the numbers of one, exact resume, and errors that end both. gloo."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from esr_train import evaluate
from esr_train.cli import main
from esr_train.compare import compare
from esr_train.config import Config, ConfigError, load_config, to_yaml, with_overrides
from esr_train.experiment import load_experiment
from esr_train.launch import start
from esr_train.metrics import read_rows
from esr_train.train import Trainer
from esr_train.world import World, WorldError
from tests.test_checkpoint import curve
from tests.test_interruption import tensors
from tests.test_train import build
from tests.tiny import MakeConfig

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")

FULL = {"steps": 4, "optim__schedule": "constant", "optim__micro_batch": 3, "eval__student_text": 4}
LORA = {"student__lora": {"r": 4, "alpha": 8.0}, "steps": 4, "optim__schedule": "constant"}
LORA["eval__every"] = 0
THREE = {"rollout__prompts": 3, "rollout__samples": 1, "steps": 2, "eval__every": 0}
THREE |= {"loss__window": "random", "loss__window_tokens": 2, "loss__denominator": "trajectory"}
# One process has no prompt, and in step 2 (`end_at_once`) there is nothing to train on.
ONE = {"rollout__prompts": 1, "rollout__samples": 3, "steps": 2, "eval__every": 0}
ONE |= {"loss__train_on_eos": False, "optim__micro_batch": 1}
TEACHER = {"rollout__source": "teacher", "rollout__pool": 6, "steps": 3, "eval__every": 0}
PARTS = {"teacher__placement": "fsdp"}
FOUR = {"rollout__prompts": 3, "rollout__pool": 4, **PARTS}
ARMS = [{"name": "short", "max_new_tokens": 3}]
ARMS.append({"name": "teacher", "rollout.source": "teacher", "rollout.pool": 8})
RUNS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "lora": LORA,
    "three prompts": THREE,
    "one prompt": ONE,
    "teacher's answers": TEACHER,
    "fsdp": {**FULL, "runtime__fsdp": True},
    # The teacher has the weights that the student has below its adapters.
    "fsdp lora": {**LORA, "runtime__fsdp": True, "teacher__drop_layers": [0]},
    "fsdp one prompt": {**ONE, "runtime__fsdp": True},
    "teacher in parts": {**FULL, **PARTS},
    "teacher in parts, lora": {**LORA, **THREE, "eval__every": 2, **PARTS},
    "teacher in parts, one prompt": {**ONE, **PARTS},
    "both in parts": {**FULL, **PARTS, "runtime__fsdp": True},
    # Both are made of the same weights, and have parts of their own.
    "both in parts, lora": {**LORA, **PARTS, "runtime__fsdp": True, "teacher__drop_layers": [0]},
    # The last of four prompts is sampled by one process alone.
    "both in parts, teacher's answers": {**TEACHER, **FOUR, "runtime__fsdp": True},
}
# Stopped after the second step, and continued on as many processes, and in one.
RESUMED: dict[str, dict[str, Any]] = {
    "full": FULL,
    "fsdp lora": RUNS["fsdp lora"],
    "fsdp bf16": {**RUNS["fsdp"], **PARTS, "runtime__dtype": "bfloat16", "eval__every": 0},
}

# In two calls: the second finds the first arm finished.
COMPARED: dict[str, dict[str, Any]] = {
    "comparison": {**LORA, "eval__every": 2, "eval__teacher_text": 0, "steps": 2, "arms": ARMS},
    "fsdp comparison": {"runtime__fsdp": True, "steps": 2, "seeds": [0, 1], "arms": ARMS[:1]},
}
COMPARED["fsdp comparison"] |= PARTS


def compare_on(world: World, config: Config, directory: Path) -> None:
    """A comparison without its last arm, then the whole."""
    say = [].append
    first = config.model_copy(update={"arms": config.arms[:1]})
    for part in (first, config):
        compare(part, directory, say=say, world=world)


def trained(config: Config, directory: Path, world: World, save: bool = True) -> Trainer:
    trainer = Trainer(config, load_experiment(config, world), directory, 0, save=save)
    if directory.name.endswith("one prompt"):
        end_at_once(trainer)
    trainer.run()
    return trainer


def end_at_once(trainer: Trainer) -> None:
    """Every response of step 2 is EOS alone, which is not trained on."""
    real = trainer.source.answers

    def answers(step: int) -> Any:
        trainer.rollout.eos_ids = list(range(32)) if step == 2 else [0]
        return real(step)

    trainer.source.answers = answers  # type: ignore[method-assign]


def _rank(rank: int, directory: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    evaluate._TOKENS = 1  # a text in a pass, of which one process then has more
    configs = {n: load_config(directory / f"{n}.yaml") for n in {**RUNS, **RESUMED, **COMPARED}}
    through: list[Any] = []  # models in parts, for each pass

    def passed(module: Any, *_: Any) -> None:
        if "_Root" in type(module).__name__:
            through.append(module.model)

    torch.nn.modules.module.register_module_forward_hook(passed)
    with start(configs["full"]) as world:
        assert (world.rank, world.size) == (rank, 2)
        for name in {**RUNS, **RESUMED}:
            config = configs[name]
            trainer = trained(config, directory / name, start(config))
            if config.teacher.placement:
                teacher = trainer.objective.teacher.model
                check_parts(teacher, trainer.world)
                (directory / f"{name}-{rank}.passes").write_text(str(through.count(teacher)))
            weights = {k: whole(p) for k, p in trainer.optimizer.parameters.items()}
            torch.save(weights, directory / f"{name}-{rank}.pt")
        for name in RESUMED:
            config, parts = configs[name], directory / f"{name}, parts"
            trained(config.model_copy(update={"steps": 2}), parts, start(config))
            if world.main:
                shutil.copytree(parts, directory / f"{name}, elsewhere")
            trained(config, parts, start(config))
        for name in COMPARED:
            compare_on(start(configs[name]), configs[name], directory / name)
        try:
            world.from_main(lambda: fail())
        except (ValueError, WorldError) as error:
            (directory / f"failure-{rank}").write_text(f"{type(error).__name__}: {error}")


def check_parts(model: Any, world: World) -> None:
    """A process has its rows, and all of the head where that is used, whatever else is gathered."""
    for parameter in model.parameters():
        rows = parameter.shape[0]
        assert parameter.to_local().shape[0] in (rows // 2, -(-rows // 2))
    with world.scoring():
        with world.whole(model):
            pass
        assert not hasattr(model.lm_head.weight, "to_local")


def alone(config: Config) -> Config:
    """What one process can have."""
    return with_overrides(config, {"runtime.fsdp": False, "teacher.placement": None})


def whole(parameter: Any) -> torch.Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def fail() -> None:
    raise ValueError("no such thing")


@pytest.fixture(scope="module")
def runs(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the runs of two processes."""
    directory = tmp_path_factory.mktemp("ranks")
    base = make_config().student.model
    for name, changes in {**RUNS, **RESUMED, **COMPARED}.items():
        if "teacher__drop_layers" in changes:
            changes = {**changes, "teacher__model": base}
        (directory / f"{name}.yaml").write_text(to_yaml(make_config(**changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (directory, port), nprocs=2)
    return directory


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) > 0
    for row, known in zip(found, expected, strict=True):
        assert row.keys() == known.keys()
        for key, value in known.items():
            if key == "metrics":
                assert_same_rows([row[key]], [value])
            else:
                same = pytest.approx(value, rel=2e-4, abs=1e-6) if _is_number(value) else value
                assert row[key] == same, key


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, runs: Path, tmp_path: Path) -> None:
    config = alone(load_config(runs / f"{name}.yaml"))
    one = trained(config, tmp_path / name, World(), save=False)
    for log in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        if log == "metrics.jsonl" or config.eval.every:
            assert_same_rows(curve(runs / name, log), curve(tmp_path / name, log))
    both = [torch.load(runs / f"{name}-{rank}.pt") for rank in (0, 1)]
    initial = dict(build(config, tmp_path / "initial").student.named_parameters())
    for key, parameter in one.optimizer.parameters.items():
        assert torch.equal(both[0][key], both[1][key])
        moved = float((parameter - initial[key]).detach().norm())
        assert moved > 0 and float((both[0][key] - parameter).detach().norm()) < 2e-2 * moved, key


@pytest.mark.parametrize("name", [name for name in RUNS if "in parts" in name])
def test_processes_make_as_many_passes_through_a_teacher_in_parts(name: str, runs: Path) -> None:
    passes = [int((runs / f"{name}-{rank}.passes").read_text()) for rank in (0, 1)]
    assert passes[0] == passes[1] > 2  # two before the first step


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_on_as_many_processes_repeats_bit_for_bit(name: str, runs: Path) -> None:
    through, parts = runs / name, runs / f"{name}, parts"
    assert curve(parts) == curve(through) and len(curve(through)) == 4
    a, b = (tensors(directory / "checkpoints" / "step_000004") for directory in (through, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_two_processes_goes_on_in_one(name: str, runs: Path) -> None:
    config, directory = alone(load_config(runs / f"{name}.yaml")), runs / f"{name}, elsewhere"
    build(config, directory, save=True).run()
    if "bf16" not in name:  # in which rounding soon samples another token
        assert_same_rows(curve(directory), curve(runs / name))
    a, b = (tensors(run / "checkpoints" / "step_000004") for run in (directory, runs / name))
    assert {k: (t.shape, t.dtype) for k, t in a.items()} == {
        k: (t.shape, t.dtype) for k, t in b.items()
    }


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_on_two_processes_is_that_of_one(
    name: str, runs: Path, tmp_path: Path
) -> None:
    config = load_config(runs / f"{name}.yaml")
    compare(alone(config), tmp_path / "alone", say=lambda text: None)
    pairs = [(arm["name"], seed) for arm in config.arms for seed in config.seeds]
    assert len(pairs) == 2
    for arm, seed in pairs:
        at = Path("arms") / arm / f"seed{seed}"
        for log in ("metrics.jsonl", "evals.jsonl"):
            assert_same_rows(curve(runs / name / at, log), curve(tmp_path / "alone" / at, log))
        a, b = (tensors(d / at) for d in (runs / name, tmp_path / "alone"))
        assert a.keys() == b.keys()
    assert (runs / name / "report.html").is_file()


def test_several_jobs_on_several_processes_are_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    two = World()
    two.size = 2
    with pytest.raises(ConfigError, match="--jobs: got 2, must be 1 on several processes"):
        compare(make_config(arms=ARMS), tmp_path, jobs=2, world=two)


@pytest.mark.parametrize("command", ["diagnose", "sample", "report", "export"])
def test_other_commands_say_that_they_are_for_one_process(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    more = {"sample": ["--prompt", "x"], "export": ["--out", "y"]}.get(command, [])
    assert main([command, str(tmp_path / "config.yaml"), *more]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"esr-train: rank 2: error: {command} is for one process; train, compare and evaluate take "
        "several\n"
    )


@pytest.mark.parametrize(
    ("rank", "local"), [("0", None), ("1", None), ("2", "0"), ("3", "1")], ids=str
)
def test_a_configuration_is_refused_by_all_and_said_once_a_machine(
    rank: str, local: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert main(["train", "nowhere.yaml"]) == 2
    said = f"esr-train: rank {rank}: error: config: nowhere.yaml is not a file\n"
    assert capsys.readouterr().err == (said if (local or rank) == "0" else "")


def test_what_fails_in_the_main_process_fails_in_all(runs: Path) -> None:
    said = [(runs / f"failure-{rank}").read_text() for rank in (0, 1)]
    assert said == ["ValueError: no such thing", "WorldError: rank 0: no such thing"]


def test_options_without_effect_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="runtime.fsdp: .* this is one"):
        start(make_config(runtime__fsdp=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="--use_fsdp has no effect here"):
        start(make_config())


def launch(launcher: list[str], config: Path, out: Path, **options: Any) -> Any:
    command = [*launcher, "-m", "esr_train", "train", str(config), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT, **options
    )


PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [*PYTHON, "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_commands_of_the_docs(launcher: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    said, _ = launch(launcher, tmp_path / "config.yaml", tmp_path / "run").communicate()
    assert said.count("first prompt, to the student") == 1, said
    build(config, tmp_path / "alone").run()
    assert_same_rows(
        curve(tmp_path / "run" / "arms" / "train" / "seed0"), curve(tmp_path / "alone")
    )
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_within_a_minute(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(make_config(steps=100_000, eval__every=0)))
    process = launch(TORCHRUN, tmp_path / "config.yaml", tmp_path / "run")
    metrics = tmp_path / "run" / "arms" / "train" / "seed0" / "metrics.jsonl"
    while len(read_rows(metrics)) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in said or "exitcode  : -9" in said, said
    # What the other one learns of first: the connection, or the launcher's signal.
    assert "another process has ended" in said or "rank 0: interrupted: step" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_sharded_run_that_is_killed_repeats_bit_for_bit(
    name: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    changes = {**{"full": FULL, "lora": LORA}[name], "steps": 40, "eval__every": 0}
    config = make_config(**changes, runtime__fsdp=True, checkpoint__every=3)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    arm = Path("arms/train/seed0")
    killed = launch(TORCHRUN, tmp_path / "config.yaml", tmp_path / "killed")
    while len(read_rows(tmp_path / "killed" / arm / "metrics.jsonl")) < 8:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert len(children) == 2
    for process in [*map(int, children), killed.pid]:
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    done = len(read_rows(tmp_path / "killed" / arm / "metrics.jsonl"))
    assert 8 <= done < 40
    for run in ("killed", "whole"):
        said, _ = (
            process := launch(TORCHRUN, tmp_path / "config.yaml", tmp_path / run)
        ).communicate()
        assert process.returncode == 0, said
    assert curve(tmp_path / "killed" / arm) == curve(tmp_path / "whole" / arm)
    a, b = (
        tensors(tmp_path / run / arm / "checkpoints/step_000040") for run in ("killed", "whole")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

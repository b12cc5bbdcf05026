"""Whole runs with a server: what they train, and how they end and go on when the server dies."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esr_train.cli import main
from esr_train.config import Config, to_yaml
from esr_train.metrics import read_rows
from tests.remote.stub import Stub, serving
from tests.test_checkpoint import curve
from tests.test_interruption import tensors
from tests.test_train import build
from tests.tiny import MakeConfig, tiny_llama


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `train`: it takes longer than these runs."""
    monkeypatch.setattr("esr_train.cli.write_report", lambda run_dir: run_dir)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reports of `compare` are of text."""
    without = SimpleNamespace(draw_pictures=lambda *_: [])
    monkeypatch.setitem(sys.modules, "esr_train.report.figures", without)


def served(make_config: MakeConfig, teacher: str, url: str | None, **changes: Any) -> Config:
    loss = {"loss__divergence": "forward_kl", "optim__schedule": "constant"}
    base = {
        "teacher__model": teacher,
        "teacher__url": url,
        "eval__every": 0,
        "eval__teacher_text": 0,
        "rollout__pool": 48,  # all others take longer to make than a run
    }
    logprobs = {"teacher__logprobs": 32} if url else {}
    return make_config(**{**loss, **base, **logprobs, **changes})


LORA = {"student__lora": {"r": 4, "alpha": 8.0}}


@pytest.mark.parametrize(
    ("kind", "divergence", "how"),
    [
        ("vllm", "forward_kl", "full"),
        ("vllm", "reverse_kl", "full"),
        ("vllm", "forward_kl", "lora"),
        ("vllm", "reverse_kl", "lora"),
        ("vllm", "forward_kl", "micro-batches"),
        ("sglang", "reverse_kl", "micro-batches"),
    ],
)
def test_all_log_probs_train_as_the_teacher_here(
    make_config: MakeConfig, same: str, tmp_path: Path, kind: str, divergence: str, how: str
) -> None:
    changes = {"full": {}, "lora": LORA, "micro-batches": {"optim__micro_batch": 3}}[how]
    changes = {**changes, "loss__divergence": divergence, "loss__denominator": "trajectory"}
    runs = []
    with serving(tiny_llama(1), kind) as stub:
        for name, url in (("here", None), ("there", stub.url)):
            trainer = build(served(make_config, same, url, **changes), tmp_path / name)
            initial = {k: p.detach().clone() for k, p in trainer.optimizer.parameters.items()}
            trainer.run()
            runs.append(trainer)
    here, there = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("here", "there"))
    for a, b in zip(here, there, strict=True):
        for key in ("loss", "divergence", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), key
        assert b["teacher_top_mass"] == pytest.approx(1) == b["student_top_mass"]
        assert b["seconds"].keys() == a["seconds"].keys()
    for key, parameter in runs[0].optimizer.parameters.items():
        moved = float((parameter - initial[key]).detach().norm())
        gap = float((parameter - runs[1].optimizer.parameters[key]).detach().norm())
        assert moved > 0 and gap < 2e-2 * moved, key


def test_few_log_probs_are_a_lower_bound_and_train(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    firsts = []
    for count in (2, 8, 32):
        config = served(make_config, same, vllm.url, teacher__logprobs=count, steps=1)
        build(config, tmp_path / str(count)).run()
        firsts.append(read_rows(tmp_path / str(count) / "metrics.jsonl")[0])
    values = [row["divergence"] for row in firsts]
    masses = [row["teacher_top_mass"] for row in firsts]
    assert values == sorted(values) and masses == sorted(masses) and masses[0] < 0.9
    more = {"steps": 12, "optim__lr": 0.03, "teacher__logprobs": 8}
    build(served(make_config, same, vllm.url, **more), tmp_path / "trained").run()
    rows = read_rows(tmp_path / "trained" / "metrics.jsonl")
    assert rows[-1]["divergence"] < 0.75 * rows[0]["divergence"]


def end_to_end(directory: Path, config: Config, *more: str) -> int:
    path = directory / "config.yaml"
    path.write_text(to_yaml(config))
    return main(["train", str(path), "--out", str(directory / "run"), *more])


ARM = Path("run/arms/train/seed0")


def whole_and_killed(
    directory: Path, config_at: Callable[[str], Config], dies_after: int
) -> tuple[Path, Path, Config]:
    """Arms of a whole run and of one whose server dies after some requests, and the latter's
    configuration."""
    for name in ("whole", "killed"):
        (directory / name).mkdir()
        with serving(tiny_llama(1)) as stub:
            stub.dies_after = dies_after if name == "killed" else None
            config = config_at(stub.url)
            assert end_to_end(directory / name, config) == (2 if stub.dies_after else 0)
            assert stub.dies_after is None or len(stub.asked) > dies_after
    return directory / "whole" / ARM, directory / "killed" / ARM, config


def same_weights(step: int, *arms: Path) -> bool:
    a, b = (tensors(arm / "checkpoints" / f"step_{step:06d}") for arm in arms)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_teachers_server_dies_and_the_run_goes_on_bit_for_bit(
    make_config: MakeConfig, same: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, killed, config = whole_and_killed(
        tmp_path,
        lambda url: served(make_config, same, url, steps=4),
        2 + 2 * 8 + 3,  # in the third step
    )
    said = capsys.readouterr().err
    assert f"error: teacher.url: {config.teacher.url}/v1/completions gave no answer" in said
    assert "a request for teacher.logprobs=32 at" in said and "give the same command" in said
    assert len(curve(killed)) == 2 and tensors(killed / "checkpoints" / "step_000002")
    with serving(tiny_llama(1)) as stub:  # elsewhere
        assert end_to_end(tmp_path / "killed", config, f"teacher.url={stub.url}") == 0
    assert curve(killed) == curve(whole) and len(curve(whole)) == 4
    assert same_weights(4, whole, killed)


def frozen(make_config: MakeConfig, student: str, url: str | None, **changes: Any) -> Config:
    return make_config(
        **{
            "student__model": student,
            "rollout__source": "initial_student",
            "rollout__url": url,
            "rollout__pool": 12,
            "steps": 5,
            "eval__every": 0,
            "optim__schedule": "constant",
            **changes,
        }
    )


def test_a_servers_greedy_answers_train_as_those_of_the_engine_here(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    for name, url in (("here", None), ("there", vllm.url)):
        config = frozen(make_config, same, url, rollout__temperature=0.0)
        build(config, tmp_path / name, save=True).run()
    here, there = curve(tmp_path / "here"), curve(tmp_path / "there")
    assert there[0].pop("logprob_gap") < 1e-4  # of the weights that have sampled
    assert "logprob_gap" not in there[1]
    for row in there:
        assert row.pop("engine") == f"vllm at {vllm.url}, model tiny"
    assert here == there and sum(row["tokens"] for row in there) > 0


def test_a_server_with_another_model_raises_the_alarm(
    make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    with serving(tiny_llama(7)) as stub:
        build(frozen(make_config, same, stub.url), tmp_path).run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert "server_logprobs_apart" in rows[0]["alarms"] and rows[1]["alarms"] == []


def test_the_samplers_server_dies_and_nothing_is_sampled_twice(
    make_config: MakeConfig, same: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, killed, config = whole_and_killed(
        tmp_path,
        lambda url: frozen(make_config, same, url),
        1 + 8 + 8 + 3,  # in the last third
    )
    said, was = capsys.readouterr().err, config.rollout.url
    assert f"rollout.url: {was}/v1/completions gave no answer to a request for 6 tok" in said
    assert (killed / "checkpoints" / "answers.safetensors").is_file()
    with serving(tiny_llama(1)) as stub:
        assert end_to_end(tmp_path / "killed", config, f"rollout.url={stub.url}") == 0
        assert len(stub.asked) == 1 + 8  # the part that was not there
    rows = [curve(arm) for arm in (whole, killed)]
    engines = [[row.pop("engine") for row in of_run] for of_run in rows]
    assert rows[0] == rows[1] and engines[0] != engines[1]
    assert same_weights(5, whole, killed)
    # All answers are there: no server is asked any more.
    more = "steps=5", "rollout.url=http://127.0.0.1:9"
    assert end_to_end(tmp_path / "killed", config, *more) == 0


def test_a_served_teachers_answers_are_fine_tuned_on(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    config = served(
        make_config,
        same,
        vllm.url,
        loss__divergence="cross_entropy",
        rollout__source="teacher",
        rollout__pool=8,
    )
    vllm.max_logprobs = 1  # none are asked for
    build(config, tmp_path).run()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["cross_entropy"] > 0 and row["engine"].startswith("vllm at ")


@pytest.mark.usefixtures("no_figures")
def test_the_report_names_the_engine_of_every_arm(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    there = {"rollout.url": vllm.url, "rollout.served_name": "tiny"}
    arms = [
        {"name": "own", "max_new_tokens": 3},
        {"name": "elsewhere", "rollout.source": "initial_student", **there},
    ]
    config = served(
        make_config, same, vllm.url, arms=arms, steps=2, eval__every=2, teacher__logprobs=4
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    out = tmp_path / "run"
    assert main(["compare", str(tmp_path / "config.yaml"), "--out", str(out), "--jobs", "1"]) == 0
    report = (out / "report.md").read_text()
    teacher = f"server at {vllm.url}, 4 log-probs"
    assert f"| own | esr_train; student of each step | {teacher} |" in report
    assert f"| elsewhere | vllm at {vllm.url}, model tiny; initial_student | {teacher} |" in report
    json.loads((out / "summary.json").read_text())


def test_the_dry_run_leaves_the_teacher_out_and_asks_nobody(
    make_config: MakeConfig, same: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = []
    for url in (None, "http://127.0.0.1:9"):
        assert end_to_end(tmp_path, served(make_config, same, url), "--dry-run") == 0
        said.append(capsys.readouterr().out)
    assert "teacher: LlamaModel, at http://127.0.0.1:9" in said[1]
    assert "teacher 0, " in said[1] and "teacher 0, " not in said[0]
    assert "of 32 log-probs a token, from teacher.url" in said[1]


def test_weights_of_a_served_teacher_are_not_needed(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path
) -> None:
    (Path(same) / "model.safetensors").unlink()
    build(served(make_config, same, vllm.url, steps=1), tmp_path).run()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_server_with_fewer_log_probs_is_found_before_any_work(
    vllm: Stub,
    make_config: MakeConfig,
    same: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    command: str,
) -> None:
    vllm.max_logprobs = 8
    config = served(make_config, same, vllm.url, steps=1, arms=[{"name": "a"}])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    run = [command, str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main(run) == 2
    assert "asked for teacher.logprobs=32; vLLM's limit is --max-log" in capsys.readouterr().err
    assert len(vllm.asked) == 2 and not (tmp_path / "run").exists()
    assert main([*run, "teacher.logprobs=8"]) == 0
    where = "teacher.url: vllm at .* serves 'tiny' .of /models/teacher., 64 tokens of context"
    assert re.search(where, capsys.readouterr().out)


@pytest.mark.parametrize("section", ["teacher", "rollout"])
def test_a_run_with_a_server_does_not_go_on_without(
    vllm: Stub, make_config: MakeConfig, same: str, tmp_path: Path, section: str, capsys: Any
) -> None:
    if section == "teacher":
        config = served(make_config, same, vllm.url, steps=1)
    else:
        config = frozen(make_config, same, vllm.url, steps=1)
    assert end_to_end(tmp_path, config) == 0
    here = [f"{section}.url=null", *(["teacher.logprobs=20"] if section == "teacher" else [])]
    assert end_to_end(tmp_path, config, *here) == 2
    assert f"another configuration: {section}.url was" in capsys.readouterr().err
    more = "runtime.requests=2", "runtime.request_seconds=5.0", "steps=2"
    more += (f"{section}.served_name=tiny",)
    if section == "teacher":
        assert end_to_end(tmp_path, config, *more) == 0

"""A real vLLM that serves SmolLM2-135M on the CPU: its log-probs, and runs in which it is killed.

    ESR_VLLM_PYTHON=/path/to/python python -m pytest -s -m slow tests/remote/test_vllm.py

names an interpreter that has vLLM (docs/engines.md says how to make one). vLLM is started three
times.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train.config import Config, RuntimeConfig, to_yaml
from esr_train.experiment import load_experiment
from esr_train.fetch import fetch_smollm2
from esr_train.metrics import read_rows
from esr_train.remote.client import Server, ServerError
from esr_train.remote.rollouts import RemoteRollout
from esr_train.remote.teacher import RemoteTeacher
from esr_train.teacher import sequences
from tests.test_checkpoint import curve
from tests.test_interruption import tensors

PYTHON = os.environ.get("ESR_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="ESR_VLLM_PYTHON names no interpreter with vLLM"),
]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVE = "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --max-model-len 256 --dtype float32"
SERVE += " --max-num-seqs 16 --enforce-eager --max-logprobs 64 --served-model-name smollm2"


class Process:
    """vLLM, which can be killed and started again on the same port."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [str(PYTHON), *SERVE.split(), "--port", str(self.port), "--model", fetch_smollm2()],
            env={**os.environ, **SETTINGS},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for _ in range(900):  # half a minute on an idle machine
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            if "Application startup complete" in self.log.read_text():
                return
            time.sleep(1)
        pytest.fail(self.log.read_text()[-3000:])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own
        self.process.wait()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("vllm") / "log")
    yield process
    process.kill()


def config(**changes: Any) -> Config:
    """A student of four of SmolLM2's layers, by LoRA."""
    base = {
        "student": {
            "model": "smollm2",
            "drop_layers": list(range(4, 30)),
            "lora": {"r": 4, "alpha": 8.0},
        },
        "teacher": {"model": "smollm2"},
        "data": {"task": "prompts"},
        "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 8},
        "loss": {"divergence": "forward_kl"},
        "optim": {"lr": 1e-3},
        "steps": 4,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        base[section] = {**base[section], name: value} if name else value
    return Config.model_validate(base)


def test_its_log_probs_are_those_of_the_model_here(vllm: Process) -> None:
    here = load_experiment(config(rollout__max_new_tokens=24)).teacher
    prompts = [[504, 2365, 282, 4649, 314], [1780, 314, 253, 1123]]
    batch = here.rollout.generate(prompts, 2, 24, 1.0, (0,))
    inside = torch.arange(24) < batch.lengths[:, None]
    read = sequences(batch, inside.float(), torch.device("cpu"))
    logits = here.head.logits(here.hidden_rows(read)).log_softmax(-1)
    server = Server("teacher.url", vllm.url, "smollm2", RuntimeConfig())
    assert server.kind == "vllm" and server.max_tokens == 256
    rollout = RemoteRollout(server, here.rollout.classes, here.rollout.stop_ids, spare=1)
    for count in (20, 64):
        found = RemoteTeacher(rollout, count, 49152).top(read)
        known = logits.gather(1, found.ids.clamp(min=0))
        there = found.ids >= 0
        assert bool((there.sum(1) >= count).all())
        gap = (found.logprobs - known)[there].abs()
        print(f"{count}: {int(there.sum())} log-probs, off by at most {float(gap.max()):.2g} nats")
        assert float(gap.max()) < 2e-3
    RemoteTeacher(rollout, 64, 49152).probe()
    with pytest.raises(ServerError, match="refuses a request for teacher.logprobs=65 .* 400") as no:
        RemoteTeacher(rollout, 65, 49152).probe()
    print(server.note, no.value, sep="\n")
    # Greedy tokens are the same until two are as probable as each other within rounding.
    own = here.rollout.generate(prompts, 1, 24, 0.0, (0,))
    its = rollout.generate(prompts, 1, 24, 0.0, (0,))
    print(
        f"greedy tokens that agree: {int((own.tokens == its.tokens).sum())} of {own.tokens.numel()}"
    )
    assert torch.equal(own.tokens[:, :8], its.tokens[:, :8])
    samples = rollout.generate(prompts, 3, 24, 1.0, (0,))
    again = rollout.generate(prompts[:1], 1, 24, 1.0, (0,), row_keys=torch.tensor([1]))
    assert torch.equal(samples.tokens[1], again.tokens[0])
    # A sample's own log-probs are what the model here gives its tokens.
    inside = torch.arange(24) < samples.lengths[:, None]
    read = sequences(samples, inside.float(), torch.device("cpu"))
    logits = here.head.logits(here.hidden_rows(read)).log_softmax(-1)
    known = logits.gather(1, samples.tokens[inside][:, None])[:, 0]
    assert float((known - samples.logprob[inside]).abs().max()) < 2e-3


def train(directory: Path, config: Config, *more: str) -> subprocess.Popen:
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    out = ["--out", str(directory / "run"), *more]
    command = [sys.executable, "-m", "esr_train", "train", str(directory / "config.yaml"), *out]
    return subprocess.Popen(command, text=True, stdout=-1, stderr=subprocess.STDOUT)


def until(process: subprocess.Popen, done: Any) -> None:
    while not done():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


ARM = Path("run/arms/train/seed0")


def test_the_teacher_is_killed_and_the_run_goes_on(vllm: Process, tmp_path: Path) -> None:
    wanted = config(teacher__url=vllm.url)
    whole = train(tmp_path / "whole", wanted)
    assert whole.wait() == 0, whole.communicate()[0]
    run = train(tmp_path / "killed", wanted)
    metrics = tmp_path / "killed" / ARM / "metrics.jsonl"
    until(run, lambda: len(read_rows(metrics)) >= 2)
    vllm.kill()
    said, _ = run.communicate()
    print(said[said.index("esr-train: error") :])
    assert run.returncode == 2 and f"teacher.url: {vllm.url}/v1/completions gave no answer" in said
    done = len(read_rows(metrics))
    assert 2 <= done < 4 and tensors(metrics.parent / "checkpoints" / f"step_{done:06d}")
    vllm.start()
    again = train(tmp_path / "killed", wanted)
    assert again.wait() == 0, again.communicate()[0]
    both = [curve(tmp_path / name / ARM) for name in ("whole", "killed")]
    print([[round(row["divergence"], 4) for row in rows] for rows in both])
    # What a server computes depends in its rounding on what else it is asked at the time.
    for a, b in zip(*both, strict=True):
        assert b["divergence"] == pytest.approx(a["divergence"], rel=0.05)


def test_the_sampler_is_killed_and_keeps_what_it_sampled(vllm: Process, tmp_path: Path) -> None:
    wanted = config(rollout__url=vllm.url, rollout__source="teacher", rollout__max_new_tokens=40)
    log = vllm.log
    before = log.read_text().count("POST /v1/completions")
    run = train(tmp_path / "killed", wanted)
    until(run, lambda: log.read_text().count("POST /v1/completions") >= before + 6)
    vllm.kill()
    said, _ = run.communicate()
    print(said[said.index("esr-train: error") :])
    assert run.returncode == 2 and f"rollout.url: {vllm.url}/v1/completions gave no answer" in said
    assert (tmp_path / "killed" / ARM / "checkpoints" / "answers.safetensors").is_file()
    assert not read_rows(tmp_path / "killed" / ARM / "metrics.jsonl")
    vllm.start()
    again = train(tmp_path / "killed", wanted)
    assert again.wait() == 0, again.communicate()[0]
    asked = log.read_text().count("POST /v1/completions")
    print(f"asked after the start: {asked} of 16 responses")
    assert 0 < asked <= 12
    rows = curve(tmp_path / "killed" / ARM)
    assert len(rows) == 4 and {row["engine"] for row in rows} == {
        f"vllm at {vllm.url}, model smollm2"
    }

"""What a configuration with a server is refused for, before the server is asked for anything."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from esr_train.cli import main
from esr_train.config import ConfigError, load_config, to_yaml
from esr_train.dry_run import make_plan
from esr_train.experiment import load_experiment
from esr_train.models import ModelError
from tests.remote.stub import Stub
from tests.remote.test_runs import served
from tests.tiny import MakeConfig, save_pair


def test_diagnose_needs_the_teacher_here(
    make_config: MakeConfig, same: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(served(make_config, same, "http://127.0.0.1:9")))
    for more in ([], ["--dry-run"]):
        assert main(["diagnose", str(path), "--out", str(tmp_path / "out"), *more]) == 2
        assert "teacher.url: got 'http://127.0.0.1:9', must be null" in capsys.readouterr().err


def test_another_tokenizer_is_refused(vllm: Stub, make_config: MakeConfig, tmp_path: Path) -> None:
    other = save_pair(tmp_path / "other", 1, alphabet="abcdefghij0123456789+= .")
    config = served(make_config, other, vllm.url)
    for load in (load_experiment, make_plan):
        with pytest.raises(
            ConfigError, match=f"teacher.model, '{other}', has another tokenizer than student.model"
        ):
            load(config)


def test_more_log_probs_than_tokens_are_refused(
    vllm: Stub, make_config: MakeConfig, same: str
) -> None:
    message = f"teacher.logprobs: got 33, must be at most 32, the vocabulary of .*'{same}'"
    for load in (load_experiment, make_plan):
        load(served(make_config, same, vllm.url))
        with pytest.raises(ConfigError, match=message):
            load(served(make_config, same, vllm.url, teacher__logprobs=33))


def test_a_name_on_the_server_is_no_model_here(make_config: MakeConfig, same: str) -> None:
    config = served(make_config, "/there/teacher", "http://127.0.0.1:9")
    hint = "teacher.model '/there/teacher': no such directory; its name at .* teacher.served_name"
    with pytest.raises(ModelError, match=hint):
        make_plan(config)
    config = served(make_config, same, "http://127.0.0.1:9", student__model="/there/student")
    with pytest.raises(ModelError, match="student.model '/there/student': no such directory$"):
        make_plan(config)


def test_the_command_of_the_docs_is_understood() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "docs" / "engines.md").read_text().splitlines()
    (command,) = (shlex.split(line) for line in lines if line.startswith("esr-train train configs"))
    assert load_config(root / command[2], command[3:]).teacher.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__url": "http://x"}, "rollout.url: got 'http://x', must be null where .*student"),
        ({"teacher__url": "x:80"}, "teacher.url: got 'x:80', must be http://HOST:PORT"),
        ({"teacher__url": "http://x:abc"}, "teacher.url: got 'http://x:abc', must be http"),
        ({"teacher__url": "http://x:99999"}, "teacher.url: got 'http://x:99999', must be http"),
        ({"teacher__url": "http://x/v1?y=1"}, "teacher.url: .*, with or without /v1"),
        ({"teacher__url": "http://u:p@x"}, "teacher.url: .*, must be http"),
        ({"teacher__url": " http://x"}, "teacher.url: .*, must be http"),
        ({"teacher__adapter": "a"}, "teacher.adapter: got 'a', must be left out where teacher.url"),
        ({"teacher__drop_layers": [0]}, r"teacher.drop_layers: got \[0\]"),
        ({"teacher__logprobs": 0}, "teacher.logprobs: got 0"),
        ({"teacher__url": None}, "teacher.logprobs: got 32, must be left out where teacher.url"),
        (
            {"teacher__url": None, "teacher__logprobs": 20, "teacher__served_name": "x"},
            "teacher.served_name: got 'x', must be left out where teacher.url is not set",
        ),
        ({"rollout__served_name": "x"}, "rollout.served_name: got 'x', must be left out"),
        ({"loss__divergence": "jsd"}, "loss.divergence: got 'jsd', must be one of .*teacher.url"),
        ({"loss__temperature": 2.0}, "loss.temperature: got 2.0, must be 1"),
        ({"loss__merge_terminators": True}, "loss.merge_terminators: got True, must be false"),
        (
            {
                "loss__window": "selected",
                "loss__window_tokens": 2,
                "loss__select_by": ["divergence"],
            },
            "loss.select_by: .* must be left out",
        ),
        ({"eval__teacher_text": 4}, "eval.teacher_text: got 4, must be 0"),
        ({"eval__student_text": 4}, "eval.student_text: got 4, must be 0"),
        ({"runtime__requests": 0}, "runtime.requests: got 0"),
        ({"runtime__request_seconds": 0.0}, "runtime.request_seconds: got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_server_cannot_do_is_refused(
    make_config: MakeConfig, same: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        served(make_config, same, "http://127.0.0.1:9", **changes)

"""The script that builds the models of the sums task, and the models that it built."""

import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_train.config import DataConfig
from esr_train.tasks import builtin_model_path, load_task
from esr_train.tasks.sums import step_by_step, summands_of, wordy_guess
from tools import build_sums
from tools.build_sums import accuracy, build_tokenizer, main


def _load(name):
    path = builtin_model_path(name)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def test_tokenizer_gives_back_every_prompt_and_answer():
    tokenizer, rng = build_tokenizer(), random.Random(0)
    for problem in load_task(DataConfig()).problems("train", 300, seed=0):
        summands = summands_of(problem)
        for text in (problem.prompt, step_by_step(summands), wordy_guess(summands, rng)):
            ids = tokenizer(text).input_ids
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
            assert len(ids) == len(text) + 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_built_in_tokenizers_are_those_the_script_builds():
    text = "23+45+67+12=well, hmm"
    for name in ("sums-teacher", "sums-student"):
        tokenizer = _load(name)[1]
        assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
        assert tokenizer(text).input_ids == build_tokenizer()(text).input_ids
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_teacher_is_right_and_student_starts_out_guessing():
    problems = load_task(DataConfig()).problems("heldout", 32, seed=1)
    assert accuracy(*_load("sums-teacher"), problems) >= 0.95
    assert accuracy(*_load("sums-student"), problems) < 0.3


def test_build_script_writes_loadable_models(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--quick", "--threads", "1"]) == 0
    assert "teacher  step 4/4" in capsys.readouterr().out
    for name in ("teacher", "student"):
        assert AutoTokenizer.from_pretrained(tmp_path / name)("1+2=").input_ids
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_build_script_refuses_a_model_that_misses_its_target(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build_sums, "accuracy", lambda *_: 0.97)
    monkeypatch.setattr(build_sums, "train", lambda *_: None)
    assert main(["--out", str(tmp_path), "--only", "teacher", "--threads", "1"]) == 1
    assert "outside its target" in capsys.readouterr().err


def test_build_script_wants_the_teacher_before_the_student(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "student"])
    assert "teacher, which is missing" in capsys.readouterr().err

"""TRL's trainers with our loss under them, end to end on the CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from datasets import Dataset

trl = pytest.importorskip("trl", reason="pip install 'trl>=1.16,<2'")
from trl.experimental.gkd.gkd_trainer import GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer as module  # noqa: E402

from esr_kernels.integrations import trl_losses  # noqa: E402
from esr_kernels.integrations.trl import DistillationTrainer, patched  # noqa: E402
from esr_train.rollout import PrefixRollout  # noqa: E402
from tests.integrations.trl_runs import SETTINGS, logged, losses, tokenizer, trainer  # noqa: E402
from tests.tiny import tiny_llama  # noqa: E402

BY_TRL = module._chunked_divergence_loss, GKDTrainer.compute_loss


def _installed():
    return module._chunked_divergence_loss, GKDTrainer.compute_loss


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ten_steps_have_trls_own_losses(tmp_path, beta):
    settings = {"beta": beta, "gradient_accumulation_steps": 2, "temperature": 0.8}
    plain = trainer(tmp_path, settings=settings)
    expected = losses(plain)
    ours = trainer(tmp_path, settings=settings)
    calls = []
    with patched():
        inner = module._chunked_divergence_loss
        module._chunked_divergence_loss = lambda *a, **k: calls.append(1) or inner(*a, **k)
        found = losses(ours)
    assert len(calls) == 20
    assert len(found) == 10 and max(expected) > 0.1
    assert found == pytest.approx(expected, rel=1e-5)
    assert logged(ours, "entropy") == pytest.approx(logged(plain, "entropy"), rel=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


def test_patched_restores_after_an_exception_and_nested():
    with pytest.raises(RuntimeError, match="stop"):
        with patched():
            outer = _installed()
            assert outer[0] is not BY_TRL[0] and outer[1] is not BY_TRL[1]
            with patched(memory_budget=1 << 20):
                assert _installed()[0] is not outer[0]
            assert _installed() == outer
            raise RuntimeError("stop")
    assert _installed() == BY_TRL


def test_patched_refuses_an_unknown_option_and_a_trl_that_has_moved(monkeypatch):
    with pytest.raises(TypeError, match="'budget' is unknown; options are divergence"):
        with patched(budget=1):
            pass
    with pytest.raises(ValueError, match="divergence must be one of .*got 'jds'"):
        with patched(divergence="jds"):
            pass
    monkeypatch.setattr(module, "_chunked_divergence_loss", lambda student, teacher: None)
    with pytest.raises(ImportError, match=r"takes \['student', 'teacher'\]"):
        with patched():
            pass
    assert GKDTrainer.compute_loss is BY_TRL[1]


def _operands(rows=(3, 5), dtype=torch.float32):
    torch.manual_seed(0)
    student, teacher = torch.randn(*rows, 16), torch.randn(*rows, 24)
    heads = torch.randn(40, 16), torch.randn(40, 24)
    mask = (torch.rand(rows) < 0.6).long()
    return [x.to(dtype) for x in (student, teacher, *heads)], mask


def _both(tensors, mask, **settings):
    """Loss, entropy, count and gradients by TRL and by ours."""
    results = []
    with patched():
        ours = module._chunked_divergence_loss
    for loss_of in (BY_TRL[0], ours):
        own = [x.clone().requires_grad_(i in (0, 2)) for i, x in enumerate(tensors)]
        loss, entropy, count = loss_of(*own, mask, **settings)
        loss.backward()
        results.append([loss.detach(), entropy.detach(), count, own[0].grad, own[2].grad])
    return results


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7.0)], ids=["None", "int", "tensor"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_function_has_trls_contract(items, beta):
    tensors, mask = _operands()
    settings = {
        "student_logit_scale": 0.7,
        "teacher_logit_scale": 1.3,
        "student_final_logit_softcapping": 5.0,
        "teacher_final_logit_softcapping": 4.0,
        "student_lm_head_bias": torch.linspace(-1, 1, 40),
        "teacher_lm_head_bias": torch.linspace(1, -1, 40),
        "temperature": 1.7,
    }
    expected, found = _both(tensors, mask, beta=beta, num_items_in_batch=items, **settings)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("items", [None, torch.tensor(3.0)], ids=["None", "tensor"])
def test_an_all_masked_batch_is_a_zero_with_a_graph(items):
    tensors, mask = _operands()
    for result in _both(tensors, torch.zeros_like(mask), beta=1.0, num_items_in_batch=items):
        assert float(result[0]) == 0.0 and int(result[2]) == 0
        assert not result[3].any() and not result[4].any()


def test_sixteen_bit_states_meet_an_fp32_head():
    tensors, mask = _operands()
    mixed = [tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2], tensors[3]]
    expected, found = _both(mixed, mask, beta=1.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[4].dtype == torch.float32
    torch.testing.assert_close(found[4], expected[4], rtol=2e-2, atol=2e-3)


def test_unequal_padded_vocabularies_train_where_trl_refuses(tmp_path):
    sizes = {"student": {"vocab_size": 34}, "teacher": {"vocab_size": 32}}
    with pytest.raises(ValueError, match="vocab_size 34"):
        trainer(tmp_path, **sizes)
    with pytest.raises(ValueError, match="vocab_size 34.*integrations.trl.DistillationTrainer in"):
        with patched():
            trainer(tmp_path, **sizes)
    assert _installed() == BY_TRL
    ours = trainer(tmp_path, DistillationTrainer, **sizes, settings={"learning_rate": 1e-2})
    assert ours.generation_config.suppress_tokens == [32, 33]
    found = losses(ours)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert _installed() == BY_TRL


def test_the_subclass_on_an_equal_pair_is_trl_itself(tmp_path):
    expected = losses(trainer(tmp_path, settings={"max_steps": 3}))
    found = losses(trainer(tmp_path, DistillationTrainer, settings={"max_steps": 3}))
    assert found == pytest.approx(expected, rel=1e-5)


def test_divergence_ends_and_engine_of_the_subclass(tmp_path):
    made = []

    def engine(model, tokenizer, **settings):
        made.append(settings)
        return PrefixRollout(model, tokenizer, **settings)

    ours = trainer(
        tmp_path,
        DistillationTrainer,
        student={"vocab_size": 34},
        teacher={"eos_token_id": 25},
        settings={"max_steps": 2, "gradient_accumulation_steps": 2, "log_completions": True},
        divergence="jeffreys",
        merge_student_ids=[0, 25],
        merge_teacher_ids=[0, 25],
        rollout=engine,
    )
    seen = []
    given = trl_losses.masked_divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trl_losses,
            "masked_divergence",
            lambda *a, **k: seen.append(k) or given(*a, **k),
        )
        assert all(loss > 0 for loss in losses(ours))
    assert made == [{"classes": 32, "stop_ids": [0, 25]}]  # one engine for the run
    assert len(seen) == 4
    assert seen[0]["divergence"] == "jeffreys" and seen[0]["merge_teacher_ids"] == [0, 25]
    ends = [text for text in ours._logs["completion"] if "." in text]
    assert all(text.index(".") == len(text) - 1 for text in ends)


def test_ends_in_loss_options_stop_the_sampling(tmp_path):
    ends = {"merge_student_ids": torch.tensor([0, 25]), "merge_teacher_ids": (0, 25)}
    ours = trainer(tmp_path, DistillationTrainer, loss_options=ends)
    assert ours.generation_config.eos_token_id == [0, 25]


def test_the_engine_is_refused_where_it_would_sample_another_law(tmp_path):
    with pytest.raises(ValueError, match="combined with args.repetition_penalty"):
        trainer(
            tmp_path,
            DistillationTrainer,
            settings={"repetition_penalty": 1.2},
            rollout=PrefixRollout,
        )
    with pytest.raises(TypeError, match="'reduction' is unknown"):
        trainer(tmp_path, DistillationTrainer, loss_options={"reduction": "none"})


def test_the_engine_samples_where_trl_trains_under_autocast(tmp_path):
    """TRL's default, bf16=True, has Accelerate put an autocast around the student's forward."""
    settings = {"bf16": True, "max_steps": 2}
    ours = trainer(tmp_path, DistillationTrainer, settings=settings, rollout=PrefixRollout)
    student = ours.model
    found = losses(ours)
    assert len(found) == 2 and min(found) > 0.1
    assert "_original_forward" in vars(student), "no autocast: the test shows nothing"
    assert student.forward != student._original_forward


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rollout": "PrefixRollout"}, "rollout must make an engine .* got 'PrefixRollout'"),
        (
            {"merge_student_ids": ["<eos>"], "merge_teacher_ids": [0]},
            "must be integers .*<eos>",
        ),
        (
            {"merge_student_ids": [0, 3]},
            "merge_student_ids and merge_teacher_ids must be given",
        ),
        ({"merge_student_ids": [0, 99], "merge_teacher_ids": [0]}, r"lie in \[0, 32\).*got 99"),
        ({"divergence": "jds"}, "divergence must be one of .*got 'jds'; did you mean 'jsd'"),
        ({"loss_options": {"plan": "stach"}}, "plan must be .*stach"),
        ({"loss_options": {"plan": "fused"}}, "plan='fused' is a Triton kernel and needs a GPU"),
        ({"loss_options": {"memory_budget": 0}}, "memory_budget must be a positive .*got 0"),
        ({"loss_options": {"num_classes": 33}}, "num_classes must be .*from 1 to 32.*got 33"),
        ({"loss_options": {"teacher_temperature": 0}}, "teacher_temperature must be .*got 0"),
        ({"loss_options": {"impl": "cuda"}}, "impl must be .*cuda"),
        ({"loss_options": ["plan"]}, "loss_options must be a dict, got list"),
        (
            {"divergence": "jsd", "loss_options": {"divergence": "jeffreys"}},
            "divergence is given twice, as an argument and in loss_options: 'jsd' and 'jeffreys'",
        ),
        ({"teacher_model": torch.nn.Linear(2, 2)}, "teacher_model must be a model.* got Linear"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(tmp_path, wrong, message):
    given = {"teacher_model": tiny_llama(1, num_hidden_layers=1), **wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        DistillationTrainer(
            tiny_llama(0, num_hidden_layers=1),
            args=trl.DistillationConfig(str(tmp_path), **SETTINGS),
            train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
            processing_class=tokenizer(),
            **given,
        )


def test_evaluation_and_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    prompts = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+"]})
    found = []
    for context in (contextlib.nullcontext(), patched()):
        ours = trainer(tmp_path, settings=settings, peft_config=config, eval_dataset=prompts)
        with context:
            found.append(losses(ours) + logged(ours, "eval_loss"))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def _gkd(tmp_path, **settings):
    from trl.experimental.gkd.gkd_config import GKDConfig

    messages = [
        [{"role": "user", "content": f"{i}+2"}, {"role": "assistant", "content": f"{i + 2}."}]
        for i in range(16)
    ]
    config = GKDConfig(str(tmp_path), **{**SETTINGS, "max_new_tokens": 6, **settings})
    return GKDTrainer(
        tiny_llama(0),
        tiny_llama(1, hidden_size=48),
        config,
        train_dataset=Dataset.from_dict({"messages": messages}),
        eval_dataset=Dataset.from_dict({"messages": messages[:4]}),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_has_trls_own_losses(tmp_path, beta):
    settings = {"beta": beta, "lmbda": 0.5, "gradient_accumulation_steps": 2, "max_steps": 5}
    expected = losses(_gkd(tmp_path, **settings))
    ours = _gkd(tmp_path, **settings)
    with patched():
        found = losses(ours)
        evaluated = ours.evaluate()["eval_loss"]  # TRL's own, which returns logits
    assert len(found) == 5 and min(expected) > 0.01
    assert found == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(ours.evaluate()["eval_loss"])


def test_trl_itself_has_the_hooks():
    assert trl.DistillationTrainer._compute_loss.__globals__ is vars(module)

"""The functions in the shape of verl's and NeMo-RL's hooks, and what guards all integrations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from esr_kernels import KLMix
from esr_kernels.integrations import peers
from esr_kernels.integrations.nemo_rl import DistillationLossFn
from esr_kernels.integrations.verl import fused_linear_aux


def _packed(tokens=13, width=16, classes=60, k=5):
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    head = torch.randn(classes, width, requires_grad=True)
    top = F.log_softmax(2 * torch.randn(1, tokens, classes), -1).topk(k)
    return hidden, head, top.indices, top.values


def test_verls_losses_and_masses_from_packed_tokens():
    hidden, head, ids, log_q = _packed()
    aux = fused_linear_aux(hidden, head, ids, log_q, temperature=1.3)
    log_p = F.log_softmax(hidden @ head.T / 1.3, -1).gather(-1, ids)
    by_verl = (log_q.exp() * (log_q - log_p)).sum(-1)
    rest_p, rest_q = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
    expected = by_verl + rest_q * (rest_q.log() - rest_p.log())
    assert all(field.shape == (1, 13) for field in aux)
    torch.testing.assert_close(aux.distillation_losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux.student_mass, log_p.exp().sum(-1).detach())
    torch.testing.assert_close(aux.teacher_mass, log_q.exp().sum(-1))
    upstream = torch.rand(1, 13)  # verl weighs tokens after this
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    (aux.distillation_losses * upstream).sum().backward()
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.grad, wanted[1], rtol=1e-3, atol=1e-5)


def test_verls_nested_teacher_tensors():
    hidden, head, ids, log_q = _packed()
    nested = [
        torch.nested.nested_tensor([x[0, :4], x[0, 4:]], layout=torch.jagged) for x in (ids, log_q)
    ]
    found = fused_linear_aux(hidden, head, *nested)
    expected = fused_linear_aux(hidden, head, ids, log_q)
    assert torch.equal(found.distillation_losses, expected.distillation_losses)


@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_nemo_rls_masks_and_normalisation(mixed):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7, 16, requires_grad=True), torch.randn(3, 7, 20)
    heads = torch.randn(50, 16, requires_grad=True), torch.randn(50, 20)
    data = {
        "token_mask": (torch.rand(3, 7) < 0.7).float(),
        "sample_mask": torch.tensor([1.0, 0.0, 1.0]),
    }
    loss_fn = DistillationLossFn(KLMix(mixed, 1 - mixed))
    total = torch.tensor(40.0)
    loss, metrics = loss_fn(student, heads[0], teacher, heads[1], data, torch.tensor(9.0), total)
    log_p = F.log_softmax(student @ heads[0].T, -1)[:, :-1]
    log_q = F.log_softmax(teacher @ heads[1].T, -1)[:, :-1]
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    expected = ((mixed * forward + (1 - mixed) * reverse) * mask).sum() / total
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == float(loss.detach()) and metrics["num_valid_samples"] == 2
    wanted = torch.autograd.grad(expected, student)[0]
    loss.backward()
    torch.testing.assert_close(student.grad, wanted, rtol=1e-3, atol=1e-5)


def test_a_peer_of_another_version_is_named():
    with pytest.raises(ImportError, match=r"torch must be >=99.0,<100 for this integration, got"):
        peers.require("torch", "99.0", "100")
    with pytest.raises(ImportError, match=r"no-such-peer is not installed: pip install"):
        peers.require("no-such-peer", "1.0", "2")
    peers.require("torch", "2.8", "3")
    with pytest.raises(ImportError, match=r"torch 2.*require takes \['package'"):
        peers.check_parameters("torch", peers.require, ["package", "version"])


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan")])
def test_beta_out_of_range_raises(beta):
    with pytest.raises(ValueError, match="beta must be from 0 to 1"):
        peers.divergence_of(beta)


def test_importing_the_ops_imports_no_trainer():
    code = """
import sys, esr_kernels, esr_kernels.integrations.verl, esr_kernels.integrations.nemo_rl
import esr_kernels.integrations.liger, esr_kernels.integrations.transformers
names = {"trl", "transformers", "accelerate", "liger_kernel", "peft", "verl", "nemo_rl"}
print(sorted(names & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""What a run takes, from the config files of its models alone: parameters, memory, time.

    memory(config, plan).peak         # of an arm's configuration; `dry_run.make_plan` has the plan
    step_seconds(config, plan)        # {"rollout": ..., "teacher": ..., "student": ...}

Parameters are exact: the models are made on the meta device, where tensors have shapes and no
memory. So are the bytes of weights, fp32 masters, AdamW's moments and gradients. Everything else is
a prediction, for a step in which every response is as long as it may be and every prompt as long as
the longest:

    activations    what autograd keeps of the largest micro-batch (`activations`), one layer's share
                   of it again for what lives inside a layer, and the largest gradient before it is
                   added to its sum. With gradient checkpointing: the inputs of all layers, one
                   layer's share, and that gradient
    keys, values   of all prompts and responses, within the budget of tokens in flight
    loss           extra_bytes of `plan_linear_divergence`, and the rows of hidden states
    evaluation     the same of the answers of an evaluation
    peak           weights, masters, moments, and the largest of: training (with the keys and values
                   that a GPU keeps), sampling, evaluation. Without the CUDA context, libraries, and
                   memory lost to fragments
    FLOPs          forward: 2 x parameters x tokens. Backward: 4 x, with frozen weights 2 x; again
                   2 x with gradient checkpointing. Heads count at trained tokens only. The
                   products of attention, and embeddings, are left out
    decoding       a step reads the student's weights and all keys and values so far, or does its
                   FLOPs if that takes longer, after a launch time for each layer
    optimizer      reads and writes gradients, masters and moments: 28 bytes a trained parameter

Rates are the vendors' peaks for dense bf16 times what a good program gets of them: COMPUTE_SHARE,
BANDWIDTH_SHARE. One step on an H100 bears out the first: an update of 64 responses of 1,000 tokens
took 1.43 s where 0.4 of the peak gives 1.31 (docs/gpu.md); one of 100 tokens took four times what
it gives, since the host was slower than the GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_kernels import plan_linear_divergence
from esr_train.activations import saved_bytes
from esr_train.config import EVAL_PROBLEMS, Config
from esr_train.micro_batches import sizes
from esr_train.models import decoder
from esr_train.rollout.decoder import token_bytes
from esr_train.vocabulary import Vocabulary

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
# Seconds a layer of a decoding step on a GPU, whatever it computes: some 40 small kernels in
# transformers' code. Measured on an H100 with CUDA graphs: Qwen2.5-0.5B's and 1.5B's shapes with 64
# rows take 3.55 and 5.31 ms a step (docs/gpu.md); less the bytes of their weights, 127 and 135 us.
_LAUNCH = 130e-6
_KEPT = 2 << 30  # bytes of keys and values up to which they stay allocated on a GPU
_CPU_KEYS = 4 << 30


@dataclass(frozen=True)
class Hardware:
    """Peak rates of one device."""

    name: str
    flops: float  # a second, dense bf16 on a GPU, fp32 on a CPU
    bandwidth: float  # bytes a second
    memory: float  # bytes


# From NVIDIA's data sheets of the SXM parts (HGX for the B200) and AMD's. The CPU's: 90 GFLOP/s a
# thread with AVX2, measured on one machine, and two channels of DDR4.
HARDWARE = {
    "h100": Hardware("NVIDIA H100 SXM 80 GB", 989e12, 3.35e12, 80e9),
    "h200": Hardware("NVIDIA H200 SXM 141 GB", 989e12, 4.8e12, 141e9),
    "a100": Hardware("NVIDIA A100 SXM 80 GB", 312e12, 2.04e12, 80e9),
    "b200": Hardware("NVIDIA B200 180 GB", 2250e12, 8e12, 180e9),
    "mi300x": Hardware("AMD Instinct MI300X 192 GB", 1307e12, 5.3e12, 192e9),
    "cpu": Hardware(
        "this CPU",
        90e9 * torch.get_num_threads(),
        20e9,
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is common to the arms of a run, with models on the meta device."""

    student: Any
    teacher: Any
    shared: bool  # the teacher is made of the student's weights
    vocabulary: Vocabulary
    device: str  # a key of HARDWARE
    prompt: int  # tokens of the longest prompt, of either model
    prompt_known: bool  # or assumed

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.student.get_input_embeddings().weight.dtype
        return found

    def heads(self) -> tuple[Tensor, Tensor]:
        """The weights of both output heads."""
        models = self.student, self.teacher
        first, second = (model.get_output_embeddings().weight for model in models)
        return first, second


@dataclass(frozen=True)
class Memory:
    """Predicted bytes, by kind."""

    weights: int
    masters: int  # fp32 copies of 16-bit weights that are trained
    optimizer: int
    gradients: int
    activations: int
    keys_values: int
    loss: int
    evaluation: int  # keys and values of its answers
    keeps_keys: bool  # keys and values stay allocated while the student is trained

    @property
    def peak(self) -> int:
        resident = self.weights + self.masters + self.optimizer
        training = self.gradients + self.activations + self.loss
        training += self.keys_values if self.keeps_keys else 0
        return resident + max(training, self.keys_values, self.evaluation)


def memory(config: Config, plan: Plan) -> Memory:
    """Bytes by kind of one arm."""
    student, teacher = (list(m.parameters()) for m in (plan.student, plan.teacher))
    trained = [p for p in student if p.requires_grad]
    weights = sum(p.nbytes for p in student)
    if config.teacher.url:
        teacher = []
    elif plan.shared:
        teacher = [p for n, p in plan.teacher.named_parameters() if "lora_" in n]
    elif plan.on_gpu and config.teacher.placement not in (None, "fsdp"):
        teacher = [plan.heads()[1]]  # a copy; the rest is on another device
    weights += sum(p.nbytes for p in teacher)
    masters = sum(4 * p.numel() for p in trained if p.dtype != torch.float32)
    rows = largest_micro_batch(config, plan)
    width = plan.prompt + config.rollout.max_new_tokens
    layers = _layers(plan.student)
    kept = saved_bytes(plan.student, rows, width)
    if config.runtime.gradient_checkpointing:
        dim = plan.heads()[0].shape[1]
        kept = layers * rows * width * dim * plan.dtype.itemsize + kept // layers
    else:
        kept += kept // layers
    largest = max(p.nbytes for p in trained)
    resident = weights + masters + 8 * sum(p.numel() for p in trained)
    free = HARDWARE[plan.device].memory - resident
    budget = max(0, int(free) // 2) if plan.on_gpu else _CPU_KEYS
    token = token_bytes(decoder(plan.student))
    in_flight = config.rollout.max_tokens_in_flight
    most = budget if in_flight is None else in_flight * token
    rollout, answers = (min(tokens * token, most) for tokens in _tokens_with_keys(config, plan))
    return Memory(
        weights=weights,
        masters=masters,
        # Two moments, and a step counter a tensor.
        optimizer=sum(8 * p.numel() + 4 for p in trained),
        gradients=sum(4 * p.numel() for p in trained),
        activations=kept + largest,
        keys_values=rollout,
        loss=_loss_bytes(config, plan),
        evaluation=answers,
        keeps_keys=plan.on_gpu and rollout <= _KEPT,
    )


def _loss_bytes(config: Config, plan: Plan) -> int:
    student, teacher = plan.heads()
    tokens = largest_micro_batch(config, plan) * trained_tokens(config)
    rows = tokens * (2 * student.shape[1] + teacher.shape[1]) * plan.dtype.itemsize
    if config.loss.impl == "reference":
        return rows + 6 * 4 * tokens * plan.vocabulary.classes  # logits, log-probs, gradients
    # A trained fp32 head gets its gradient as a tensor of its own.
    own = student.requires_grad and student.dtype == torch.float32
    return rows + loss_plan(config, plan).extra_bytes + own * student.nbytes


def loss_plan(config: Config, plan: Plan) -> Any:
    """The plan of the divergence for the largest micro-batch."""
    student, teacher = plan.heads()
    divergence = config.loss.divergence
    if divergence == "cross_entropy":  # has one head; a divergence of two is an upper bound
        divergence = "forward_kl"
    return plan_linear_divergence(
        largest_micro_batch(config, plan) * trained_tokens(config),
        plan.vocabulary.classes,
        student.shape[1],
        teacher.shape[1],
        divergence,
        dtype=plan.dtype,
        device="cuda" if plan.on_gpu else "cpu",
        train_weight=student.requires_grad,
        ids=not plan.vocabulary.same_tokens,
        weight_grad=student.requires_grad and student.dtype != torch.float32,
        impl=config.loss.impl,
    )


def step_seconds(config: Config, plan: Plan) -> dict[str, float]:
    """Predicted seconds of one step by phase."""
    hardware, rollout = HARDWARE[plan.device], config.rollout
    flops = COMPUTE_SHARE * hardware.flops
    bandwidth = BANDWIDTH_SHARE * hardware.bandwidth
    responses, length = rollout.prompts * rollout.samples, rollout.max_new_tokens
    rows = responses * (plan.prompt + length)
    trained = responses * trained_tokens(config)
    heads = [head.numel() for head in plan.heads()]
    bodies = [_body(model) for model in (plan.student, plan.teacher)]

    prefill = 2 * bodies[0] * rollout.prompts * plan.prompt / flops
    token = token_bytes(decoder(plan.student))
    wanted, _ = _tokens_with_keys(config, plan)
    waves = max(1.0, wanted * token / max(1, memory(config, plan).keys_values))
    read = (bodies[0] + heads[0]) * plan.dtype.itemsize * waves
    read += (rollout.prompts * plan.prompt + responses * length / 2) * token
    step = max(read / bandwidth, 2 * (bodies[0] + heads[0]) * responses / flops)
    step += _LAUNCH * _layers(plan.student) * waves if plan.on_gpu else 0.0

    count = sum(p.numel() for p in plan.student.parameters() if p.requires_grad)
    again = 2 if config.runtime.gradient_checkpointing else 0
    backward = 2 if config.student.lora else 4
    head_passes = 6 if plan.heads()[0].requires_grad else 4
    student = (2 + backward + again) * bodies[0] * rows + head_passes * heads[0] * trained
    of_teacher = 0 if config.teacher.url else 2 * heads[1] * trained
    return {
        "rollout": prefill + length * step,
        # Of a teacher on a server nothing is known but that it takes none of this machine's time.
        "teacher": 0.0 if config.teacher.url else 2 * bodies[1] * rows / flops,
        "student": (student + of_teacher) / flops + 28 * count / bandwidth,
    }


def trained_tokens(config: Config) -> int:
    """Tokens of a response that are trained on, at most."""
    length = config.rollout.max_new_tokens
    return min(config.loss.window_tokens or length, length)


def largest_micro_batch(config: Config, plan: Plan) -> int:
    """Responses in the largest micro-batch."""
    width = plan.prompt + config.rollout.max_new_tokens
    return max(sizes([width] * (config.rollout.prompts * config.rollout.samples), config.optim))


def _tokens_with_keys(config: Config, plan: Plan) -> tuple[int, int]:
    """Of a rollout, and of an evaluation's sampled answers or, without any, its greedy ones."""
    rollout, evaluation = config.rollout, config.eval
    sampled = rollout.prompts * (plan.prompt + rollout.samples * (rollout.max_new_tokens - 1))
    if not evaluation.every:
        return sampled, 0
    problems = evaluation.problems or EVAL_PROBLEMS
    answers = max(1, evaluation.samples) * (evaluation.max_new_tokens - 1)
    return sampled, problems * (plan.prompt + answers)


def _layers(model: Any) -> int:
    count: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return count


def _body(model: Any) -> int:
    """Parameters of the decoder's products: not of embeddings."""
    embedding = model.get_input_embeddings().weight
    return sum(p.numel() for p in decoder(model).parameters() if p is not embedding)

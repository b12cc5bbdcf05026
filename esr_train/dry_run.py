"""`--dry-run`: what a run takes, and what it would be refused for, without weights.

    print(describe(config, on="h100"))

Configs and tokenizers of the models are read, and data that is on this machine. `estimate` has the
formulas.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from esr_train.config import EVAL_PROBLEMS, Config, ConfigError, arm_config
from esr_train.data import PromptStream, TokenizedTask
from esr_train.estimate import (
    HARDWARE,
    Plan,
    largest_micro_batch,
    loss_plan,
    memory,
    step_seconds,
    trained_tokens,
)
from esr_train.evaluate import heldout_problems
from esr_train.grading import load_grader
from esr_train.loss import check_divergence
from esr_train.models import DTYPES, ModelError, decoder, load_tokenizer, max_positions, meta_pair
from esr_train.progress import duration
from esr_train.rollout import ContextError
from esr_train.tasks import load_task
from esr_train.tasks.dataset import is_dataset
from esr_train.tracking import check_trackers
from esr_train.vocabulary import Vocabulary, shared_vocabulary

ASSUMED_PROMPT = 256  # tokens, where the data is on the hub and is not read
_GIB = 2**30


def describe(config: Config, on: str | None = None) -> str:
    """The estimates of every arm as text; `on` is a key of HARDWARE, None this machine.

    Raises:
        AdapterError, ConfigError, ContextError, ModelError: what the run would be refused for, as
            far as configs, tokenizers and local data can tell.
    """
    plan = make_plan(config, on)
    prompt = "the longest of the data" if plan.prompt_known else "an assumption: data not read"
    lines = [
        f"predicted for {HARDWARE[plan.device].name}, {plan.dtype}, if every response is as long "
        f"as it may be; prompts of {plan.prompt} tokens ({prompt})"
    ]
    for who, model in (("student", plan.student), ("teacher", plan.teacher)):
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        what = f"{count:,} parameters"
        if who == "student":
            what += f", {trained:,} trained" + (" (LoRA)" if config.student.lora else "")
        elif config.teacher.url:
            what = f"at {config.teacher.url}, which is not asked now: its time is not in these"
        elif plan.shared:
            what += ", of which the student's are shared"
        elif config.teacher.placement == "fsdp":
            what += "; in parts on several processes, while these numbers are of one with all of it"
        elif config.teacher.placement:
            what += f"; on {config.teacher.placement}, in these times as fast as here"
        lines.append(f"{who}: {type(decoder(model)).__name__}, {what}")
    if plan.vocabulary.note:
        lines.append(plan.vocabulary.note)
    for arm in config.arms or [{"name": "train"}]:
        lines += ["", *_arm(str(arm["name"]), arm_config(config, arm), plan, len(config.seeds))]
    if config.eval.every:
        lines.append(
            f"\nevaluation every {config.eval.every} steps, not in these times: "
            f"{config.eval.problems or f'up to {EVAL_PROBLEMS}'} problems, answers of at most "
            f"{config.eval.max_new_tokens} tokens, {config.eval.teacher_text} tokens of teacher "
            "text each"
        )
    return "\n".join(lines)


def _arm(name: str, config: Config, plan: Plan, seeds: int) -> list[str]:
    rollout, steps = config.rollout, config.steps
    responses = rollout.prompts * rollout.samples
    sampled, trained = responses * rollout.max_new_tokens, responses * trained_tokens(config)
    found, seconds = memory(config, plan), step_seconds(config, plan)
    parts = ", ".join(
        f"{field.name.replace('_', ' and ')} {getattr(found, field.name) / _GIB:.2f}"
        for field in fields(found)
        if field.name != "keeps_keys"
    )
    limit, peak = HARDWARE[plan.device].memory, found.peak
    rows = largest_micro_batch(config, plan)
    phases = ", ".join(f"{phase} {value:.3g}" for phase, value in seconds.items())
    total = sum(seconds.values())
    return [
        f"{name}: {steps} steps{f' x {seeds} seeds' if seeds > 1 else ''}; a step samples at most "
        f"{sampled:,} tokens ({responses} responses x {rollout.max_new_tokens}) and trains on at "
        f"most {trained:,}; at most {sampled * steps:,} sampled in a run",
        f"  predicted GiB: {parts}; peak {peak / _GIB:.2f} of {limit / _GIB:.0f}"
        + (": DOES NOT FIT" if peak > limit else ""),
        f"  micro-batches of {rows} x {plan.prompt + rollout.max_new_tokens} tokens",
        f"  loss: {_first_line(config, plan)}",
        f"  predicted seconds a step: {total:.3g} ({phases}); {duration(total * steps)} for "
        f"{steps} steps",
    ]


def _first_line(config: Config, plan: Plan) -> str:
    if config.loss.impl == "reference":
        return "plain PyTorch, all logits at once"
    if config.teacher.url:
        return f"of {config.teacher.logprobs} log-probs a token, from teacher.url"
    return str(loss_plan(config, plan)).splitlines()[0]


def make_plan(config: Config, on: str | None = None) -> Plan:
    """Read configs, tokenizers and local data, and check them against each other."""
    check_divergence(config.loss)
    check_trackers(config.tracking)
    device = on or _at_hand()
    dtype = config.runtime.dtype
    dtype = dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    tokenizers = [load_tokenizer(spec, config.runtime) for spec in (config.student, config.teacher)]
    student, teacher, shared = meta_pair(config, DTYPES[dtype])
    for model in (student, teacher):
        layer = model.get_output_embeddings()
        if layer is None:
            raise ModelError(f"{type(model).__name__} has no output head")
        if any("lora_" in name for name, _ in layer.named_parameters()):
            raise ModelError("student.lora: the head cannot be adapted; leave it out of modules")
    rows = len(student.get_output_embeddings().weight), len(teacher.get_output_embeddings().weight)
    vocabulary = shared_vocabulary(tokenizers[0], tokenizers[1], rows)
    if config.teacher.url:
        from esr_train.remote.teacher import check_served_teacher  # nothing of it without a server

        check_served_teacher(config, vocabulary, rows[1])
    longest = _longest_prompt(config, tokenizers, vocabulary)
    prompt = ASSUMED_PROMPT if longest is None else longest
    known = longest is not None
    plan = Plan(student, teacher, shared, vocabulary, device, prompt, known)
    for arm in config.arms or [{"name": "train"}]:
        _check_context(arm_config(config, arm), plan)
    return plan


def _at_hand() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    for key in HARDWARE:
        if key in name:
            return key
    raise ConfigError(f"--on: {name!r} is not in the table; name one of {', '.join(HARDWARE)}")


def _longest_prompt(config: Config, tokenizers: list[Any], vocabulary: Vocabulary) -> int | None:
    """Tokens of the longest prompt that training may see; None for data that is on the hub."""
    data = config.data
    if is_dataset(data.task) and Path(data.task).suffix not in (".jsonl", ".json", ".parquet"):
        if data.grader:
            load_grader(data.grader, data.allow_code)
        return None
    task = load_task(data)
    if config.eval.every:
        heldout_problems(task, config.eval)
    tokenized = TokenizedTask(task, tokenizers[0], data, tokenizers[1], vocabulary.same_tokens)
    longest = 0
    rollout = config.rollout
    stream = PromptStream(tokenized, rollout.prompts, config.seeds[0], rollout.pool)
    for problem in stream.problems:
        own = tokenized.teacher_ids(problem) or []
        longest = max(longest, len(tokenized.ids(problem)), len(own))
    return longest


def _check_context(config: Config, plan: Plan) -> None:
    wanted = {"rollout": config.rollout.max_new_tokens}
    if config.eval.every:
        wanted["eval"] = config.eval.max_new_tokens
    for who, model in (("student", plan.student), ("teacher", plan.teacher)):
        limit = max_positions(model)
        for section, length in wanted.items():
            if who == "teacher" and section == "eval":
                length = config.eval.teacher_text
            if limit is not None and plan.prompt + length > limit:
                raise ContextError(
                    f"context overflow: {section} with {length} new tokens after a prompt of "
                    f"{plan.prompt} exceeds the {who}'s {limit}"
                )

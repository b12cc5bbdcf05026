"""Language models that are Markov chains: what a diagnostic must find follows from their tables.

The next token depends on the last one alone. A Llama does that whose layers add nothing and whose
embedding is one-hot: then its logits are a row of the head, and the head is the table of log-probs.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from esr_train.config import Config
from tests.tiny import char_tokenizer, tiny_llama

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
EOS = "."  # in tables; the token <eos>, id 0
_NEVER = -30.0  # log-prob up to the normaliser: 1e-13
_SIZE = 32

Table = dict[str, dict[str, float]]  # probabilities of the next character


def save_chain(directory: Path, table: Table, end: str | None = None) -> str:
    """A model with these probabilities; what is not in the table ends the answer.

    `end`: a character that ends this model's answers in place of <eos>.
    """
    model = tiny_llama(
        0, hidden_size=_SIZE, vocab_size=_SIZE, num_hidden_layers=1, tie_word_embeddings=False
    )
    logits = torch.full((_SIZE, _SIZE), _NEVER)
    stop = 0 if end is None else _id(end)
    logits[:, stop] = 0.0
    for last, row in table.items():
        logits[_id(last)] = _NEVER
        for character, p in row.items():
            target = stop if character == EOS else _id(character)
            logits[_id(last), target] = math.log(p)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            if "norm" in name:
                parameter.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(_SIZE))
        # The norm of a one-hot state makes it sqrt(size).
        model.get_output_embeddings().weight.copy_(logits.T / math.sqrt(_SIZE))
    model.config.eos_token_id = model.generation_config.eos_token_id = stop
    model.save_pretrained(directory)
    tokenizer = char_tokenizer(ALPHABET)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    tokenizer.save_pretrained(directory)
    return str(directory)


def _id(character: str) -> int:
    return 2 + ALPHABET.index(character)


def kl(p: dict[str, float], q: dict[str, float]) -> float:
    """KL(p || q) of rows that have the same characters."""
    return sum(x * math.log(x / q[c]) for c, x in p.items())


def path(text: str) -> Table:
    """Each character of `text` is followed by the next one, the last by the end."""
    return {a: {b: 1.0} for a, b in zip(text, text[1:] + EOS, strict=True)}


def grade(response: str, answer: str) -> dict[str, float]:
    """Accuracy 1.0 where the answer has this character in it."""
    return {"accuracy": float(answer in response)}


def chain_config(root: Path, student: Table, teacher: Table, **diagnose: Any) -> Config:
    """A configuration whose prompts differ, and all end with "a"; an answer with "g" is right."""
    ends = {"student": diagnose.pop("student_end", None), "teacher": diagnose.pop("end", None)}
    rows = [
        json.dumps({"prompt": f"{x}{y}a", "answer": "g"}) + "\n"
        for x in ALPHABET[16:]
        for y in ALPHABET[16:]
    ]
    train, heldout = root / "train.jsonl", root / "heldout.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    train.write_text("".join(rows[:20]))
    heldout.write_text("".join(rows[20:]))
    saved = {
        who: save_chain(root / who, table, ends[who])
        for who, table in (("student", student), ("teacher", teacher))
    }
    return Config.model_validate(
        {
            "student": {"model": saved["student"]},
            "teacher": {"model": saved["teacher"]},
            "data": {
                "task": str(train),
                "heldout": str(heldout),
                "answer": "answer",
                "grader": "tests.diagnose.chains:grade",
                "chat": False,
            },
            "rollout": {"prompts": 4, "max_new_tokens": 3},
            "optim": {"lr": 1e-3},
            "eval": {"max_new_tokens": 12},
            "diagnose": {"prefixes": [1, 2, 4], "problems": 10} | diagnose,
            "steps": 1,
        }
    )


def page_problems(page: Path) -> list[str]:
    """What keeps a page from being shown offline: resources of a network, files that are missing,
    scripts, images that are no PNG."""
    text = page.read_text(encoding="utf-8")
    found = []
    for source in re.findall(r"<(?:img|iframe|video|audio|source|embed)[^>]*?src=\"(.*?)\"", text):
        if source.startswith("data:image/png;base64,iVBORw0KGgo"):
            continue
        if re.match(r"[a-z]+:", source) or not (page.parent / source).is_file():
            found.append(source[:60])
    outside = re.sub(r"base64,[^\"]+", "", text)
    return found + re.findall(r"https?://\S+|url\(.*?\)|<script.*?>|<link.*?>|@import.*?;", outside)

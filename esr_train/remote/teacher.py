"""A teacher on a server, known by the log-probs of its most probable tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError
from esr_train.remote.client import Server
from esr_train.remote.rollouts import RemoteRollout
from esr_train.teacher import Sequences
from esr_train.vocabulary import Vocabulary

_Known = dict[int, float]  # log-probs by token id


@dataclass(frozen=True)
class TopLogprobs:
    """What a teacher says at T positions: `linear_topk_divergence` takes it as it is."""

    ids: Tensor  # [T, K + 1] int64; -1 where there are fewer
    logprobs: Tensor  # [T, K + 1] fp32, over the teacher's whole vocabulary


def remote_teacher(config: Config, vocabulary: Vocabulary, stop_ids: list[int]) -> RemoteTeacher:
    """The teacher at `teacher.url`.

    Raises:
        ConfigError: its tokens are not the student's.
        ServerError: its server does not answer.
    """
    spec = config.teacher
    assert spec.url is not None
    if not vocabulary.same_tokens:
        raise ConfigError(
            f"teacher.url: got {spec.url!r}, must be null where the teacher has another tokenizer: "
            "what is known of its tokens says nothing of the student's"
        )
    server = Server("teacher.url", spec.url, spec.model, config.runtime)
    # One token is sampled beside what is scored.
    rollout = RemoteRollout(server, vocabulary.classes, stop_ids, spare=1)
    return RemoteTeacher(rollout, spec.logprobs)


class RemoteTeacher:
    """The teacher of a server, which has the student's tokenizer.

    Args:
        rollout: samples its text.
        count: K, the most probable tokens that are asked for. The token that is there is known as
            well, as one more where it is not among them.
    """

    def __init__(self, rollout: RemoteRollout, count: int) -> None:
        self.rollout, self.server = rollout, rollout.server
        self.model = torch.nn.Module()  # its parameters are elsewhere: none
        self.count = min(count, rollout.classes)
        self._of_position = _sglang if self.server.kind == "sglang" else _vllm

    def top(self, read: Sequences) -> TopLogprobs:
        """The log-probs at the rows of a batch; a sequence without rows is not sent.

        A token beyond the classes that student and teacher share is left out, so that its
        probability counts as that of a token which is not among the first K.

        Raises:
            ServerError: no answer, or one that has not what was asked for.
        """
        width, ids = read.ids.shape[1], read.ids.cpu()
        row, position = (read.rows // width).cpu(), (read.rows % width).cpu()
        wanted = [position[row == number].tolist() for number in range(len(ids))]
        # Row t is the prediction of the token after it. What follows the last one changes nothing.
        texts = [ids[n, : max(at) + 2].tolist() for n, at in enumerate(wanted) if at]
        places = [[place + 1 for place in at] for at in wanted if at]
        found = self.server.each(self._ask, zip(texts, places, strict=True))
        rows = [known for of_text in found for known in of_text]
        shape = len(rows), self.count + 1
        out = torch.full(shape, -1, dtype=torch.int64), torch.full(shape, -torch.inf)
        for number, known in enumerate(rows):
            out[0][number, : len(known)] = torch.tensor(list(known), dtype=torch.int64)
            out[1][number, : len(known)] = torch.tensor(list(known.values()))
        return TopLogprobs(*(tensor.to(read.ids.device) for tensor in out))

    def _ask(self, asked: tuple[list[int], list[int]]) -> list[_Known]:
        """What is known at places of a text."""
        text, places = asked
        path, body, read = self._of_position(text, self.count)
        what = f"the {self.count} largest log-probs at {len(places)} of {len(text)} tokens"
        answer = self.server.post(path, body, what)
        try:
            found = dict(enumerate(read(answer)))
            return [self._checked(path, found[place], text[place]) for place in places]
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            field = "prompt_logprobs" if read is _vllm_answer else "meta_info.input_top_logprobs"
            raise self.server.error(
                path,
                f"has no log-probs of given tokens ({type(error).__name__}: {error}); asked for "
                f"{field} of {len(text)} tokens. vLLM and SGLang have them",
            ) from error

    def _checked(self, path: str, known: _Known, token: int) -> _Known:
        if token not in known:
            raise self.server.error(path, f"is of other tokens: {token} is not at its place")
        if len(known) < self.count:
            raise self.server.error(
                path,
                f"has {len(known)} log-probs at a place, asked for teacher.logprobs={self.count}; "
                "vLLM's limit is --max-logprobs",
            )
        values = known.values()
        bad = [v for v in values if not isinstance(v, (int, float)) or not -math.inf < v < 1e-3]
        mass = sum(map(math.exp, values)) if not bad else 0.0
        if bad or mass > 1 + 1e-3 or len(known) > self.count + 1:
            said = f"{bad[0]}" if bad else f"{len(known)} with a mass of {mass:.4f}"
            raise self.server.error(path, f"has no log-probs: {said}")
        return {token: value for token, value in known.items() if token < self.rollout.classes}


def _vllm(text: list[int], count: int) -> tuple[str, dict[str, Any], Any]:
    """vLLM's fields of the completions API. It must sample a token, which is not used."""
    body = {"prompt": text, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": count}
    return "/v1/completions", body, _vllm_answer


def _vllm_answer(answer: dict[str, Any]) -> Iterator[_Known]:
    """Of each token of the text; nothing is known of the first."""
    for known in answer["choices"][0]["prompt_logprobs"]:
        yield {int(token): entry["logprob"] for token, entry in (known or {}).items()}


def _sglang(text: list[int], count: int) -> tuple[str, dict[str, Any], Any]:
    """SGLang's own API: its completions have log-probs of a prompt by text, not by id."""
    body = {
        "input_ids": text,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": count,
    }
    return "/generate", body, _sglang_answer


def _sglang_answer(answer: dict[str, Any]) -> Iterator[_Known]:
    info = answer["meta_info"]
    tokens, tops = info["input_token_logprobs"], info["input_top_logprobs"]
    for (value, token, *_), top in zip(tokens, tops, strict=True):
        yield {**{entry[1]: entry[0] for entry in top or ()}, token: value}

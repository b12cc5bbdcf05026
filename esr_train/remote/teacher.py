"""A teacher on a server, known by the log-probs of its most probable tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError
from esr_train.remote.client import Server, short
from esr_train.remote.rollouts import RemoteRollout
from esr_train.teacher import Sequences
from esr_train.vocabulary import Vocabulary

_Known = dict[int, float]  # log-probs by token id


@dataclass(frozen=True)
class TopLogprobs:
    """What a teacher says at T positions: `linear_topk_divergence` takes it as it is."""

    ids: Tensor  # [T, K + 1] int64; -1 where there are fewer
    logprobs: Tensor  # [T, K + 1] fp32, over the teacher's whole vocabulary


def check_served_teacher(config: Config, vocabulary: Vocabulary, size: int) -> None:
    """Raise ConfigError unless a server's log-probs of tokens can be those of the teacher, which
    has `size` of them."""
    spec = config.teacher
    if not vocabulary.same_tokens:
        raise ConfigError(
            f"teacher.url: got {spec.url!r}, must be null where teacher.model, {spec.model!r}, has "
            f"another tokenizer than student.model, {config.student.model!r}: what is known of its "
            "tokens says nothing of the student's"
        )
    if spec.logprobs > size:
        raise ConfigError(
            f"teacher.logprobs: got {spec.logprobs}, must be at most {size}, the vocabulary of "
            f"teacher.model, {spec.model!r}"
        )


def remote_teacher(
    config: Config, vocabulary: Vocabulary, stop_ids: list[int], size: int
) -> RemoteTeacher:
    """The teacher at `teacher.url`, which has `size` tokens.

    Raises:
        ConfigError: its tokens are not the student's, or fewer than are asked for; its server has
            no model of its name.
        ServerError: its server does not answer.
    """
    spec = config.teacher
    assert spec.url is not None
    check_served_teacher(config, vocabulary, size)
    server = Server("teacher.url", spec.url, spec.model, config.runtime, spec.served_name)
    # One token is sampled beside what is scored.
    rollout = RemoteRollout(server, vocabulary.classes, stop_ids, spare=1)
    return RemoteTeacher(rollout, spec.logprobs, size)


class _MissingField(Exception):
    """The name of a field that an answer has not."""


class RemoteTeacher:
    """The teacher of a server, which has the student's tokenizer.

    Args:
        rollout: samples its text.
        count: K, the most probable tokens that are asked for. The token that is there is known as
            well, as one more where it is not among them.
        size: of its vocabulary; the server names no other tokens.
    """

    def __init__(self, rollout: RemoteRollout, count: int, size: int) -> None:
        self.rollout, self.server = rollout, rollout.server
        self.model = torch.nn.Module()  # its parameters are elsewhere: none
        self.count, self.size = count, size
        self._of_position = _sglang if self.server.kind == "sglang" else _vllm

    def probe(self) -> None:
        """Ask for what `top` asks for, of two tokens: a server that does not give it is found
        before any work.

        Raises:
            ServerError: as `top`.
        """
        self._ask(([0, 0], [1]))

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
        what = f"teacher.logprobs={self.count} at {len(places)} of {len(text)} tokens"
        answer = self.server.post(path, body, what)
        try:
            found = list(read(answer))
        except _MissingField as error:
            raise self.server.error(
                path, f"has no {error}: no log-probs of given tokens. vLLM and SGLang have them"
            ) from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self.server.error(
                path, f"has log-probs of given tokens in an unknown form: {short(answer)}"
            ) from error
        if len(found) < len(text):
            raise self.server.error(
                path, f"has log-probs at {len(found)} places, asked for {len(text)}"
            )
        return [self._checked(path, found[place], text[place]) for place in places]

    def _checked(self, path: str, known: _Known, token: int) -> _Known:
        if token not in known:
            raise self.server.error(path, f"is of other tokens: {token} is not at its place")
        other = [index for index in known if not 0 <= index < self.size]
        if other:
            raise self.server.error(
                path,
                f"names token {other[0]}, and teacher.model has {self.size} tokens: the server has "
                "another model",
            )
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
    for known in _field(answer, "choices", 0, "prompt_logprobs"):
        yield {int(index): _field(entry, "logprob") for index, entry in (known or {}).items()}


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
    tokens, tops = (
        _field(answer, "meta_info", name) for name in ("input_token_logprobs", "input_top_logprobs")
    )
    for (value, token, *_), top in zip(tokens, tops, strict=True):
        yield {**{int(entry[1]): entry[0] for entry in top or ()}, int(token): value}


def _field(value: Any, *path: str | int) -> Any:
    name = ""
    for key in path:
        name += f"[{key}]" if isinstance(key, int) else f".{key}"
        try:
            value = value[key]
        except (LookupError, TypeError):
            value = None
        if value is None:
            raise _MissingField(name.removeprefix("."))
    return value

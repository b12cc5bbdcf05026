"""Answers that a server samples, as token ids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config
from esr_train.data import seed_from
from esr_train.remote.client import Server
from esr_train.rollout import ContextError, RolloutBatch

_PATH = "/v1/completions"


def remote_rollout(config: Config, own: Any) -> RemoteRollout:
    """What samples at `rollout.url` in place of `own`, this process's engine of the same model.

    Raises:
        ServerError: the server does not answer.
        ConfigError: it has no model of that name.
    """
    spec = config.teacher if config.rollout.source == "teacher" else config.student
    rollout = config.rollout
    assert rollout.url is not None
    server = Server("rollout.url", rollout.url, spec.model, config.runtime, rollout.served_name)
    return RemoteRollout(server, own.classes, own.stop_ids)


class RemoteRollout:
    """Samples with the model of a server, in place of a `PrefixRollout`.

    A request is one response, with a seed of its own: whether a server repeats a sample is the
    server's affair. Weights are never sent: the model is frozen.

    Args:
        classes: token ids are below it.
        stop_ids: end a response.
        spare: tokens of the context that are not for prompts and responses.
    """

    model = None  # the weights are not here

    def __init__(self, server: Server, classes: int, stop_ids: list[int], spare: int = 0) -> None:
        self.server, self.classes, self.stop_ids, self.spare = server, classes, stop_ids, spare

    def check_fits(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise ContextError if a prompt is empty or exceeds the server's context together with its
        response."""
        if not prompts or min(map(len, prompts)) == 0:
            raise ContextError("prompts: at least one is needed, and none may be empty")
        longest, limit = max(map(len, prompts)), self.server.max_tokens
        if limit is not None and longest + max_new_tokens + self.spare > limit:
            spare = f" and {self.spare} beside them" if self.spare else ""
            raise ContextError(
                f"context overflow: the longest prompt has {longest} tokens, and with "
                f"{max_new_tokens} new ones{spare} exceeds the {limit} of {self.server.key}, "
                f"{self.server}. Lower rollout.max_new_tokens, take shorter prompts (data), or "
                "start the server with more (vLLM: --max-model-len, SGLang: --context-length)"
            )

    def generate(
        self,
        prompts_token_ids: list[list[int]],
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        seed_key: tuple[int | str, ...],
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        row_keys: Tensor | None = None,
        max_tokens_in_flight: int | None = None,
    ) -> RolloutBatch:
        """As `PrefixRollout.generate`; the server decides how many tokens are in flight.

        Log-probs are kept where temperature is 1, or 0 for greedy, and nothing is filtered: at
        others servers differ in what they return.

        Raises:
            ContextError: before any request.
            ServerError: no answer, or one that is no response to a prompt.
        """
        self.check_fits(prompts_token_ids, max_new_tokens)
        prompts = [prompt for prompt in prompts_token_ids for _ in range(samples_per_prompt)]
        keys = torch.arange(len(prompts)) if row_keys is None else row_keys
        common = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            # All that a server would else take from the model's generation config.
            "top_k": top_k or -1,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.stop_ids,
            "return_token_ids": True,
            "logprobs": 1,
        }

        def sample(row: int) -> tuple[list[int], list[float], bool]:
            seed = seed_from(*seed_key, "row", int(keys[row])) % 2**31
            body = {**common, "prompt": prompts[row], "seed": seed}
            what = f"{max_new_tokens} tokens after a prompt of {len(prompts[row])}"
            return self._response(self.server.post(_PATH, body, what), max_new_tokens)

        tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64)
        logprob = torch.zeros(tokens.shape)
        answers = self.server.each(sample, range(len(prompts)))
        for row, (ids, values, _) in enumerate(answers):
            tokens[row, : len(ids)] = torch.tensor(ids)
            logprob[row, : len(ids)] = torch.tensor(values)
        ended = torch.tensor([end for *_, end in answers])
        lengths = torch.tensor([len(ids) for ids, *_ in answers])
        plain = temperature in (0, 1) and (top_k, top_p, min_p) == (0, 1.0, 0.0)
        return RolloutBatch(
            prompts,
            tokens,
            lengths,
            ended,
            logprob if plain else None,
            torch.zeros_like(logprob) if plain else None,
            keys,
            torch.where(ended, tokens[torch.arange(len(prompts)), lengths - 1], -1),
        )

    def _response(self, answer: dict[str, Any], limit: int) -> tuple[list[int], list[float], bool]:
        """Token ids, their log-probs, and whether the model ended the response, checked."""
        try:
            (choice,) = answer["choices"]
            reason, ids = choice["finish_reason"], choice["token_ids"]
            values = choice["logprobs"]["token_logprobs"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(
                "has not one choice with finish_reason, token_ids and logprobs.token_logprobs "
                "(vLLM has token_ids since 0.10.2)"
            ) from error
        if not isinstance(ids, list) or not all(
            type(token) is int and 0 <= token < self.classes for token in ids
        ):
            raise self._bad(f"has token_ids that are not from 0 to {self.classes - 1}: {ids}")
        if not 1 <= len(ids) <= limit:
            raise self._bad(f"has {len(ids)} token_ids, asked for 1 to {limit}")
        if (
            not isinstance(values, list)
            or len(values) != len(ids)
            or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        ):
            raise self._bad(f"has not a log-prob for each of {len(ids)} token_ids: {values}")
        ended = ids[-1] in self.stop_ids
        cut = reason == "length" and len(ids) == limit
        if reason not in ("stop", "length") or not (ended or cut):
            raise self._bad(
                f"ends after {len(ids)} of {limit} tokens with {ids[-1]}, finish_reason "
                f"{reason!r}; the tokens that end an answer here are {self.stop_ids}"
            )
        early = [token for token in ids[:-1] if token in self.stop_ids]
        if early:
            raise self._bad(f"goes on after {early[0]}, which ends an answer here")
        return ids, values, ended

    def _bad(self, problem: str) -> Exception:
        return self.server.error(_PATH, problem)

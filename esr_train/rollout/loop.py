"""The loop of a rollout: draw a token for each row, feed it, retire rows that have ended.

A step reads and writes tensors that keep their addresses, those of `Lanes`, so that it can be
captured once and replayed in every rollout of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esr_kernels import SampleKeys, SamplingParams, sample_from_hidden
from esr_train.models import Head
from esr_train.rollout.batch import RolloutBatch
from esr_train.rollout.cache import Shape, copy_entries
from esr_train.rollout.decoder import Decoder
from esr_train.rollout.graphs import StepGraphs
from esr_train.rollout.waves import Rows

# On CUDA the host reads which rows have ended once in so many steps. It reads a copy that was
# queued at the previous read, so it never waits for the step that it has just queued.
_POLL_EVERY = 8
# Fewer steps than this are not worth moving rows on CUDA.
_LEAST_STEPS = 16

_PARAMS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
}


@dataclass(frozen=True)
class Requests:
    """What is asked of a rollout; response r belongs to prompt r // samples."""

    prompts: list[list[int]]
    samples: int
    max_new_tokens: int
    params: dict[str, Any]  # of SamplingParams: numbers, or tensors [R] on the device
    row_keys: Tensor  # [R] int64 on the device
    seed: int

    @property
    def responses(self) -> int:
        return len(self.prompts) * self.samples


def in_parts(requests: Requests, budget: int) -> list[Requests]:
    """Requests to be decoded one after the other where prompts are not shared: every response takes
    the longest prompt and its own tokens."""
    each = max(map(len, requests.prompts)) + requests.max_new_tokens - 1
    fit = budget // each
    if fit < 1:
        raise ValueError(
            f"max_tokens_in_flight must be at least {each}, the longest prompt and its response, "
            f"got {budget}"
        )
    samples = min(requests.samples, fit)
    prompts = fit // samples
    if prompts >= len(requests.prompts) and samples == requests.samples:
        return [requests]
    parts = []
    for first in range(0, len(requests.prompts), prompts):
        chosen = torch.arange(first, min(first + prompts, len(requests.prompts)))
        for start in range(0, requests.samples, samples):
            number = torch.arange(start, min(start + samples, requests.samples))
            rows = (chosen[:, None] * requests.samples + number).flatten()
            rows = rows.to(requests.row_keys.device)
            params = {
                name: value[rows] if isinstance(value, Tensor) else value
                for name, value in requests.params.items()
            }
            part = [requests.prompts[prompt] for prompt in chosen.tolist()]
            keys = requests.row_keys[rows]
            parts.append(
                replace(requests, prompts=part, samples=len(number), params=params, row_keys=keys)
            )
    return parts


class Lanes:
    """The tensors of a rollout, which outlive it: the decoder's, an entry for each row that is
    decoded, and an entry for each response of the rollout."""

    def __init__(
        self, decoder: type[Decoder], model: nn.Module, shape: Shape, responses: int, length: int
    ) -> None:
        self.shape, self.length = shape, length
        self.decoder = decoder(model, shape)
        self.device = device = next(model.parameters()).device

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        rows = shape.rows
        self.seed = zeros(1)
        self.response, self.key, self.token = zeros(rows), zeros(rows), zeros(rows)
        self.step = zeros(rows)  # tokens drawn before the one that is drawn next
        self.alive = zeros(rows, dtype=torch.bool)
        self.params = {name: zeros(rows, dtype=dtype) for name, dtype in _PARAMS.items()}
        # The last column takes what rows draw that have ended.
        self.tokens = zeros(responses, length + 1)
        self.logprob = zeros(responses, length + 1, dtype=torch.float32)
        self.log_kept = zeros(responses, length + 1, dtype=torch.float32)

    @property
    def per_row(self) -> list[Tensor]:
        return [self.response, self.key, self.token, self.step, self.alive, *self.params.values()]

    @property
    def bytes(self) -> int:
        own = (self.tokens, self.logprob, self.log_kept)
        return self.decoder.kv_bytes + sum(t.numel() * t.element_size() for t in own)

    def reset(self) -> None:
        """Make the tensors those of new lanes."""
        self.decoder.reset()
        for tensor in (self.tokens, self.logprob, self.log_kept, *self.per_row):
            tensor.zero_()


class Sampling:
    """One rollout over some lanes."""

    def __init__(
        self,
        lanes: Lanes,
        rows: Rows,
        requests: Requests,
        head: Head,
        classes: int,
        stops: Tensor,
        graphs: StepGraphs,
    ) -> None:
        self.lanes, self.rows, self.requests = lanes, rows, requests
        self.head, self.classes, self.stops, self.graphs = head, classes, stops, graphs
        seed = requests.seed & 0xFFFFFFFFFFFFFFFF
        lanes.seed.fill_(seed - (1 << 64) if seed >> 63 else seed)
        # A captured step has numbers as they were, and reads tensors.
        self.numbers = {n: v for n, v in requests.params.items() if not isinstance(v, Tensor)}
        self.kv_bytes = 0  # after the first prefill
        self.ends: Tensor | None = None  # [P, D], hidden states at the ends of prompts
        self.entered_at = [0] * lanes.shape.rows  # the tick at which each row's response entered

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> RolloutBatch:
        """Sample all responses."""
        rows, on_cuda = self.rows, self.lanes.device.type == "cuda"
        captured = self.graphs.recorder is not None
        last = self.requests.max_new_tokens - 1  # steps after which a response is cut
        tick = 0
        # Work spent on ended rows since the last change, in steps of all rows.
        wasted = 0.0
        self._enter(tick)
        watch = _Watch(on_cuda)
        while True:
            size = len(rows.row)
            alive = watch.look(self.lanes.alive[:size])
            cut = [row for row in rows.live if tick - self.entered_at[row] >= last]
            if alive is not None:
                ended = alive.logical_not().nonzero()[:, 0].tolist()
                rows.retire([*ended, *cut])
                if on_progress and (tick < last or rows.waiting):
                    on_progress(tick + 1, len(rows.live) + rows.waiting)
            elif cut:
                rows.retire(cut)
            if rows.should_enter():
                self._enter(tick)
                watch, wasted = _Watch(on_cuda), 0.0
                continue
            if not rows.live:
                break
            if alive is not None and not rows.waiting:
                gone = 1 - len(rows.live) / size
                wasted += gone
                left = last - (tick - max(self.entered_at[row] for row in rows.live))
                if rows.fitting() < size and _should_shrink(gone, wasted, left, captured):
                    self._shrink(rows.fitting())
                    watch, wasted = _Watch(on_cuda), 0.0
            self._step()
            tick += 1
        return self._result()

    def _enter(self, tick: int) -> None:
        """Prefill prompts that find a place, and draw the first token of responses that do."""
        lanes, requests = self.lanes, self.requests
        entry = self.rows.enter()
        places = [place for place, _ in entry.prompts]
        hidden = lanes.decoder.enter(
            [requests.prompts[prompt] for _, prompt in entry.prompts],
            places,
            [row for row, _ in entry.rows],
        )
        if places:
            if self.ends is None:
                self.ends = hidden.new_zeros(lanes.shape.prompts, hidden.shape[1])
                self.kv_bytes = lanes.decoder.kv_bytes
            self.ends[torch.tensor(places, device=hidden.device)] = hidden
        assert self.ends is not None
        place_of_row = self.rows.place_of_row()
        lanes.decoder.arrange(place_of_row, len(self.rows.place))
        rows, responses = torch.tensor(entry.rows, device=lanes.device).unbind(1)
        lanes.response[rows], lanes.key[rows] = responses, requests.row_keys[responses]
        lanes.step[rows], lanes.alive[rows] = 0, True
        for name, value in requests.params.items():
            if isinstance(value, Tensor):
                lanes.params[name][rows] = value[responses].to(_PARAMS[name])
        prompts = [place_of_row[row] // lanes.shape.samples for row, _ in entry.rows]
        self._draw(self.ends[torch.tensor(prompts, device=lanes.device)], rows)
        for row, _ in entry.rows:
            self.entered_at[row] = tick

    def _shrink(self, size: int) -> None:
        """Go on with the first `size` rows, having moved the live ones there."""
        moves = self.rows.shrink(size)
        self.lanes.decoder.move(moves, size)
        copy_entries(self.lanes.per_row, moves.rows)
        for source, target in moves.rows:
            self.entered_at[target] = self.entered_at[source]
        self.lanes.decoder.arrange(self.rows.place_of_row(), len(self.rows.place))

    def _step(self) -> None:
        size = len(self.rows.row)
        rows = slice(0, size)
        lanes = self.lanes

        def advance() -> None:
            hidden = lanes.decoder.step(lanes.token[rows], lanes.step[rows])
            lanes.step[rows] += lanes.alive[rows]
            self._draw(hidden, rows)

        if lanes.decoder.captures:
            self.graphs.run((id(lanes), size, *sorted(self.numbers.items())), advance)
        else:
            advance()

    def _draw(self, hidden: Tensor, rows: slice | Tensor) -> None:
        """The next token of each of the rows."""
        lanes, length = self.lanes, self.requests.max_new_tokens
        step, alive, response = lanes.step[rows], lanes.alive[rows], lanes.response[rows]
        params = {name: lanes.params[name][rows] for name in _PARAMS if name not in self.numbers}
        sample = sample_from_hidden(
            hidden,
            self.head.weight,
            SampleKeys(lanes.seed, lanes.key[rows], step),
            SamplingParams(**self.numbers, **params),
            bias=self.head.bias,
            softcap=self.head.softcap,
            logit_scale=self.head.scale,
            num_classes=self.classes,
        )
        column = torch.where(alive, step, length)
        lanes.tokens[response, column] = sample.tokens
        lanes.logprob[response, column] = sample.logprob
        lanes.log_kept[response, column] = sample.log_kept
        lanes.token[rows] = sample.tokens
        lanes.alive[rows] = alive & ~self._is_stop(sample.tokens) & (step < length - 1)

    def _is_stop(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.stops).any(-1)

    def _result(self) -> RolloutBatch:
        """The responses, each to the token that stopped it; a copy of what the lanes hold."""
        lanes, requests = self.lanes, self.requests
        tokens = lanes.tokens[:, :-1]
        stops = self._is_stop(tokens)
        stopped = stops.any(1)
        first = stops.int().argmax(1)  # entries beyond a stop are 0, which may be a stop
        finished_by = tokens.gather(1, first[:, None])[:, 0].masked_fill(~stopped, -1)
        return RolloutBatch(
            prompts=[prompt for prompt in requests.prompts for _ in range(requests.samples)],
            tokens=tokens.cpu().clone(),
            lengths=torch.where(stopped, first + 1, requests.max_new_tokens).cpu(),
            finished_by_eos=stopped.cpu(),
            logprob=lanes.logprob[:, :-1].cpu().clone(),
            log_kept=lanes.log_kept[:, :-1].cpu().clone(),
            row_keys=requests.row_keys.cpu(),
            finished_by=finished_by.cpu(),
        )


class _Watch:
    """Reads which rows are alive; on CUDA with a delay, so that the host does not wait."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda, self.calls = on_cuda, 0
        self.seen: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def look(self, alive: Tensor) -> Tensor | None:
        """[b] bool on the CPU. On CUDA: the state of an earlier step, or None between polls."""
        if not self.on_cuda:
            return alive
        self.calls += 1
        if self.calls % _POLL_EVERY:
            return None
        before = self.seen
        if self.copied is not None:
            self.copied.synchronize()
        self.seen = torch.empty(alive.shape, dtype=torch.bool, pin_memory=True)
        self.seen.copy_(alive, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record()
        return before


def _should_shrink(gone: float, wasted: float, steps_left: int, captured: bool) -> bool:
    """Whether to leave out ended rows, a share `gone` of all, by moving others to their places.

    Moving costs at most about one step. On the CPU, where a step's time follows its rows, it is
    done once ended rows have wasted half of that and would waste all of it in the steps that may be
    left. Where steps are captured the size is one of a few, and the first rollout to reach it
    captures a step.
    """
    if captured:
        return steps_left >= _LEAST_STEPS
    return wasted >= 0.5 and gone * steps_left >= 1

"""Groups of rows that share a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.arguments import check_size, check_tensor


class RowGroups(NamedTuple):
    """The rows of each prompt if their numbers differ; made by `group_rows`."""

    rows: Tensor  # [P, G] int64; -1 in the unused places of smaller groups
    place: Tensor  # [B] int64; the index of each row in `rows`, flattened


def group_rows(
    prompt_of_row: Sequence[int], prompts: int, device: torch.device | str = "cpu"
) -> RowGroups:
    """Groups of rows by prompt, G the size of the largest, in the order of the rows.

    Raises:
        ValueError: a row names a prompt that is not from 0 to `prompts` - 1.
    """
    check_size("prompts", prompts, 0)
    members: list[list[int]] = [[] for _ in range(prompts)]
    for row, prompt in enumerate(prompt_of_row):
        if not isinstance(prompt, int):
            raise TypeError(f"prompt_of_row must hold ints, got {prompt!r} for row {row}")
        if not 0 <= prompt < prompts:
            raise ValueError(
                f"prompt_of_row must be from 0 to {prompts - 1}, got {prompt} for row {row}"
            )
        members[prompt].append(row)
    width = max(map(len, members), default=0)
    rows = torch.full((prompts, width), -1, dtype=torch.int64)
    place = torch.empty(len(prompt_of_row), dtype=torch.int64)
    for prompt, group in enumerate(members):
        rows[prompt, : len(group)] = torch.tensor(group, dtype=torch.int64)
        place[group] = prompt * width + torch.arange(len(group))
    return RowGroups(rows.to(device), place.to(device))


def check_groups(groups: RowGroups | None, query: Tensor, prompts: int) -> None:
    """Raise unless each row of `query` has a prompt. Values are checked on CPU only."""
    batch = query.shape[0]
    if groups is None:
        if batch and (prompts == 0 or batch % prompts):
            raise ValueError(
                f"query has {batch} rows for {prompts} prompts: without groups each prompt must "
                "have the same number of rows; see group_rows"
            )
        return
    if not isinstance(groups, RowGroups):
        raise TypeError(f"groups must be None or what group_rows returns, got {groups!r}")
    rows, place = groups
    check_tensor("groups.rows", rows, dtypes=(torch.int64,), shape=(prompts, "G"), like=query)
    check_tensor("groups.place", place, dtypes=(torch.int64,), shape=(batch,), like=query)
    if query.device.type == "cpu" and batch:
        inside = 0 <= int(place.min()) <= int(place.max()) < rows.numel()
        found = rows.flatten()[place] if inside else None
        if found is None or not torch.equal(found, torch.arange(batch)):
            raise ValueError("groups: place must be the index of each row in rows")
        if int((rows >= 0).sum()) != batch:
            raise ValueError("groups: rows must name each row once, and be -1 in other places")

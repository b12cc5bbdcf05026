"""Would skipping tiles of a small gradient pay? How many there are, on a real pair of models.

    python -m bench.tile_sparsity          writes bench/results/tile_sparsity.json

Apple's CCE skips a tile of the logits' gradient whose entries are all below 2**-12, and saves its
part of the two gradient products. Here: the share of tiles below a threshold, for tiles as a kernel
has them (128 tokens x 512 classes) and as our plans have them (512 x 4096); the classes in the
vocabulary's order, and sorted by their mean probability, which is CCE's way to make tiles empty;
the share that could be known from forward statistics alone, before dz exists; and the error of the
gradients from what was skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from bench.real_pair import STUDENTS, RealPair, real_pair

RESULT = Path(__file__).parent / "results" / "tile_sparsity.json"
TILES = ((128, 512), (512, 4096))
# bf16's resolution of the largest |dz| there is, about 1; CCE's choice; and bf16's resolution of
# an entry of 2**-8.
THRESHOLDS = {"2^-8": 2.0**-8, "2^-12": 2.0**-12, "2^-16": 2.0**-16, "1e-4": 1e-4, "1e-6": 1e-6}


def gradient(s: Tensor, t: Tensor, divergence: str) -> Tensor:
    """dz [T, V] of rows of weight 1."""
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "forward_kl":
        return log_p.exp() - log_q.exp()
    gap = log_p - log_q
    return log_p.exp() * (gap - (log_p.exp() * gap).sum(-1, keepdim=True))


def bound(s: Tensor, t: Tensor, divergence: str, tile: tuple[int, int]) -> Tensor:
    """What the forward's maxima of a tile say of its largest |dz|.

    Forward KL: |p - q| <= max(p, q). Reverse KL: p |log p - log q - KL| is at most the largest p
    times the largest second factor.
    """
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "forward_kl":
        return tile_maxima(torch.maximum(log_p, log_q).exp(), tile)
    gap = log_p - log_q
    gap -= (log_p.exp() * gap).sum(-1, keepdim=True)
    return tile_maxima(log_p.exp(), tile) * tile_maxima(gap, tile)


def tile_maxima(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """max |x| of each tile; what is left over at the edges forms smaller tiles."""
    rows, columns = tile
    pad = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    x = torch.nn.functional.pad(x.abs(), pad)
    x = x.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return x.amax(dim=(1, 3))


def _expand(tiles: Tensor, tile: tuple[int, int], like: Tensor) -> Tensor:
    full = tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return full[: like.shape[0], : like.shape[1]]


def measure(pair: RealPair, divergence: str, tile: tuple[int, int], ordered: bool) -> dict:
    """Shares of skippable tiles, and relative L2 errors of dX and dW, by threshold."""
    weight, hidden = pair.student_weight, pair.student_hidden
    s, t = hidden @ weight.T, pair.teacher_hidden @ pair.teacher_weight.T
    if ordered:
        order = s.softmax(-1).mean(0).argsort(descending=True)
        s, t, weight = s[:, order], t[:, order], weight[order]
    dz = gradient(s, t, divergence)
    largest, known = tile_maxima(dz, tile), bound(s, t, divergence, tile)
    exact = {"dX": dz @ weight, "dW": dz.T @ hidden}
    result = {}
    for name, threshold in THRESHOLDS.items():
        kept = torch.where(_expand(largest < threshold, tile, dz), 0.0, dz)
        approximate = {"dX": kept @ weight, "dW": kept.T @ hidden}
        result[name] = {
            "skipped": float((largest < threshold).double().mean()),
            "known_before": float((known < threshold).double().mean()),
            **{
                f"error {key}": float((approximate[key] - exact[key]).norm() / exact[key].norm())
                for key in exact
            },
        }
    return result


@torch.no_grad()
def main() -> None:
    torch.set_flush_denormal(True)  # probabilities of 1e-40 make a product many times slower
    records = []
    print(
        f"{'student':<16}{'divergence':<12}{'tile':<11}{'order':<8}{'below':<8}"
        f"{'tiles':>7}{'known':>7}{'dX error':>10}{'dW error':>10}"
    )
    for student in STUDENTS:
        pair = real_pair(student)
        for divergence in ("forward_kl", "reverse_kl"):
            for tile in TILES:
                for ordered in (False, True):
                    rows = measure(pair, divergence, tile, ordered)
                    order = "sorted" if ordered else "as is"
                    records.append(
                        {
                            "student": student,
                            "divergence": divergence,
                            "tile": list(tile),
                            "order": order,
                            "thresholds": rows,
                        }
                    )
                    for name, row in rows.items():
                        print(
                            f"{student:<16}{divergence:<12}{f'{tile[0]} x {tile[1]}':<11}"
                            f"{order:<8}{name:<8}{row['skipped']:>7.1%}{row['known_before']:>7.1%}"
                            f"{row['error dX']:>10.1e}{row['error dW']:>10.1e}"
                        )
    tokens, classes = pair.student_hidden.shape[0], pair.student_weight.shape[0]
    RESULT.write_text(
        json.dumps({"tokens": tokens, "classes": classes, "records": records}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

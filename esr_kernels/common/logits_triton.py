"""Device functions that several kernels share: elementwise maths, the transform of a logit, and one
step of an online softmax.

A *block* is what a program holds at once: [BLOCK] classes of one row, or a tile [rows, classes].
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # 1 - 2 / (e^2x + 1) loses all digits near 0, where the series is exact to fp32.
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * 62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def expm1(x):
    # exp(x) - 1 loses the digits of small x, which are the usual case for nearly equal models.
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    z = x / (2.0 + x)  # log1p(x) = 2 atanh(z)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@triton.jit
def scale_logits(z, classes, inside, transform):
    """Raw logits `z` plus bias, times scale: the first half of `transform_logits`."""
    bias_ptr, scale, _, _ = transform
    if bias_ptr is not None:
        z += tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        z = z * scale
    return z


@triton.jit
def cap_logits(x, transform):
    """(transformed logits, tanh of the softcap) of `scale_logits`' result: the second half."""
    bias_ptr, _, softcap, inv_temperature = transform
    capped = x
    if softcap is not None:
        capped = tanh(x / softcap)
        z = capped * softcap
        if bias_ptr is not None:
            # A class that a bias of -inf removed stays removed: its tanh of -1 is a finite logit.
            z = tl.where(x == -float("inf"), x, z)
        x = z
    if inv_temperature is not None:
        x = x * inv_temperature
    return x, capped


@triton.jit
def transform_logits(z, classes, inside, transform):
    """(transformed logits, tanh of the softcap) of raw logits `z`.

    `transform` is (bias_ptr, scale, softcap, inv_temperature), each None for none: a factor of 1
    would take an instruction for each logit (`LogitTransform.kernel_argument`). `inside` masks the
    load of the bias; the caller overwrites the logits outside.
    """
    return cap_logits(scale_logits(z, classes, inside, transform), transform)


@triton.jit
def softcap_derivative(x, transform):
    """1 - tanh^2 of the softcap at `scale_logits`' result; 1 without a softcap.

    Relatively exact: the difference from 1 would lose the digits of a large |x|.
    """
    _, _, softcap, _ = transform
    slope = 1.0
    if softcap is not None:
        u = 2.0 / (tl.exp(2.0 * tl.abs(x / softcap)) + 1.0)  # 1 - tanh |x|
        slope = u * (2.0 - u)
    return slope


@triton.jit
def load_logits(row_ptr, classes, n_classes, transform):
    """(transformed logits, -inf from `n_classes` on; tanh of the softcap) of a block of a row."""
    inside = classes < n_classes
    z = tl.load(row_ptr + classes, mask=inside, other=-float("inf"))
    z, capped = transform_logits(z, classes, inside, transform)
    return tl.where(inside, z, -float("inf")), capped


@triton.jit
def online_maximum(top, block_top):
    """(new maximum, the finite number to subtract from logits, decay, shift) after a block.

    Sums of exp(z - maximum) so far are multiplied by `decay`; sums of exp(z - maximum) * (z -
    maximum) first gain `shift` times the sum of exponentials, since the maximum moved.
    """
    new_top = tl.maximum(top, block_top)
    # A block of -inf only must not turn into exp(-inf + inf).
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay = tl.exp(top - base)
    shift = tl.where(top == -float("inf"), 0.0, top - base)
    return new_top, base, decay, shift


@triton.jit
def weigh(p, x):
    """p * x, but 0 * inf is 0: a class of probability 0 weighs nothing whatever its logit."""
    return p * tl.where(p == 0, 0.0, x)


@triton.jit
def lane_max(x):
    """Maxima [LANES] of a block [groups, LANES, width]: within threads, where none waits."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _sum(x, TILE: tl.constexpr):
    if TILE:
        x = tl.sum(x, 1)
    else:
        x = tl.sum(tl.sum(x, 2), 0)
    return x


@triton.jit
def online_softmax(z, difference, block_top, state, TILE: tl.constexpr):
    """Fold a block of one model's logits into the softmax statistics `state` of its row or rows.

    `state` is (maximum, sum of exponentials, sum of p * (z - maximum), sum of p * difference), with
    p = exp(z - maximum). With TILE the block is [rows, classes] and each statistic [rows]. Without,
    the block is [groups, LANES, width] classes of one row, and each statistic [LANES]: a lane has a
    maximum of its own, so that no thread waits for another, until `merge_lanes`.
    """
    top, total, centred, difference_sum = state
    top, base, decay, shift = online_maximum(top, block_top)
    if TILE:
        below = z - base[:, None]
    else:
        below = z - base[None, :, None]
    p = tl.exp(below)
    centred = (centred + shift * total) * decay + _sum(weigh(p, below), TILE)
    difference_sum = difference_sum * decay + _sum(weigh(p, difference), TILE)
    return top, total * decay + _sum(p, TILE), centred, difference_sum


@triton.jit
def merge_lanes(state):
    """The `state` of `online_softmax` of a whole row, from that of its lanes."""
    top, total, centred, difference_sum = state
    row_top = tl.max(top, 0)
    _, _, decay, shift = online_maximum(top, row_top)
    centred = tl.sum((centred + shift * total) * decay, 0)
    return row_top, tl.sum(total * decay, 0), centred, tl.sum(difference_sum * decay, 0)

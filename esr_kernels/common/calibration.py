"""The rates of a GPU that plans are priced with: counted ones, or those that were measured on it.

`bench.gpu_suite` measures and writes them to a file, which is read once in a process:

    {"format": 1, "devices": {NAME OF THE GPU: {"flops_per_byte": 210.0, ...}}}

with all fields of `Rates`. The file is $ESR_CALIBRATION, else esr_kernels/calibration.json in the
user's cache. Without it, or for a GPU that it does not name, a GPU in `MEASURED` has those rates,
and any other the counted ones. A file
that is not as described raises: plans that depend on half of it would be a riddle.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """What a GPU does in the time that one byte takes to move; the defaults are counted for sm_90,
    and careful.

    The fused kernel's rate: a tile of 128 tokens and 128 classes takes (128 + 128) * 2 bytes from
    L2 for 2 * 128 * 128 FLOPs, so that 5.5 TB/s of L2, which others have measured, feed 64 * 5.5 =
    352 of the 660 TFLOP/s of cuBLAS. (With descriptors the kernel turned out to be fed at 10 TB/s,
    see `MEASURED`.) Its epilogue, which no product overlaps: 49 instructions a logit pair in its
    SASS at 29.6e12 lanes a second are the time of 4.5 bytes at 2.7 TB/s.
    """

    flops_per_byte: float = 250.0  # of the vendor's products
    fused_rate: float = 0.53  # of the fused statistics' products, as a share of the vendor's
    fused_epilogue: float = 4.5  # bytes a pair of logits
    # The most rows for which a draw projects and draws in one kernel, for hidden states of up to
    # 2,048 and for wider ones. Up to 64 rows the head is read once, which takes most of the time,
    # and the logits' traffic is saved; the published crossover of such a kernel lies between 128
    # and 256 rows at D = 4096 on an H100 (FlashSampling), and the saving grows as 1 / D.
    draw_rows: int = 128
    draw_rows_wide: int = 64


COUNTED = Rates()
# By `bench.gpu_suite`, docs/gpu.md. The fused kernel's products and its epilogue together run at
# 0.93 of the vendor's rate; the two cannot be told apart at the shapes measured. Draws: at D = 1536
# both ways are within 5 percent of each other up to 128 rows, and the fused one holds no logits.
# For wider hidden states no time was recorded: the counted number stays.
MEASURED = {
    "NVIDIA H100 80GB HBM3": replace(
        COUNTED, flops_per_byte=239.0, fused_rate=0.93, fused_epilogue=0.0
    ),
}
# What a field may be: beyond, it was measured wrongly or is of another unit.
_RANGES = {
    "flops_per_byte": (10.0, 5000.0),
    "fused_rate": (0.05, 1.5),
    "fused_epilogue": (0.0, 200.0),
    "draw_rows": (0, 1 << 20),
    "draw_rows_wide": (0, 1 << 20),
}


def calibration_path() -> Path:
    """Where measured rates are looked for."""
    given = os.environ.get("ESR_CALIBRATION")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "esr_kernels" / "calibration.json"


@functools.cache
def rates_of(device: str) -> tuple[Rates, str]:
    """(rates, where they are from) of a device as a plan names it, such as "cuda:0"."""
    path, name = calibration_path(), _gpu_name(device)
    if name is not None and os.environ.get("ESR_CALIBRATION") and not path.exists():
        _log.warning("ESR_CALIBRATION names %s, which does not exist", path)
    devices = read(path) if name is not None and path.exists() else {}
    if name in devices:
        return devices[name], f"measured, {path}"
    return (MEASURED[name], f"measured, {name}") if name in MEASURED else (COUNTED, "counted")


def _gpu_name(device: str) -> str | None:
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(torch.device(device))


def read(path: Path) -> dict[str, Rates]:
    """Rates by the name of a GPU. Raises ValueError naming the file and what is wrong in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != {"format", "devices"}:
        raise ValueError(f"{path} must hold an object of 'format' and 'devices' (see calibration)")
    version, devices = content["format"], content["devices"]
    if type(version) is not int or version != FORMAT or not isinstance(devices, dict):
        raise ValueError(f"{path} must have format {FORMAT} and an object of devices")
    return {name: checked(f"{path}, {name}", given) for name, given in devices.items()}


def checked(where: str, given: Any) -> Rates:
    """The rates in an object of their fields; raises ValueError."""
    names = [field.name for field in fields(Rates)]
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise ValueError(f"{where}: must be an object of exactly {names}, got {given!r}")
    for name, value in given.items():
        least, most = _RANGES[name]
        whole = isinstance(least, int)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        # In this order: a number of hundreds of digits is no float.
        if not number or not least <= value <= most or not math.isfinite(value):
            kind = "a whole number" if whole else "a number"
            raise ValueError(
                f"{where}: {name} must be {kind} from {least} to {most}, got {value!r}"
            )
    return Rates(**given)


def write(path: Path, name: str, rates: Rates) -> None:
    """Add the rates of a GPU to the file, or replace them; other GPUs' stay."""
    devices = {other: asdict(kept) for other, kept in (read(path) if path.exists() else {}).items()}
    devices[name] = asdict(checked(name, asdict(rates)))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps({"format": FORMAT, "devices": devices}, indent=1) + "\n")
    aside.replace(path)

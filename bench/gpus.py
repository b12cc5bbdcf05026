"""What a prediction takes of each GPU: published figures, and what share of them is reached."""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu_static import cdna3_resident_warps, cuda_resident_warps


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are of the data sheet unless the name says otherwise."""

    name: str
    arch: str  # of bench/ahead_of_time.py
    heuristics: str | None  # its name in nvidia-matmul-heuristics
    processors: int  # SMs or CUs
    clock: float  # Hz, under load
    hbm: float  # bytes a second
    # What one processor finds in its cache of all that is there. Each half of an NVIDIA L2 keeps
    # its own copy of what both halves read; AMD's Infinity Cache lies before the memory.
    cache: float
    # Bytes a second from the cache. H100, and the H200, which has the same chip: what the fused
    # statistics drew at T = 8192 on an H100, 199 GB in 20.8 ms less the 2.2 of its epilogue,
    # rounded (docs/gpu.md). A100: three quarters of the 5,120 a clock that NVIDIA gives; for B200
    # and MI300X stated.
    l2: float
    # FLOP/s that large 16-bit products sustain under the power limit. H100: measured by others
    # (TRL #7244); H200: the middle of Liger #1422; the rest are stated.
    product_rate: float
    issue_cycles: int = 1  # of a warp's instruction on one of four schedulers
    fp32_cycles: int = 1
    special_cycles: int = 8  # of an exponential: 4 lanes of a scheduler have the unit

    def resident_programs(self, registers: int, shared: int, warps: int, columns: int = 0) -> int:
        """Programs that the whole GPU holds at once."""
        if self.arch == "gfx942":
            return self.processors * (cdna3_resident_warps(registers, shared, warps) // warps)
        resident = cuda_resident_warps(self.arch, registers, shared, warps, columns)
        return self.processors * (resident // warps)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", "sm_90", "H100_SXM", 132, 1.755e9, 3.35e12, 25e6, 10.5e12, 728e12),
        Gpu("H200", "sm_90", "H200_SXM", 132, 1.755e9, 4.8e12, 25e6, 10.5e12, 760e12),
        Gpu("B200", "sm_100", "B200", 148, 1.85e9, 7.7e12, 63e6, 10e12, 1600e12),
        Gpu("A100", "sm_80", "A100_SXM_80GB", 108, 1.41e9, 2.04e12, 20e6, 5.4e12, 265e12, 1, 2),
        Gpu("MI300X", "gfx942", None, 304, 2.1e9, 5.3e12, 256e6, 10e12, 600e12, 4, 4, 16),
    )
}
# Of the data sheet's bandwidth, what long streams reach; and of the schedulers' slots.
HBM_SHARE = 0.9
ISSUE_SHARE = 0.85
# Between two kernels of one stream, and what the host takes to launch one.
GAP_SECONDS = 1.2e-6
HOST_SECONDS = 4e-6

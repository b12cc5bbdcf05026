"""The ops under other people's trainers: one file each, which imports its trainer, and no other
part of `esr_kernels` imports any of them."""

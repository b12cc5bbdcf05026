"""Benchmarks run alone, on all cores, and never in Triton's interpreter."""

import os

os.environ.pop("TRITON_INTERPRET", None)

"""`bench.gpu_static` under every supported Triton, one after another.

    python -m bench.static_all [DIRECTORY]     default .venv/tritons; each wheel is deleted again

Each version is installed aside and put before the installed one on the path. PyTorch stays: the
launchers need only its shapes. Only sm_90 and gfx942, which must not spill.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# The Triton of torch 2.8, 2.9 and 2.10; torch 2.13's is the one that is installed.
VERSIONS = ("3.4.0", "3.5.1", "3.6.0")


def check(version: str, where: Path) -> int:
    """Exit code of the static gate under one version."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(where), f"triton=={version}"], check=True)
    # Triton 3.4 wants ROCm's linker. What it would link is not read here, only the assembly.
    linker = where / "ld.lld"
    linker.write_text("#!/bin/sh\n")
    linker.chmod(0o755)
    paths = [str(where), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(where / "cache"),
        "TRITON_HIP_LLD_PATH": str(linker.resolve()),
    }
    command = [sys.executable, "-m", "bench.gpu_static", "--arch", "sm_90", "--arch", "gfx942"]
    try:
        return subprocess.run(command, env=environment).returncode
    finally:
        shutil.rmtree(where, ignore_errors=True)


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv/tritons")
    codes = {}
    for version in VERSIONS:
        print(f"\ntriton {version}", flush=True)
        codes[version] = check(version, root / version)
    print({version: "passes" if code == 0 else "FAILS" for version, code in codes.items()})
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())

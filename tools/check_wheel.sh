#!/usr/bin/env bash
# Builds sdist and wheel from the tracked files, checks what is in them, installs the wheel with the
# extra `train` into a fresh environment, and runs examples/ there: no checkout, Triton or C compiler.
#   make wheel-check        minutes, most of them pip's; nothing is left behind
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "[$SECONDS s] $*"; }

git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$work" --one-top-level=source
"${PYTHON:-python3}" -m venv "$work/builder"
"$work/builder/bin/pip" install build
"$work/builder/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || {
  cat "$work/build.log"
  exit 1
}
if grep -i deprecat "$work/build.log"; then exit 1; fi
"$work/builder/bin/python" "$root/tools/check_archives.py" "$work/source" "$work/dist"
say "built, with the right files"

"${PYTHON:-python3}" -m venv "$work/fresh"
wheel=$(echo "$work"/dist/*.whl)
"$work/fresh/bin/pip" install -c constraints.txt "$wheel[train]"
"$work/fresh/bin/pip" uninstall -y triton 2>/dev/null || true # PyTorch's builds for GPUs bring it
say "installed"

mkdir "$work/home" "$work/elsewhere"
cd "$work/elsewhere"
tar -xzf "$work"/dist/*.tar.gz --strip-components=1 --wildcards '*/examples'
alone=(env -i HOME="$work/home" PATH="$work/fresh/bin" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1)
"${alone[@]}" python - 2>"$work/warnings" <<'END'
import importlib.util, torch
import esr_kernels
from esr_kernels import linear_divergence
assert "site-packages" in esr_kernels.__file__ and importlib.util.find_spec("triton") is None
made = [torch.randn(shape) for shape in ((9, 16), (500, 16), (9, 8), (512, 8))]
hidden = made[0].requires_grad_()
for divergence in ("reverse_kl", "jsd", "forward_kl"):
    linear_divergence(*made, divergence).loss.backward()
END
if [ "$(grep -c 'PyTorch is used instead' "$work/warnings")" != 1 ]; then
  echo "one warning about the missing compiler was expected:"
  cat "$work/warnings"
  exit 1
fi
"${alone[@]}" esr-train --help >/dev/null
passed=0
for example in examples/*.py; do
  if grep -q '^from trl\|^import trl' "$example" && ! "${alone[@]}" python -c 'import trl' 2>/dev/null; then
    say "skipped $example: it needs trl"
    continue
  fi
  "${alone[@]}" python "$example" >"$work/out" 2>&1 || {
    cat "$work/out"
    exit 1
  }
  passed=$((passed + 1))
  say "$example: $(tail -n 1 "$work/out")"
done
say "$passed examples ran"

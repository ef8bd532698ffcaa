#!/usr/bin/env bash
# Triton 3.6.0 (the release that torch 2.11 requires), interpreter, with NumPy 2.4.6 and with NumPy 2.3.5; torch 2.13.0 (CPU).
#
# Nothing forbids this pair, yet from NumPy 2.4 on the interpreter of 3.6.0 runs no kernel with a loop over range() whose bound is an
# argument: it turns an array of one element into a Python number, which NumPy 2.4 no longer does. Kernels without such a
# loop run, so a first try looks well. With NumPy 2.3 all run; so they do with Triton 3.7.1 and NumPy 2.4.
#
# Expected: the sum 0 + 1 + ... + 9 = 45 with both releases of NumPy.
# Seen:     InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars') with NumPy 2.4.6.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install triton==3.6.0
cat >"$folder/loop.py" <<'CODE'
import warnings

import numpy
import torch
import triton
import triton.language as tl

warnings.simplefilter("ignore")


@triton.jit
def plain(out, n):
    tl.store(out, n)


@triton.jit
def loop(out, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out, total)


def result(kernel):
    out = torch.zeros(1, dtype=torch.int32)
    try:
        kernel[(1,)](out, 10)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return out.item()


print("triton", triton.__version__, "numpy", numpy.__version__, "| without a loop:", result(plain), "| with one:", result(loop))
CODE
for numpy in 2.3.5 2.4.6; do
  $pip install "numpy==$numpy"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/loop.py" | tee "$folder/$numpy"
done
grep -q "without a loop: 10 | with one: 45" "$folder/2.3.5"
if ! grep -q "without a loop: 10 | with one: InterpreterError: TypeError('only 0-dimensional" "$folder/2.4.6"; then
  echo changed
  exit 1
fi

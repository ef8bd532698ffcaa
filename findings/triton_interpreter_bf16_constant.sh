#!/usr/bin/env bash
# Triton 3.8.0 (3.6 and 3.7 too; 3.9.0 is right), interpreter, torch 2.13.0 (CPU).
#
# A bfloat16 constant, tl.full((16,), 1.0, tl.bfloat16), cannot be made in the interpreter (TRITON_INTERPRET=1), though loads,
# casts and stores of bfloat16 work there and the compiler takes the line. The same constant of float16 is fine, and so is
# tl.full((16,), 1.0, tl.float32).to(tl.bfloat16).
#
# Expected: the interpreter runs what the compiler compiles: 16 ones.
# Seen:     InterpreterError: AttributeError("'InterpreterBuilder' object has no attribute 'get_bf16'").
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0 numpy==2.3.5
$pip install triton==3.8.0
cat >"$folder/constant.py" <<'CODE'
import torch
import triton
import triton.language as tl


@triton.jit
def direct(out, DTYPE: tl.constexpr):
    tl.store(out + tl.arange(0, 16), tl.full((16,), 1.0, DTYPE))


@triton.jit
def cast(out, DTYPE: tl.constexpr):
    tl.store(out + tl.arange(0, 16), tl.full((16,), 1.0, tl.float32).to(DTYPE))


def result(kernel, dtype, kind):
    out = torch.zeros(16, dtype=dtype)
    try:
        kernel[(1,)](out, kind)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ones" if bool((out == 1).all()) else "something else"


print("triton", triton.__version__, "torch", torch.__version__)
rows = [
    ("float16, direct ", result(direct, torch.float16, tl.float16)),
    ("bfloat16, cast  ", result(cast, torch.bfloat16, tl.bfloat16)),
    ("bfloat16, direct", result(direct, torch.bfloat16, tl.bfloat16)),
]
for name, seen in rows:
    print(name, seen)
assert rows[0][1] == rows[1][1] == "ones"
if "no attribute 'get_bf16'" not in rows[2][1]:
    print("changed")
    raise SystemExit(1)
CODE
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/constant.py"

#!/usr/bin/env bash
# Triton 3.9.0, interpreter, torch 2.13.0 (CPU).
#
# A global tl.constexpr times a tensor: in the interpreter (TRITON_INTERPRET=1) the product raises where the constant stands on
# the left, and is right where it stands on the right. The compiler takes both.
#
# Expected: the interpreter runs what the compiler compiles.
# Seen:     HALF * x raises TypeError, "cannot convert ... to tensor"; x * HALF gives 0, 0.5, 1, 1.5. Both compile for sm_90.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0 numpy==2.4.6
$pip install triton==3.9.0
cat >"$folder/half.py" <<'CODE'
import os

import torch
import triton
import triton.language as tl

HALF = tl.constexpr(0.5)


@triton.jit
def halve(x, LEFT: tl.constexpr):
    at = x + tl.arange(0, 4)
    if LEFT:
        tl.store(at, HALF * tl.load(at))
    else:
        tl.store(at, tl.load(at) * HALF)


def interpreted(left):
    x = torch.arange(4.0)
    try:
        halve[(1,)](x, left)
    except Exception as error:
        return f"{type(error.__cause__ or error).__name__}: {error}"
    return x.tolist()


def compiled(left):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=halve, signature={"x": "*fp32", "LEFT": "constexpr"}, constexprs={"LEFT": left})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"].count("mul.f32")


if os.environ.get("TRITON_INTERPRET") == "1":
    right, left = interpreted(False), interpreted(True)
    print("triton", triton.__version__)
    print("constant on the right:", right)
    print("constant on the left:", left)
    assert right == [0.0, 0.5, 1.0, 1.5] and "TypeError" in left and "cannot convert" in left
else:
    products = compiled(False), compiled(True)
    print("products in the compiled kernels, right and left:", products)
    assert products[0] == products[1] > 0
CODE
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/half.py"
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/half.py"
echo "as described"

#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0 (CPU).
#
# 4-bit quantisation cuts the flat weight into blocks of 64 elements, one scale each, so blocks run across rows where 64 does not
# divide in_features. The kernel that dequantises on CPUs takes another scale there: dequantize_4bit and every forward of a
# Linear4bit are wrong, without an error. Its own other implementation (odd in_features go there) reads the same bytes rightly.
#
# Expected: 9 % relative error of NF4 for normal weights, whatever in_features is.
# Seen:     9 % where 64 divides in_features, 24 to 27 % for 96 and 160; the bytes are right: read by the layout they give 9 %.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'CODE'
import bitsandbytes
import bitsandbytes.functional as F
import torch

torch.manual_seed(0)
code = F.get_4bit_type("nf4", device="cpu")
for K in (64, 96, 128, 160):
    W = torch.randn(64, K)
    packed, state = F.quantize_4bit(W, blocksize=64, quant_type="nf4")
    values = code[torch.stack((packed >> 4, packed & 15), 1).flatten().int()]
    by_layout = (values.view(-1, 64) * state.absmax[:, None]).view(64, K)
    theirs = F.dequantize_4bit(packed, state)
    error = [((V - W).norm() / W.norm()).item() for V in (theirs, by_layout)]
    print(f"in_features {K}: dequantize_4bit off by {error[0]:.3f}, the bytes by {error[1]:.3f}")
    assert error[1] < 0.11 and (error[0] < 0.11) == (K % 64 == 0)
print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
CODE
echo "as described"

#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# A quotient of two floating-point numbers is rounded once, in Python, in numpy and for two tensors in torch. A Python number
# over a tensor is not: torch multiplies it by the reciprocal, which rounds twice. So k / tensor(k) need not be 1, and codes that
# are rounded from such a quotient differ from those of any other library.
#
# Expected: 41.0 / tensor(41.0) == 1, and number / t == tensor(number) / t.
# Seen:     0.99999994; of k = 1 ... 999 135 are not 1, and a quarter of the quotients 127 / t are another number.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'CODE'
import numpy as np
import torch

t = torch.arange(1, 1000).float()
number, tensors, in_numpy = 127.0 / t, torch.tensor(127.0) / t, np.float32(127.0) / t.numpy()
not_one = [k for k in range(1, 1000) if (float(k) / torch.tensor(float(k))).item() != 1.0]
differ = int((number != tensors).sum())
print("torch", torch.__version__, "numpy", np.__version__)
print(f"41.0 / tensor(41.0) = {(41.0 / torch.tensor(41.0)).item():.8f}; k / tensor(k) is not 1 for {len(not_one)} of 999 k")
print(f"127.0 / t and tensor(127.0) / t differ in {differ} of {len(t)} elements")
assert torch.equal(tensors, torch.from_numpy(in_numpy)) and (t / t == 1).all()
assert 41 in not_one and len(not_one) > 100 and differ > len(t) // 5
assert torch.equal(number, t.reciprocal() * 127.0)
CODE
echo "as described"

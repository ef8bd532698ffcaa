#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# A TorchDispatchMode sees other operations under inference_mode than under no_grad: the ones that autograd's dispatch takes
# apart (F.linear, reshape, matmul) arrive whole. A mode that counts, traces or rewrites mm and view, written and tested
# under no_grad, sees none of them in inference mode.
#
# Expected: the same list of operations for the same call, as neither guard records gradients.
# Seen:     no_grad t, view, mm, _unsafe_view, view; inference_mode linear, reshape.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
"$folder/venv/bin/python" - <<'CODE' 2>/dev/null
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def names(guard):
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    with guard(), Names() as mode:
        torch.nn.functional.linear(x, w)
        x.reshape(6, 4)
    return mode.seen


print("torch", torch.__version__)
without_gradients, inference = names(torch.no_grad), names(torch.inference_mode)
print("no_grad:       ", *without_gradients)
print("inference_mode:", *inference)
assert "aten.mm" in without_gradients
if inference != ["aten.linear", "aten.reshape"]:
    print("changed")
    raise SystemExit(1)
CODE

#!/usr/bin/env bash
# torch 2.13.0 (CPU), numpy 2.4.6.
#
# The imaginary part of a conjugated tensor is a view that stands for the negative of its memory. torch exports it through
# DLPack as the memory is: whoever imports it gets every sign wrong, without an error. The neighbours are careful: numpy()
# of the same tensor raises and names resolve_neg, and DLPack refuses the conjugate bit.
#
# Expected: the tensor's own values, or an error as for numpy() and for the conjugated tensor.
# Seen:     the tensor is [-2, 4]; numpy.from_dlpack and torch.from_dlpack of it give [2, -4].
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'CODE' 2>/dev/null
import numpy
import torch

conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
tensor = conjugated.imag
imported = {"numpy.from_dlpack": numpy.from_dlpack(tensor), "torch.from_dlpack": torch.from_dlpack(tensor)}
print("torch", torch.__version__, "numpy", numpy.__version__)
print("the tensor:", tensor.tolist())
for name, value in imported.items():
    print(f"{name}:", value.tolist())
refused = []
for name, export in (("numpy()", tensor.numpy), ("DLPack of the conjugated tensor", conjugated.__dlpack__)):
    try:
        export()
    except (RuntimeError, BufferError) as error:
        refused.append(name)
        print(f"{name} refuses:", error)
raise SystemExit(
    not (
        tensor.tolist() == [-2.0, 4.0]
        and all(value.tolist() == [2.0, -4.0] for value in imported.values())
        and len(refused) == 2
    )
)
CODE

#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0 (CPU).
#
# LoraConfig.rank_pattern and alpha_pattern hold for target_parameters too. PEFT warns about such keys nevertheless that they
# "did not match any targeted module and were ignored", and goes on to apply them.
#
# Expected: no warning, or a key that is ignored.
# Seen:     the warning names the key, and the parameter's adapter has the pattern's rank, 5, in the place of r=2.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy peft==0.21.2
"$folder/venv/bin/python" - <<'CODE'
import warnings

import peft
import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 6))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()


config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"], rank_pattern={"up": 5})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.get_peft_model(Model(), config)
said = [str(w.message) for w in caught if "ignored" in str(w.message)]
ranks = model.base_model.model.experts.r
print("peft", peft.__version__, "torch", torch.__version__)
print("warning:", said)
print("ranks:", ranks)
assert any("up" in text for text in said) and ranks["default"] == 5
CODE
echo "as described"

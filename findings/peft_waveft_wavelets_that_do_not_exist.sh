#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# WaveFTConfig checks wavelet_family against a table of 74 names and names them all in its error, so a name that it takes
# looks supported. That table holds paddings (peft/tuners/waveft/constants.py); the filters are in another one, of 24
# names (wavelet.py). Configuration, model and saved adapter are made with any of the other 50, db16 for instance; the
# first forward raises.
#
# Expected: an error from the configuration, as for a name in neither table; or a model that runs.
# Seen:     50 of 74 names fail in forward with ValueError: Unknown wavelet name.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'CODE'
import warnings

import peft
import torch
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS

warnings.filterwarnings("ignore")


def model(family):
    config = peft.WaveFTConfig(n_frequency=10, wavelet_family=family, target_modules=["0"])
    return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)


print("peft", peft.__version__, "torch", torch.__version__)
try:
    model("db99")
    raise SystemExit("changed: no check of the name")
except ValueError as error:
    print("db99, configuration:", str(error)[:50], "...")
failed = []
for family in WAVELET_REDUCTIONS:
    made = model(family)
    try:
        made(torch.randn(2, 16))
    except ValueError as error:
        assert "Unknown wavelet name" in str(error), error
        failed.append(family)
    except RuntimeError:
        assert family == "coif5"  # has filters, of a wrong length
print(f"{len(failed)} of {len(WAVELET_REDUCTIONS)} accepted names fail in forward, from", failed[0], "to", failed[-1])
if len(failed) != 50 or len(WAVELET_REDUCTIONS) != 74 or "db16" not in failed:
    raise SystemExit("changed")
CODE

#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# The names of a call with `adapter_names` reach a LoRA model's layers by forward hooks that every thread sees. While one thread
# is inside such a call, a call of the same model in another thread gets the first one's names too, without an error if
# the batches are of one size. The model is in eval mode and nothing is written to it by either thread.
#
# Expected: y of the second thread is what it is when the thread is alone: the active adapter's.
# Seen:     it is that of the adapter that the first thread has named.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'CODE'
import threading

import peft
import torch
from torch import nn


def config():
    return peft.LoraConfig(target_modules=["1"], r=4, init_lora_weights=False)


torch.manual_seed(0)
model = peft.get_peft_model(nn.Sequential(nn.Identity(), nn.Linear(8, 8)), config(), adapter_name="red")
model.add_adapter("blue", config())
model.eval()
x = torch.randn(2, 8)


@torch.no_grad()
def call(**names):
    return model(x, **names)


alone, blue, meanwhile = call(), call(adapter_names=["blue", "blue"]), []
inside, answered = threading.Event(), threading.Event()
first = threading.get_ident()


def wait(module, args):
    # The first thread stands still in the middle of its call until the second has had its answer.
    if threading.get_ident() == first:
        inside.set()
        answered.wait(30)


def second():
    inside.wait(30)
    meanwhile.append(call())
    answered.set()


thread = threading.Thread(target=second)
handle = model.base_model.model[0].register_forward_pre_hook(wait)
thread.start()
call(adapter_names=["blue", "blue"])
thread.join()
handle.remove()

print("peft", peft.__version__, "torch", torch.__version__)
print("second thread, active adapter red: is red's", torch.equal(meanwhile[0], alone), "| is blue's", torch.equal(meanwhile[0], blue))
assert torch.equal(call(), alone) and not torch.equal(alone, blue)
if not torch.equal(meanwhile[0], blue):
    print("changed")
    raise SystemExit(1)
CODE

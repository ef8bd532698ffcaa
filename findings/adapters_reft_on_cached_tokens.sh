#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# LoReFT edits the first `prefix_positions` tokens of a sequence. AdapterHub counts them from the start of each call: with a
# cache a decoded token is the first of its call, and is edited, though without a cache it would not be. So generate() with a cache
# and without one compute different functions; training knew only the one without.
#
# Expected: the logits of the eighth token, of which only the first is edited, do not depend on the cache.
# Seen:     they do (GPT-2, whose cache itself is right: without an active adapter both agree to rounding).
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy adapters==1.3.0 transformers==4.57.6
"$folder/venv/bin/python" - <<'CODE'
import adapters
import torch
import transformers

torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60)).eval()
adapters.init(model)
model.add_adapter("edit", config=adapters.LoReftConfig(r=2, prefix_positions=1, suffix_positions=0, dropout=0.0))
for name, parameter in model.named_parameters():
    if "learned_source" in name:
        torch.nn.init.normal_(parameter)
ids = torch.randint(5, 60, (1, 8))


@torch.no_grad()
def distance():
    cache = model(ids[:, :7], use_cache=True).past_key_values
    last = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits[:, 0]
    return (last - model(ids).logits[:, 7]).abs().max().item()


without = distance()
model.set_active_adapters("edit")
active = distance()
print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print(f"cache against no cache: {without:.1e} without an adapter, {active:.1e} with LoReFT on the first token")
assert without < 1e-5 and active > 1e-2
CODE
echo "as described"

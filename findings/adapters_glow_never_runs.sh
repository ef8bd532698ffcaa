#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# An invertible adapter may be of NICE or of GLOW coupling (inv_adapter="nice" or "glow"; both are documented). GLOW's block
# multiplies halves of the hidden state with matrices made for the whole of it.
#
# Expected: both couplings run, as both can be added and made active.
# Seen:     NICE runs; GLOW raises RuntimeError in the first forward pass, whatever the input.
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


def model(**configs):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60
    )
    bert = transformers.BertModel(config).eval()
    adapters.init(bert)
    for name, config in configs.items():
        bert.add_adapter(name, config=config)
    return bert


ids = torch.randint(5, 60, (2, 8))
print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
for coupling in ("nice", "glow"):
    bert = model(a=adapters.SeqBnInvConfig(inv_adapter=coupling))
    bert.set_active_adapters("a")
    try:
        bert(ids)
        said = None
    except RuntimeError as error:
        said = str(error)
    print(f"{coupling}: {said or 'runs'}")
    assert (said is None) == (coupling == "nice")
assert "(32) must match" in said and "(16)" in said
CODE
echo "as described"

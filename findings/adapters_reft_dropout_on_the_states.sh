#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# The `dropout` of a ReFT configuration falls on the edited hidden states themselves, not on the edit: in training it zeroes entries
# of the residual stream at the listed positions and scales up the rest, whatever the edit is.
#
# Expected: an edit of zero (NoReFT whose projection is zero) leaves hidden states as they are in training too.
# Seen:     half of the entries at the edited positions are zero and the others doubled at dropout=0.5; other positions are untouched.
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
config = transformers.BertConfig(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    vocab_size=60,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
model = transformers.BertModel(config)
ids = torch.randint(5, 60, (16, 8))
with torch.no_grad():
    plain = model(ids).last_hidden_state
    adapters.init(model)
    model.add_adapter("edit", config=adapters.NoReftConfig(r=2, prefix_positions=2, suffix_positions=0, dropout=0.5))
    model.set_active_adapters("edit")
    for name, parameter in model.named_parameters():
        if ".projection." in name:
            parameter.zero_()
    model.eval()
    assert torch.equal(model(ids).last_hidden_state, plain)
    model.train()
    got = model(ids).last_hidden_state
edited, others = got[:, :2], got[:, 2:]
zero = (edited == 0).float().mean().item()
doubled = torch.equal(edited[edited != 0], 2 * plain[:, :2][edited != 0])
print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print(f"edited positions: {zero:.2f} of the entries are zero, the others doubled: {doubled}")
assert 0.4 < zero < 0.6 and doubled and torch.equal(others, plain[:, 2:])
CODE
echo "as described"

#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# ReFT edits prefix_positions tokens at the start and suffix_positions at the end. Where a sequence has fewer tokens than
# suffix_positions, the edited states are put back one column off: the slice that should hold the suffix takes its last
# suffix_positions columns, which begin in the prefix's. Each token then gets the state of its neighbour.
#
# Expected: an edit that changes nothing (NoReFT whose projection is zero) leaves the model's output as it is.
# Seen:     so it does for sequences of 3 tokens and more; two tokens change places.
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
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60
)
model = transformers.BertModel(config).eval()
ids = torch.randint(5, 60, (1, 8))
with torch.no_grad():
    plain = {n: model(ids[:, :n]).last_hidden_state for n in (2, 3, 4, 8)}
    adapters.init(model)
    model.add_adapter("edit", config=adapters.NoReftConfig(r=2, prefix_positions=3, suffix_positions=3, dropout=0.0))
    model.set_active_adapters("edit")
    for name, parameter in model.named_parameters():
        if ".projection." in name:
            parameter.zero_()
    print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
    for n, want in plain.items():
        got = model(ids[:, :n]).last_hidden_state
        swapped = torch.equal(got, want.flip(1))
        print(f"{n} tokens: unchanged {torch.equal(got, want)}, the two tokens exchanged {n == 2 and swapped}")
        assert swapped and not torch.equal(got, want) if n == 2 else torch.equal(got, want)
CODE
echo "as described"

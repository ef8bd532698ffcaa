#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# Compacter's weights are Kronecker products of each layer's own factors with a `phm_rule` that all layers share and train.
# save_adapter() writes the factors and not the shared rule; load_adapter() draws a new one, without an error, so a saved Compacter
# adapter computes something else in the next process. The whole model's state_dict does hold the rule.
#
# Expected: outputs of a model after save_adapter and load_adapter into another one with the same base are those of the first.
# Seen:     so they are with a bottleneck adapter (seq_bn); with Compacter they differ, and no file holds a phm_rule.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check -q install torch==2.13.0 numpy adapters==1.3.0 transformers==4.57.6
cd "$folder"
"$folder/venv/bin/python" - <<'CODE'
import adapters
import torch
import transformers

config = transformers.BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=60
)
ids = torch.arange(5, 13)[None]


def base():
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    adapters.init(model)
    return model


@torch.no_grad()
def saved_and_loaded(name):
    """Distance of the outputs, and whether the model and what was saved hold a rule."""
    first, second = base(), base()
    first.add_adapter("a", config=name)
    first.set_active_adapters("a")
    held = {n: p for n, p in first.named_parameters() if ".adapters." in n or "phm" in n}
    for parameter in held.values():
        parameter.normal_(std=0.3)  # as if trained
    first.save_adapter(name, "a")
    second.load_adapter(name, set_active=True)
    written = torch.load(f"{name}/pytorch_adapter.bin", weights_only=True)
    distance = (first(ids).last_hidden_state - second(ids).last_hidden_state).abs().max().item()
    return distance, any("phm_rule" in n for n in held), any("phm_rule" in n for n in written)


seen = {name: saved_and_loaded(name) for name in ("seq_bn", "compacter")}
print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
for name, (distance, has, wrote) in seen.items():
    print(f"{name}: off by {distance:.1e}; the model has a rule: {has}, the file: {wrote}")
assert seen["seq_bn"][0] == 0.0 and seen["compacter"][0] > 1e-2 and seen["compacter"][1:] == (True, False)
CODE
echo "as described"

#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# AdapterHub's (IA)^3 scales the whole output of a linear layer, bias included: l (W x + b). merge_adapter() folds l into W
# alone, so a merged model computes l W x + b. LoRA's merge, by the same method, is exact.
#
# Expected: outputs before and after merge_adapter equal to rounding.
# Seen:     so they are with LoRA, and with (IA)^3 if all biases are zero; with biases they differ, without an error.
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

config = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60
)


@torch.no_grad()
def distance(method, biases):
    """Between the outputs before and after the merge; the linear layers' biases are of this size."""
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias.normal_(std=biases)
    adapters.init(model)
    model.add_adapter("a", config=method)
    model.set_active_adapters("a")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.5)
    ids = torch.arange(5, 13)[None]
    before = model(ids).last_hidden_state
    model.merge_adapter("a")
    return (model(ids).last_hidden_state - before).abs().max().item()


seen = {
    "LoRA": distance(adapters.LoRAConfig(r=4), 0.5),
    "(IA)^3, biases zero": distance(adapters.IA3Config(), 0.0),
    "(IA)^3": distance(adapters.IA3Config(), 0.5),
}
print("adapters", adapters.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print({name: f"{value:.1e}" for name, value in seen.items()})
assert seen["LoRA"] < 1e-4 and seen["(IA)^3, biases zero"] < 1e-4 and seen["(IA)^3"] > 1e-2
CODE
echo "as described"

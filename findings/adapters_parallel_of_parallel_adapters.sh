#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# Parallel("a", "b") gives every adapter a copy of the batch, and repeats the hidden states at the first layer with an adapter. An
# adapter of par_bn is added to the layer's input at the end, which was kept before the repetition and still has the rows of the
# plain batch.
#
# Expected: what works for adapters in sequence works for parallel ones, or is refused when it is made active.
# Seen:     seq_bn runs and gives twice the rows; par_bn raises RuntimeError for sizes that do not match.
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
from adapters.composition import Parallel


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
for config in ("seq_bn", "par_bn"):
    bert = model(a=config, b=config)
    bert.set_active_adapters(Parallel("a", "b"))
    try:
        said = f"runs, {len(bert(ids).last_hidden_state)} rows"
    except RuntimeError as error:
        said = str(error)
    print(f"{config}: {said}")
    assert said == "runs, 4 rows" if config == "seq_bn" else "(4) must match" in said
CODE
echo "as described"

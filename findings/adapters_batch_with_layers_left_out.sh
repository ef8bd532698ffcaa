#!/usr/bin/env bash
# adapters 1.3.0 with transformers 4.57.6, torch 2.13.0 (CPU).
#
# A configuration may leave layers out (leave_out=[0]). Alone, such an adapter runs: the layer has no module for it and passes its
# input on. BatchSplit and Parallel go by the list of names and look each of them up in every layer.
#
# Expected: sequences whose adapter leaves a layer out pass it unchanged, as they do when the adapter is active alone.
# Seen:     KeyError with the adapter's name, in both compositions.
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
from adapters.composition import BatchSplit, Parallel


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
for name, setup in {
    "alone": "a",
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[1, 1]),
    "Parallel": Parallel("a", "b"),
}.items():
    bert = model(a=adapters.SeqBnConfig(leave_out=[0]), b="seq_bn")
    bert.set_active_adapters(setup)
    try:
        bert(ids)
        said = "runs"
    except KeyError as error:
        said = f"KeyError {error}"
    print(f"{name}: {said}")
    assert said == ("runs" if name == "alone" else "KeyError 'a'")
CODE
echo "as described"

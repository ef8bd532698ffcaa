#!/usr/bin/env bash
# PEFT 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU).
#
# Whisper's encoder starts with two convolutions, and PEFT's LoRA takes nn.Conv1d, so target_modules=["conv1"] is accepted. The
# first forward fails: the encoder reads self.conv1.stride to check the length of its input (modeling_whisper.py), and PEFT's
# layer, which is in that place now, has weight and bias of its base but not the other attributes. The class is called
# Conv1d as well, which makes the message a riddle.
#
# Expected: logits, as with LoRA on q_proj.
# Seen:     AttributeError: 'Conv1d' object has no attribute 'stride', for conv1 and for conv2.
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
import transformers

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


def forward(target):
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=4,
        max_source_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    base = transformers.WhisperForConditionalGeneration(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[target]))
    sound, tokens = torch.randn(1, 4, 16), torch.ones(1, 3, dtype=torch.long)
    try:
        return f"logits of shape {tuple(model(input_features=sound, decoder_input_ids=tokens).logits.shape)}"
    except AttributeError as error:
        return f"AttributeError: {error}"


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = {target: forward(target) for target in ("q_proj", "conv1", "conv2")}
for target, outcome in seen.items():
    print(f"{target}: {outcome}")
message = "AttributeError: 'Conv1d' object has no attribute 'stride'"
if not (seen["q_proj"].startswith("logits") and seen["conv1"] == seen["conv2"] == message):
    raise SystemExit("changed")
CODE

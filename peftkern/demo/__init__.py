"""The demo: a real pretrained model fine-tuned by stock HF PEFT and through peftkern, side by side."""

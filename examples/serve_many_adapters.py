"""Train four LoRA adapters in one batch per step, then serve a hundred of them in one batch.

    python examples/serve_many_adapters.py

A small Llama with frozen random weights learns four ways to go on with the alphabet. Every training step is one forward
and one backward of a batch that holds sequences of all four tasks, each with its own adapter (``adapter_names``, which
PEFT alone allows in evaluation only). The adapters are saved as ordinary PEFT checkpoints, 96 noisy copies are made,
and all 100 are attached to the plain model. A batch that mixes adapters and the base model is decoded; then every
prompt once more, alone with its adapter: the answers must be the same.

Needs torch, transformers and peft; a CPU and half a minute.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import peftkern

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START = len(LETTERS)
LENGTH = 9
# Task -> the letter that follows letter i.
TASKS = {
    "upward": lambda i: (i + 1) % 26,
    "downward": lambda i: (i - 1) % 26,
    "skip": lambda i: (i + 3) % 26,
    "mirror": lambda i: 25 - i,
}


def base_model() -> LlamaForCausalLM:
    """A frozen causal language model over the alphabet, random but always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1, bos_token_id=START,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def series(task: str, first: int, length: int) -> list[int]:
    """``length`` letters of a task, the start symbol before them."""
    letters = [first]
    while len(letters) < length:
        letters.append(TASKS[task](letters[-1]))
    return [START, *letters]


def train(model: LlamaForCausalLM, folder: Path, steps: int, rows: int = 8) -> None:
    """Train one adapter per task, all in one batch per step, and save them as ``folder/<task>``."""
    tuned = None
    for number, task in enumerate(TASKS):
        config = peft.LoraConfig(
            r=4 + 4 * number, lora_alpha=16, lora_dropout=0.02 * number, use_rslora=number % 2 == 1,
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM",
        )  # fmt: skip
        if tuned is None:
            tuned = peft.get_peft_model(model, config, adapter_name=task)
        else:
            tuned.add_adapter(task, config)
    print(peftkern.accelerate(tuned))
    tuned.base_model.set_adapter(list(TASKS))  # all four are trained
    tuned.train()
    optimiser = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.0)
    names = [task for task in TASKS for _ in range(rows)]
    begin = time.perf_counter()
    for step in range(steps):
        batch = torch.tensor([series(task, random.randrange(26), LENGTH) for task in names])
        logits = tuned(batch, adapter_names=names).logits[:, 1:-1]  # the first letter is free
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 2:], reduction="none")
        losses.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % max(steps // 4, 1) == 0 or step == steps - 1:
            each = losses.detach().view(len(TASKS), -1).mean(1)
            print(f"step {step:4d}  " + "  ".join(f"{task} {loss:.3f}" for task, loss in zip(TASKS, each)))
    print(f"{steps} steps of {rows} sequences for each of 4 adapters: {time.perf_counter() - begin:.1f} s")
    tuned.save_pretrained(folder, save_embedding_layers=False)  # else it saves the frozen lm_head along
    peftkern.restore(tuned)
    tuned.unload()


def noisy_copies(folder: Path, total: int) -> dict[str, Path]:
    """{name: folder} of the four checkpoints and of copies with a little noise, ``total`` in all."""
    folders = {task: folder / task for task in TASKS}
    generator = torch.Generator().manual_seed(1)
    for number in range(total - len(TASKS)):
        task = list(TASKS)[number % len(TASKS)]
        copy = folder / f"{task}-{number}"
        copy.mkdir()
        shutil.copy(folders[task] / "adapter_config.json", copy)
        tensors = load_file(folders[task] / "adapter_model.safetensors")
        for tensor in tensors.values():
            tensor += 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, copy / "adapter_model.safetensors")
        folders[copy.name] = copy
    return folders


def decode(model: LlamaForCausalLM, prompts: torch.Tensor) -> list[str]:
    """The letters that follow each prompt, greedily."""
    new = LENGTH - 1
    tokens = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=START,
    )  # fmt: skip
    return ["".join((*LETTERS, "_")[i] for i in row) for row in tokens[:, prompts.shape[1] :].tolist()]


def serve(model: LlamaForCausalLM, folders: dict[str, Path], rows: int) -> bool:
    """Decode one mixed batch, then each of its prompts alone. True if the answers are the same."""
    begin = time.perf_counter()
    multi = peftkern.attach_adapters(model.eval(), folders)
    print(f"\n{multi} in {time.perf_counter() - begin:.1f} s")
    choose = random.Random(2)
    names = [None, *TASKS, *choose.sample(list(folders), rows - len(TASKS) - 1)]
    firsts = [choose.randrange(26) for _ in names]
    prompts = torch.tensor([[START, first] for first in firsts])
    begin = time.perf_counter()
    with multi.use(names):
        together = decode(model, prompts)
    batched = time.perf_counter() - begin
    begin = time.perf_counter()
    alone = []
    for name, prompt in zip(names, prompts):
        with multi.use([name]):
            alone += decode(model, prompt[None])
    single = time.perf_counter() - begin
    print(f"{'adapter':<14} prompt  in the batch  alone     same  as trained")
    for name, first, ours, expected in zip(names, firsts, together, alone):
        rule = "-"
        if name is not None:
            right = "".join(LETTERS[i] for i in series(name.partition("-")[0], first, LENGTH)[2:])
            rule = "yes" if ours == right else "no"
        same = "yes" if ours == expected else "NO"
        print(f"{name or '(base)':<14} {LETTERS[first]:<7} {ours:<13} {expected:<9} {same:<5} {rule}")
    print(f"{rows} prompts in one batch: {batched:.2f} s; one after the other: {single:.2f} s")
    multi.detach()
    return together == alone


def main() -> int:
    """Run the example; 0 if every row of the batch equals its adapter alone."""
    parser = argparse.ArgumentParser(description="Train four adapters in one batch, serve a hundred in one batch.")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--adapters", type=int, default=100, help="adapters attached, at least 20")
    parser.add_argument("--rows", type=int, default=16, help="prompts of the mixed batch, 5 to 20")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    random.seed(0)
    model = base_model()
    with tempfile.TemporaryDirectory() as folder:
        train(model, Path(folder), options.steps)
        same = serve(model, noisy_copies(Path(folder), max(options.adapters, 20)), min(max(options.rows, 5), 20))
    print("every row equals its adapter run alone" if same else "ROWS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""One rank of a two-process training run on gloo: ``distributed_worker.py ddp|fsdp2 STORE RANK`` prints JSON.

Trains the same tiny model with stock PEFT and with accelerated PEFT, each rank on its own data.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import torch
import torch.distributed as dist

import peftkern
from peftkern.integrations import hf_peft_forward

torch.set_num_threads(1)
_calls = 0


def _count(*args, **kwargs):
    global _calls
    _calls += 1
    return peftkern.lora_linear(*args, **kwargs)


def _model():
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), settings)


def _wrap(model, strategy):
    if strategy == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def _train(model, rank):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(4):
        g = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(0, 64, (2, 8), generator=g)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def main(strategy: str, store: str, rank: int) -> None:
    """Run this rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    hf_peft_forward.lora_linear = _count
    stock = _model()
    ours = copy.deepcopy(stock)
    result = {"stock": _train(_wrap(stock, strategy), rank)}
    # Accelerated before or after wrapping: both must do.
    if strategy == "ddp":
        peftkern.accelerate(ours)
        wrapped = _wrap(ours, strategy)
    else:
        wrapped = _wrap(ours, strategy)
        peftkern.accelerate(wrapped)
    result["ours"] = _train(wrapped, rank)
    result["fused_calls"] = _calls
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in ours.parameters() if p.requires_grad]
    result["weights"] = [p.double().sum().item() for p in full]
    print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # At interpreter exit torch sometimes aborts on a thread of FSDP that is still joinable; nothing is left to do.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

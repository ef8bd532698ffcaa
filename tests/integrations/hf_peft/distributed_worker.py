"""One rank of training runs in two processes on gloo: ``distributed_worker.py STORE RANK`` prints JSON.

For every way to distribute a model: the same tiny model, trained with stock PEFT and with accelerated PEFT, each rank on
its own data; what the report said, and what ran.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import sys
import warnings

import peft
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peftkern

STEPS = 2
torch.set_num_threads(1)


def _model(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), settings)


def _blocks(model):
    return [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]


def _fsdp2(model, apart=False):
    if apart:
        for name, module in list(model.named_modules()):
            if "lora_" in name and isinstance(module, torch.nn.Linear):
                fully_shard(module)
    for block in _blocks(model):
        fully_shard(block)
    return fully_shard(model)


def _fsdp1(model, use_orig_params=True, policy=None):
    policy = policy or functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=cpu)


def _peft_policy(model, use_orig_params):
    return _fsdp1(model, use_orig_params, peft.utils.other.fsdp_auto_wrap_policy(model))


def _checkpointed(wrap, reentrant):
    def checkpointed(model):
        inner = model.base_model.model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inner.enable_input_require_grads()
        return wrap(model)

    return checkpointed


def _hooked(wrap):
    def hooked(model):
        for name, module in model.named_modules():
            if name.endswith("lora_dropout.default"):
                module.register_forward_hook(lambda *args: None)
        return wrap(model)

    return hooked


_apart = functools.partial(_fsdp2, apart=True)
_policy, _flat = (functools.partial(_peft_policy, use_orig_params=flag) for flag in (True, False))

# Name -> how the model is wrapped, whether that comes before accelerate, options of the adapter.
STRATEGIES = {
    "ddp": (torch.nn.parallel.DistributedDataParallel, False, {}),
    "fsdp2": (_fsdp2, True, {}),
    "fsdp2, accelerated before": (_fsdp2, False, {"bias": "lora_only"}),
    "fsdp2, adapters apart": (_apart, False, {}),
    "fsdp2, adapters apart, checkpointed": (_checkpointed(_apart, False), True, {"lora_bias": True}),
    "fsdp1": (_fsdp1, True, {"bias": "lora_only"}),
    "fsdp1, accelerated before": (_fsdp1, False, {"lora_bias": True}),
    "fsdp1, PEFT's policy": (_policy, False, {}),
    "fsdp1, PEFT's policy, flat": (_flat, True, {}),
    "fsdp1, PEFT's policy, checkpointed": (_checkpointed(_policy, True), True, {}),
    "fsdp1, PEFT's policy, hooked": (_hooked(_policy), False, {}),
    "fsdp2, adapters apart, hooked": (_hooked(_apart), False, {}),
}


def _train(model, rank):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(0, 64, (2, 8), generator=g)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    else:
        whole = contextlib.nullcontext()
    with whole:
        # Sums of squares, since the order of parameters is the wrapper's.
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters() if p.requires_grad]
        weights = sorted(p.double().square().sum().item() for p in full)
    return {"losses": losses, "weights": weights}


def _squares(model):
    return sorted(p.double().square().sum().item() for p in model.parameters() if p.requires_grad)


def _run(wrap, wrapped_before, options, rank):
    stock = _model(**options)
    ours = copy.deepcopy(stock)
    result = {"before": _squares(stock), "stock": _train(wrap(stock), rank)}
    if wrapped_before:
        model = wrap(ours)
        report = peftkern.accelerate(model)
    else:
        report = peftkern.accelerate(ours)
        model = wrap(ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result["ours"] = _train(model, rank)
    status = peftkern.status(model)
    result |= {
        "accelerated": len(report.accelerated), "skipped": report.skipped,
        "fused": status.fused, "stock calls": status.stock, "reasons": status.reasons,
        "warnings": [str(w.message) for w in caught if "peftkern" in str(w.message)],
    }  # fmt: skip
    return result


def main(store: str, rank: int) -> None:
    """Run this rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    print(json.dumps({name: _run(*strategy, rank) for name, strategy in STRATEGIES.items()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # At interpreter exit torch sometimes aborts on a thread of FSDP that is still joinable; nothing is left to do.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

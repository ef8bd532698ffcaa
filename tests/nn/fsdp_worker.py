"""LoRALinear inside FSDP, in a process of its own: prints, as JSON, what it trains to."""

from __future__ import annotations

import json
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import peftkern.nn.lora as ours
from peftkern import LoRALinear

torch.set_num_threads(1)
CPU = {"use_orig_params": True, "device_id": torch.device("cpu")}
_fused = 0


def _counted(function):
    def count(*args, **kwargs):
        global _fused
        _fused += 1
        return function(*args, **kwargs)

    return count


def _model():
    torch.manual_seed(0)
    # The last layer's input needs a gradient, and so the weights of a gathered parameter in backward.
    model = nn.Sequential(
        LoRALinear(10, 6, r=3), nn.Tanh(), LoRALinear(6, 5, r=2, train_bias=True), nn.Tanh(),
        LoRALinear(5, 4, r=2, use_dora=True),
    )  # fmt: skip
    for layer in model[::2]:
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def _whole(model):
    return FullyShardedDataParallel(model, **CPU)


def _apart(model):
    for i in (0, 2, 4):
        model[i] = FullyShardedDataParallel(model[i], **CPU)
    return FullyShardedDataParallel(model, **CPU)


def _fsdp2(model):
    for i in (0, 2, 4):
        fully_shard(model[i])
    return fully_shard(model)


def _train(model):
    global _fused
    _fused = 0
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def _parameters(model):
    if not isinstance(model, FullyShardedDataParallel):
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for n, p in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model):
        named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
        return {n: named[n].tolist() for n in ("0.weight", "0.bias", "0.lora_A", "0.lora_B", *sorted(named))}


def _merge(model):
    # Adapters merged into the flat parameter stay there.
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    x = torch.randn(4, 10)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = model.eval()(x)
        with FullyShardedDataParallel.summon_full_params(model):
            for layer in layers:
                layer.merge()
        return ((model(x) - y).abs().max() / y.abs().max()).item(), all(layer.merged for layer in layers)


def main() -> None:
    """Train alone, then in each wrapping."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ours.lora_linear, ours.dora_linear = _counted(ours.lora_linear), _counted(ours.dora_linear)
    result = {}
    for name, wrap in {"alone": lambda model: model, "whole": _whole, "apart": _apart, "fsdp2": _fsdp2}.items():
        model = wrap(_model())
        result[name] = {"losses": _train(model), "fused": _fused, "parameters": _parameters(model)}
        if name in ("whole", "apart"):
            result[name]["merge"] = _merge(model)
    print(json.dumps(result), flush=True)
    # At interpreter exit torch sometimes aborts on a thread of FSDP that is still joinable.
    os._exit(0)


if __name__ == "__main__":
    main()

"""What one call of a small layer costs, and whether an accelerated layer is ever slower than PEFT's own.

    python -m peftkern.benchmarks.small calls --json FILE      microseconds of a call, by way of calling, one thread
    python -m peftkern.benchmarks.small shapes --json FILE     random shapes: accelerated over stock, interleaved
    python -m peftkern.benchmarks.small models --json FILE     whole small models: accelerated over stock
    python -m peftkern.benchmarks.small models --only DoRA --seconds 60        one of them

Everything is fp32 on the CPU. All that is compared takes turns within one run; a figure is a median.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import peftkern

from .core import machine
from .core.result import write
from .measure.interference import Meter
from .measure.timing import copy_bandwidth, quiet
from .tables.markdown import table

ROWS, SIZE, RANK, CHAIN = 8, 64, 8, 20
# Of a random shape: rows, and in_features and out_features.
MOST_ROWS, LEAST, MOST = 512, 16, 2048
# A shape that seems slower than stock is measured again so often before it counts.
AGAIN, SLOWER = 3, 0.97

Timed = dict[str, Callable[[], object]]


def medians(calls: Timed, seconds: float, batch: int = 1) -> dict[str, float]:
    """Median seconds of each call: rounds in turn, the order rotating, ``batch`` calls a round."""
    for call in calls.values():
        call()
    start = time.perf_counter()
    for call in calls.values():
        call()
    once = max(time.perf_counter() - start, 1e-6) * batch
    names, times = list(calls), {name: [] for name in calls}
    with quiet():
        for k in range(max(11, min(2000, int(seconds / once)))):
            for i in range(len(names)):
                name = names[(i + k) % len(names)]
                call = calls[name]
                start = time.perf_counter()
                for _ in range(batch):
                    call()
                times[name].append((time.perf_counter() - start) / batch)
    return {name: statistics.median(t) for name, t in times.items()}


def peft_layer(K: int, N: int, dropout: float, rank: int = RANK) -> nn.Module:
    """PEFT's LoRA layer on an nn.Linear, with an adapter that is not zero."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False
    )
    return peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config).base_model.model[0]


def step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    """A training step of one layer, gradients dropped again."""
    leaves = [p for p in layer.parameters() if p.requires_grad] if isinstance(layer, nn.Module) else []

    def run() -> None:
        torch.autograd.grad(layer(x), [x, *leaves], dy)

    return run


def calls() -> list[dict]:
    """Microseconds of one small call for each way of calling, one thread."""
    torch.set_num_threads(1)
    x, weight = torch.randn(ROWS, SIZE), torch.randn(SIZE, SIZE) / 8
    A, B, bias = torch.randn(RANK, SIZE) / 8, torch.randn(SIZE, RANK), torch.randn(SIZE)
    stock = peft_layer(SIZE, SIZE, 0.0)
    ours = copy.deepcopy(stock)
    peftkern.accelerate(ours)
    bank = peftkern.AdapterBank(SIZE, SIZE, max_adapters=32, max_rank=RANK)
    for name in "abcdefgh":
        bank.add(name, A, B, 2.0)
    ids, linear = bank.ids(list("abcdefgh")), torch.nn.functional.linear
    forward: Timed = {
        "F.linear": lambda: linear(x, weight, bias),
        "lora_linear": lambda: peftkern.lora_linear(x, weight, A, B, bias=bias, scaling=2.0),
        "multi_lora_linear, bank": lambda: peftkern.multi_lora_linear(x, weight, bank, ids, bias=bias),
        "nn.Linear": lambda: stock.base_layer(x),
        "PEFT": lambda: stock(x),
        "accelerated": lambda: ours(x),
    }
    with torch.no_grad():
        rows = [row("forward", name, s) for name, s in medians(forward, 6.0, batch=20).items()]

    frozen = nn.Linear(SIZE, SIZE).requires_grad_(False)

    def chain(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        first, dy = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(ROWS, SIZE)

        def through(h: Tensor) -> Tensor:
            for _ in range(CHAIN):
                h = layer(h)
            return h

        leaves = [p for p in layer.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(through(first), [first, *leaves], dy)

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

        def forward(self, h: Tensor) -> Tensor:
            return peftkern.lora_linear(h, weight, self.A, self.B, bias=bias, scaling=0.1)

    chains: Timed = {
        "frozen nn.Linear": chain(frozen), "lora_linear": chain(Function()), "PEFT": chain(stock), "accelerated": chain(ours)
    }  # fmt: skip
    rows += [row("forward + backward in a chain", name, s / CHAIN) for name, s in medians(chains, 8.0).items()]
    return rows


def row(which: str, provider: str, seconds: float, **more: object) -> dict:
    """One row of the result."""
    return dict(
        op="small", device="cpu", dtype="fp32", M=ROWS, K=SIZE, N=SIZE, R=RANK, provider=provider, which=which,
        median_us=round(1e6 * seconds, 2), **more,
    )  # fmt: skip


def shapes(count: int, seed: int, seconds: float) -> list[dict]:
    """Accelerated against stock PEFT on random shapes: evaluation, training, training with dropout."""
    rng, rows = random.Random(seed), []

    def size(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    for i in range(count):
        M, K, N, rank = size(1, MOST_ROWS), size(LEAST, MOST), size(LEAST, MOST), rng.choice((4, 8, 16, 32))
        which = ("evaluation", "training", "training, dropout 0.1")[i % 3]
        stock = peft_layer(K, N, 0.1 if "dropout" in which else 0.0, rank).train(which != "evaluation")
        ours = copy.deepcopy(stock)
        peftkern.accelerate(ours)
        x, dy = torch.randn(M, K, requires_grad=which != "evaluation"), torch.randn(M, N)
        for layer in (stock, ours):
            for name, p in layer.named_parameters():
                p.requires_grad_("lora_" in name)
        pair: Timed = {"PEFT": lambda: stock(x), "accelerated": lambda: ours(x)}  # noqa: B023  (called at once)
        if which != "evaluation":
            pair = {"PEFT": step(stock, x, dy), "accelerated": step(ours, x, dy)}
        tried = []
        with torch.set_grad_enabled(which != "evaluation"):
            while len(tried) == 0 or (tried[-1] < SLOWER and len(tried) <= AGAIN):
                found = medians(pair, seconds)
                tried.append(found["PEFT"] / found["accelerated"])
        rows.append(
            dict(op="small", device="cpu", dtype="fp32", M=M, K=K, N=N, R=rank, which=which, provider="accelerated",
                 median_us=round(1e6 * found["accelerated"], 1), speed_up=round(tried[-1], 3), tried=len(tried))
        )  # fmt: skip
        print(f"{i + 1:3}/{count}  {M}x{K}x{N} R={rank} {which}: {tried[-1]:.3f}", file=sys.stderr)
    return rows


def _llama(batch: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    ids = torch.randint(1, 2048, (batch, 16))

    def generate(model: nn.Module) -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, min_new_tokens=16,
                pad_token_id=0,
            )  # fmt: skip

    return model, generate


def encoder(sizes: dict, rows: int, length: int, **options: object) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """A BERT of these sizes with LoRA, its options beside, on all linear layers, and a training step of rows x length tokens."""
    import peft
    import transformers

    targets = ["query", "key", "value", "dense"]
    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=targets, **options)
    model = peft.get_peft_model(transformers.BertModel(transformers.BertConfig(**sizes)), lora).train()
    ids = torch.randint(1, model.config.vocab_size, (rows, length))

    def train(model: nn.Module) -> None:
        model(ids).last_hidden_state.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return model, train


SMALL = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
MINI = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
MODELS = {
    "Llama, 12 layers of 256, generating, batch 1": lambda: _llama(1),
    "Llama, 12 layers of 256, generating, batch 8": lambda: _llama(8),
    "MiniLM's sizes, a training step, 4 x 24 tokens": lambda: encoder(MINI, 4, 24),
    "BERT of hidden 128, a training step, 8 x 32 tokens": lambda: encoder(SMALL, 8, 32),
    "MiniLM's sizes, DoRA, a training step, 32 x 48 tokens": lambda: encoder(MINI, 32, 48, use_dora=True),
}


def models(seconds: float, only: str = "") -> list[dict]:
    """Whole models: stock over accelerated, in turns. ``only``: those whose name has it."""
    rows = []
    for words in (words for words in MODELS if only in words):
        model, run = MODELS[words]()
        ours = copy.deepcopy(model)
        peftkern.accelerate(ours)
        pair = {"PEFT": lambda: run(model), "accelerated": lambda: run(ours)}  # noqa: B023  (called at once)
        found = medians(pair, seconds)
        speed_up = found["PEFT"] / found["accelerated"]
        print(f"{words}: {speed_up:.3f}", file=sys.stderr)
        rows.append(
            dict(op="small", device="cpu", dtype="fp32", R=16, which=words, provider="accelerated",
                 median_us=round(1e6 * found["accelerated"], 1), speed_up=round(speed_up, 3))
        )  # fmt: skip
    return rows


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for the documents."""
    if "tried" in rows[0]:
        return _shapes(rows, dtype)
    if "speed_up" in rows[0]:
        lines = table(["", "milliseconds", "over PEFT"], [
            [r["which"], f"{r['median_us'] / 1e3:.1f}", f"{r['speed_up']:.2f}x"] for r in rows
        ])  # fmt: skip
        return [f"{dtype}, small models, accelerated", "", *lines]
    lines = table(["", "", "microseconds"], [[r["which"], r["provider"], f"{r['median_us']:.1f}"] for r in rows])
    return [f"{dtype}, {ROWS} x {SIZE} x {SIZE}, rank {RANK}, one thread; a chain has {CHAIN} layers", "", *lines]


def _shapes(rows: list[dict], dtype: str) -> list[str]:
    lines = []
    for which in dict.fromkeys(r["which"] for r in rows):
        ratios = sorted(r["speed_up"] for r in rows if r["which"] == which)
        lines.append(
            [which, str(len(ratios)), *(f"{x:.2f}x" for x in (ratios[0], statistics.median(ratios), ratios[-1]))]
        )
    return [
        f"{dtype}, random shapes (M 1 to {MOST_ROWS}, K and N {LEAST} to {MOST}), accelerated over PEFT",
        "",
        *table(["", "shapes", "least", "median", "most"], lines),
    ]


def summary(what: str, rows: list[dict]) -> str:
    """What the command prints."""
    if what == "calls":
        return "\n".join(f"{r['which']:<30} {r['provider']:<24} {r['median_us']:8.2f} us" for r in rows)
    ratios = [r["speed_up"] for r in rows]
    slow = sum(ratio < SLOWER for ratio in ratios)
    return f"median {statistics.median(ratios):.3f}, least {min(ratios):.3f}, {slow} of {len(ratios)} below {SLOWER}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    p = argparse.ArgumentParser(
        prog="python -m peftkern.benchmarks.small", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("what", choices=("calls", "shapes", "models"))
    p.add_argument("--count", type=int, default=60, help="random shapes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=1.0, help="for each shape or model")
    p.add_argument("--only", default="", metavar="WORDS", help="of models, those whose name has these")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    if args.what == "models" and not any(args.only in words for words in MODELS):
        p.error(f"--only: no model's name has {args.only!r}; there are {'; '.join(MODELS)}")
    torch.manual_seed(args.seed)
    meter = Meter()
    meter.restart()
    rows = {
        "calls": calls,
        "shapes": lambda: shapes(args.count, args.seed, args.seconds),
        "models": lambda: models(args.seconds, args.only),
    }[args.what]()
    print(summary(args.what, rows))
    print(f"other processes took {meter.cores():.2f} cores meanwhile", file=sys.stderr)
    if args.json:
        header = machine.header("cpu", copy_bandwidth("cpu")) | {
            "op": f"small_{args.what}",
            "command": json.dumps(sys.argv[1:]),
        }
        write(args.json, {"schema": 1, "header": header, "rows": rows, "reruns": []})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast a small causal LM generates with an adapter for every prompt: HF PEFT's own code against ``accelerate``.

    python -m peftkern.benchmarks.generate --json FILE

A Llama of a few million random parameters (``--hidden 1024``: a hundred), LoRA on all of its linear layers, greedy decoding of a
batch whose prompts name different adapters (``adapter_names``). Providers take turns: the model without adapters, PEFT, peftkern.
Before anything is timed, what peftkern generates must equal what PEFT generates for each prompt alone. In bf16 rounding decides
near ties, and PEFT's own tokens of a batch are others too: there the logits must be as near to those of fp32 as PEFT's are.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import peftkern
from peftkern.screen import Console, Progress

from .core import machine
from .core.result import write
from .measure import interference
from .measure.interference import Meter
from .measure.timing import copy_bandwidth, quiet

BASE, PEFT, OURS = "base", "peft", "peftkern"
SPEED_UP = 2.0
# Of a half-precision model, the error of logits over that of PEFT's.
ERROR = 1.5
VOCABULARY = 2048
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# hidden size: layers, intermediate size, heads.
SIZES = {256: (4, 688, 8), 1024: (8, 2816, 16)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_of(adapters: int, rank: int, hidden: int = 256, dtype: str = "fp32"):
    """A PEFT model with ``adapters`` adapters of random weights, in evaluation mode."""
    import peft
    import transformers

    torch.manual_seed(0)
    layers, intermediate, heads = SIZES[hidden]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.05, bos_token_id=0, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    config = (
        transformers.LlamaForCausalLM(config).to(DTYPES[dtype]),
        peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    model = peft.get_peft_model(*config, adapter_name="adapter0")
    for i in range(1, adapters):
        model.add_adapter(f"adapter{i}", config[1])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    return model.eval()


class Batch:
    """Prompts and the adapter of each, in turn."""

    def __init__(self, prompts: int, adapters: int, length: int, new_tokens: int):
        self.ids = torch.randint(1, VOCABULARY, (prompts, length), generator=torch.Generator().manual_seed(1))
        self.names = [f"adapter{i % adapters}" for i in range(prompts)]
        self.options = dict(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)

    def generate(self, model, rows: slice = slice(None), **options) -> torch.Tensor:
        """The new tokens of some prompts."""
        return self._run(model, rows, **options).sequences[:, self.ids.shape[1] :]

    def _run(self, model, rows: slice = slice(None), **options):
        ids = self.ids[rows]
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **self.options, **options
        )  # fmt: skip

    def mixed(self, model) -> torch.Tensor:
        """All prompts at once, each with its adapter."""
        return self.generate(model, adapter_names=self.names)

    def base(self, model) -> torch.Tensor:
        """All prompts at once, without any."""
        with model.disable_adapter():
            return self.generate(model)

    def alone(self, model) -> torch.Tensor:
        """One after the other, each with its adapter switched on."""
        found = []
        for i, name in enumerate(self.names):
            model.set_adapter(name)
            found.append(self.generate(model, slice(i, i + 1)))
        return torch.cat(found)

    def error(self, model, exact) -> float:
        """Relative error of the logits by which ``model`` chose, all prompts at once, against ``exact`` on each prompt alone."""
        found = self._run(model, adapter_names=self.names, output_logits=True)
        right = []
        for i, name in enumerate(self.names):
            exact.set_adapter(name)
            right.append(exact(input_ids=found.sequences[i : i + 1]).logits[:, self.ids.shape[1] - 1 : -1])
        right = torch.cat(right)
        return ((torch.stack(found.logits, 1) - right).norm() / right.norm()).item()


def wrong(theirs, ours, batch: Batch) -> str | None:
    """Why what ``ours`` generates is not what PEFT's model does, or None."""
    if theirs.dtype == torch.float32:
        return None if torch.equal(batch.mixed(ours), batch.alone(theirs)) else "DIFFERS from each prompt alone"
    exact = copy.deepcopy(theirs).float()
    mine, right = batch.error(ours, exact), batch.error(theirs, exact)
    return (
        None if mine <= ERROR * right else f"DIFFERS from fp32: relative error of logits {mine:.1e}, PEFT's {right:.1e}"
    )


def measure(theirs, ours, batch: Batch, repeats: int, progress: Progress) -> dict[str, list[float]]:
    """Seconds of each provider, in turns: PEFT's own code on one model, peftkern's on another. A round is one unit of
    ``progress``, and so is the one before the first that is timed."""
    providers: dict[str, Callable[[], torch.Tensor]] = {
        BASE: lambda: batch.base(theirs), PEFT: lambda: batch.mixed(theirs), OURS: lambda: batch.mixed(ours)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    with quiet():
        for k in range(repeats + 1):
            for name, f in providers.items():
                progress.say(f"round {k} of {repeats}: {name}" if k else f"warming up: {name}")
                start = time.perf_counter()
                f()
                if k:
                    seconds[name].append(time.perf_counter() - start)
            progress.advance()
    return seconds


def markdown(rows: list[dict], dtype: str) -> list[str]:
    """Lines for README."""
    first = rows[0]
    lines = [
        f"{dtype}, greedy, {first['prompts']} prompts with {first['adapters']} adapters of rank {first['R']} on every "
        f"linear layer of a Llama with {first['parameters'] / 1e6:.1f} M parameters, {first['new_tokens']} new tokens",
        "",
        "| | seconds | tokens per second | over PEFT |",
        "|---|---|---|---|",
    ]
    words = {BASE: "without adapters", PEFT: "PEFT, `adapter_names`", OURS: "**`accelerate`**, `adapter_names`"}
    for r in rows:
        speed = "" if r["provider"] == BASE else f"{r['speed_up']:.2f}x"
        lines.append(
            f"| {words[r['provider']]} | {r['median_ms'] / 1e3:.2f} | {r['tokens_per_s']:.0f} | {speed} |"
        )  # fmt: skip
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 1 if a token differs, or the speed-up is under its limit."""
    p = argparse.ArgumentParser(prog="python -m peftkern.benchmarks.generate", description=__doc__.splitlines()[0])
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--adapters", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--hidden", type=int, choices=SIZES, default=256, help="hidden size of the model")
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model; adapters stay fp32")
    p.add_argument("--length", type=int, default=16, help="tokens of a prompt")
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    model, accelerated = (model_of(args.adapters, args.rank, args.hidden, args.dtype) for _ in range(2))
    peftkern.accelerate(accelerated)
    batch = Batch(args.prompts, args.adapters, args.length, args.new_tokens)
    meter = Meter()
    with torch.inference_mode(), Console().progress(args.repeats + 2) as progress:
        progress.say("each prompt alone, for comparison")
        fault = wrong(model, accelerated, batch)
        progress.advance()
        meter.restart()
        seconds = measure(model, accelerated, batch, args.repeats, progress)
    others = meter.cores()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    quarters = {
        name: statistics.quantiles(times, n=4) if len(times) > 1 else times * 3 for name, times in seconds.items()
    }
    tokens = args.prompts * args.new_tokens
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    rows = [
        dict(
            op="generate", device="cpu", dtype=args.dtype, provider=name, prompts=args.prompts, adapters=args.adapters,
            R=args.rank, parameters=parameters, prompt_tokens=args.length, new_tokens=args.new_tokens,
            median_ms=1e3 * seconds, p25_ms=1e3 * quarters[name][0], p75_ms=1e3 * quarters[name][2],
            tokens_per_s=tokens / seconds, speed_up=medians[PEFT] / seconds,
            equals_each_prompt_alone=fault is None if name == OURS else None, others_cores=others,
        )
        for name, seconds in medians.items()
    ]  # fmt: skip
    speed_up = medians[PEFT] / medians[OURS]
    print("\n".join(markdown(rows, args.dtype)))
    words, _ = interference.words({"rows": rows, "header": {}})
    same = "equal to each prompt alone" if args.dtype == "fp32" else "as near to fp32 as PEFT"
    print(f"{fault or same}; {speed_up:.2f} times as fast as PEFT; {words}")
    if args.json:
        header = machine.header("cpu", copy_bandwidth("cpu")) | {"op": "generate", "command": json.dumps(sys.argv[1:])}
        write(args.json, {"schema": 1, "header": header, "rows": rows, "reruns": []})
    return int(fault is not None or speed_up < SPEED_UP)


if __name__ == "__main__":
    sys.exit(main())

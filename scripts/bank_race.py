"""Threads that read and change an AdapterBank, for ThreadSanitizer; scripts/sanitize_threads.sh runs it.

ThreadSanitizer sees what the extension reads and writes, and the locks of Python (a hand-over of the interpreter's lock
orders what was done before it). It does not see torch's own code. So the memory that the bank gives out for another
adapter is first overwritten by the extension: if a call could still be reading it, that is a race, and is reported.

    python scripts/bank_race.py [--seconds S] [--broken]        --broken gives memory back at once, which must be reported
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time

import torch

from peftkern import AdapterBank, multi_lora_linear, sgmv
from peftkern.backends import cpu_native
from peftkern.chunks import Chunks

K, N, READERS, WRITERS = 96, 80, 4, 4
ROWS, RANK = 400, 32  # enough for a call to be in the kernels most of the time


def overwrite_what_is_given_out() -> None:
    """Every range is full of NaN, written by the extension, when the bank gets it."""
    take, nan = Chunks.take, torch.full((1, 1), float("nan"))

    def overwritten(self, size: int):
        found = take(self, size)
        memory = self.tensors[found.chunk].data[found.offset : found.offset + found.size]
        cpu_native.scale_copy(nan.expand(1, found.size), memory.view(1, -1))
        return found

    Chunks.take = overwritten


def give_back_at_once() -> None:
    """What the bank must not do: reuse memory that running calls read."""
    Chunks.retire = lambda self, ranges, snapshot, idle=None: self.give_back(ranges)


def entry(value: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter whose branch of ones is ``value * K`` everywhere."""
    return torch.full((rank, K), float(value)), torch.full((N, rank), 1.0 / rank)


def run(seconds: float, check: bool) -> tuple[int, list[str]]:
    """(calls, errors) of threads that forward and threads that add, replace and remove."""
    bank, weight = AdapterBank(K, N, max_adapters=2 * WRITERS, max_rank=RANK), torch.zeros(N, K)
    asked = [i % WRITERS for i in range(ROWS - 1)]
    stop, errors, calls = time.monotonic() + seconds, [], [0] * READERS
    for i in range(WRITERS):
        bank.add(f"a{i}", *entry(i + 1, 1 + i))

    def reader(number: int) -> None:
        x = torch.ones(ROWS, K)
        while time.monotonic() < stop and not errors:
            ids = bank.ids([*(f"a{i}" for i in asked), None])
            y = (sgmv(x, bank, ids) if calls[number] % 2 else multi_lora_linear(x, weight, bank, ids)) / K
            found = (y.round()[:, 0].long() % 8).tolist()
            whole = torch.allclose(y, y[:, :1].expand_as(y), atol=1e-3)
            if check and (found != [*(i + 1 for i in asked), 0] or not whole):
                errors.append(f"rows of another adapter, or of parts of two: {found}")
            calls[number] += 1

    def writer(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < stop and not errors:
            value = number + 1 + 8 * choose.randrange(64)
            bank.replace(f"a{number}", *entry(value, choose.randint(1, RANK)))
            bank.add(f"extra{number}", *entry(value + 4, choose.randint(1, RANK)))
            bank.remove(f"extra{number}")

    def guarded(work, number: int) -> None:
        try:
            work(number)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(reader, i)) for i in range(READERS)]
    threads += [threading.Thread(target=guarded, args=(writer, i)) for i in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(calls), errors


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--broken", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # ThreadSanitizer knows nothing of OpenMP's barriers
    overwrite_what_is_given_out()
    if args.broken:
        give_back_at_once()
    calls, errors = run(args.seconds, check=not args.broken)
    print(f"{calls} calls, {errors[0] if errors else 'no wrong row'}")
    return int(bool(errors) or calls == 0)


if __name__ == "__main__":
    sys.exit(main())

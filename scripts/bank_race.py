"""Threads that read and change an AdapterBank, for ThreadSanitizer; scripts/sanitize_threads.sh runs it.

ThreadSanitizer sees what the extension reads and writes, and the locks of Python (a hand-over of the interpreter's lock
orders what was done before it). It does not see torch's own code. So what the bank is about to write, memory that it
gives out for another adapter and a table whose row it changes, is first overwritten by the extension: if a call could
still be reading it, that is a race, and is reported.

    python scripts/bank_race.py [--seconds S] [--broken memory|table]

--broken memory gives memory back at once, --broken table writes every row in place: both must be reported.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time

import torch

from peftkern import AdapterBank, multi_lora_linear, sgmv
from peftkern.backends.cpu.native import _C
from peftkern.backends.marshal import CODES
from peftkern.many.chunks import Chunks
from peftkern.many.rows import Rows

K, N, READERS, WRITERS = 96, 80, 4, 4
ROWS, RANK = 400, 32  # enough for a call to be in the kernels most of the time


def overwrite(memory: torch.Tensor, value: float) -> None:
    """Fill fp32 memory with a value, by the extension."""
    source, size, fp32 = torch.tensor([value]), memory.numel(), CODES[torch.float32]
    # One element, read again and again: strides of zero.
    _C.scale_copy(source.data_ptr(), fp32, 0, 0, memory.data_ptr(), fp32, size, 1, 1, size, 0, 1.0, 0, 0, 1)


def overwrite_what_will_be_written() -> None:
    """Every range is full of NaN when the bank gets it, and every table full of zeros before one of its rows is changed."""
    take, write = Chunks.take, Rows.write

    def overwritten(self, size: int):
        found = take(self, size)
        overwrite(self.tensors[found.chunk].data[found.offset : found.offset + found.size], float("nan"))
        return found

    def overwriting(self, slot: int, row, scaling: float):
        for tensor in (self.table, self.scaling):
            kept = tensor.clone()
            overwrite(tensor.view(torch.float32), 0.0)
            tensor.copy_(kept)
        write(self, slot, row, scaling)

    Chunks.take, Rows.write = overwritten, overwriting


def break_it(how: str) -> None:
    """What the bank must not do: use memory again, or write a table, that running calls read."""
    if how == "memory":
        Chunks.retire = lambda self, ranges, held: self.give_back(ranges)
    else:
        Rows.leave = lambda self: None


def entry(value: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter whose branch of ones is ``value * K`` everywhere."""
    return torch.full((rank, K), float(value)), torch.full((N, rank), 1.0 / rank)


def run(seconds: float, check: bool) -> tuple[int, list[str]]:
    """(calls, errors) of threads that forward and threads that add, replace and remove."""
    bank, weight = AdapterBank(K, N, max_adapters=2 * WRITERS, max_rank=RANK), torch.zeros(N, K)
    asked = [i % WRITERS for i in range(ROWS - 1)]
    x, choose = torch.ones(ROWS, K), [random.Random(i) for i in range(WRITERS)]
    stop, errors, calls = time.monotonic() + seconds, [], [0] * READERS
    for i in range(WRITERS):
        bank.add(f"a{i}", *entry(i + 1, 1 + i))

    def reader(number: int) -> None:
        ids = bank.ids([*(f"a{i}" for i in asked), None])
        y = (sgmv(x, bank, ids) if calls[number] % 2 else multi_lora_linear(x, weight, bank, ids)) / K
        found = (y.round()[:, 0].long() % 8).tolist()
        whole = torch.allclose(y, y[:, :1].expand_as(y), atol=1e-3)
        if check and (found != [*(i + 1 for i in asked), 0] or not whole):
            errors.append(f"rows of another adapter, or of parts of two: {found}")
        calls[number] += 1

    def writer(number: int) -> None:
        value = number + 1 + 8 * choose[number].randrange(64)
        bank.replace(f"a{number}", *entry(value, choose[number].randint(1, RANK)))
        bank.add(f"extra{number}", *entry(value + 4, choose[number].randint(1, RANK)))
        bank.remove(f"extra{number}")

    def guarded(work, number: int) -> None:
        while time.monotonic() < stop and not errors:
            try:
                work(number)
            except Exception as error:
                if check:
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
    parser.add_argument("--broken", choices=["memory", "table"])
    args = parser.parse_args()
    torch.set_num_threads(1)  # ThreadSanitizer knows nothing of OpenMP's barriers
    if args.broken:
        break_it(args.broken)
    overwrite_what_will_be_written()
    calls, errors = run(args.seconds, check=not args.broken)
    print(f"{calls} calls, {errors[0] if errors else 'no wrong row'}")
    return int(bool(errors) or calls == 0)


if __name__ == "__main__":
    sys.exit(main())

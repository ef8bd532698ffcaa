"""The kernels of the benchmark's peers compile for every architecture without spills, as a GPU would be given them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is an optional dependency")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftkern.benchmarks.peers import padded, padded_kernels, split_kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
         torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages")
# sm_120 has the registers of sm_90 and less shared memory.
ARCHS = (80, 90, 100, 120)


class Recorder:
    """Stands for a kernel: keeps the arguments of each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, args)), named))


def _launches(monkeypatch, module, names, call):
    launches = []
    for name in names:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    call()
    return launches


def _compiled(kernel, args, named, arch):
    constants = {k: v for k, v in named.items() if k not in OPTIONS}
    options = {k: v for k, v in named.items() if k in OPTIONS}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = args.get(name, constants.get(name))
        if name in constants or value is None or value is True or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _local_bytes(cubin, folder):
    """Stack and local memory of the one kernel of a cubin."""
    file = folder / "k.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)
    assert len(found) == 2, text
    return sum(map(int, found))


def _check(launches, names, arch, tmp_path):
    assert [kernel.fn.__name__ for kernel, _, _ in launches] == names
    for kernel, args, named in launches:
        made = _compiled(kernel, args, named, arch)
        assert made.metadata.shared <= 99 << 10, f"{kernel.fn.__name__}: {made.metadata.shared} bytes of shared memory"
        assert _local_bytes(made.asm["cubin"], tmp_path) == 0, f"{kernel.fn.__name__} spills on sm_{arch}"


# Of two sizes each on two architectures, in turn.
@pytest.mark.parametrize("arch, M", zip(ARCHS, [512, 8192] * 2))
def test_split(monkeypatch, tmp_path, arch, M):
    K, N, R = 4096, 14336, 16
    x, A, y, B = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((M, K), (R, K), (M, N), (N, R)))

    def call():
        dropped, mask, S = split_kernels.drop_shrink(x, A, 0.1)
        split_kernels.add_product(y, S, B, 2.0, None)
        split_kernels.adapter_grad(y, S, B, 2.0)
        split_kernels.add_product(x, S, A.t(), 1 / 0.9, mask)

    names = ["_drop_shrink", "_add_product", "_adapter_grad", "_add_product"]
    _check(_launches(monkeypatch, split_kernels, names[:3], call), names, arch, tmp_path)


@pytest.mark.parametrize("arch, rows, count", [(a, *sizes) for a, sizes in zip(ARCHS, [(64, 64), (4096, 256)] * 2)])
def test_padded(monkeypatch, tmp_path, arch, rows, count):
    K, N, R = 4096, 4096, 16
    x, A, y, B = (torch.empty(*s, dtype=torch.bfloat16, device="meta")
                  for s in ((rows, K), (64, R, K), (rows, N), (64, N, R)))  # fmt: skip
    order, tiles = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((rows,), (count, 3)))
    scaling = torch.empty(64, device="meta")

    def call():
        parts = padded.splits(count, K)
        v = padded_kernels.shrink(x, A, order, tiles, padded.TILE_ROWS, padded.BLOCK_K, parts)
        padded_kernels.expand(y, v, B, order, tiles, scaling, padded.TILE_ROWS)

    names = ["_shrink", "_expand"]
    _check(_launches(monkeypatch, padded_kernels, names, call), names, arch, tmp_path)

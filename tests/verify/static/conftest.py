"""Compiled kernels are kept in this checkout, one folder for each state of its kernels. What of each op is compiled."""

import collections
import functools
import importlib.util
import itertools
import zlib

import pytest

# Kernels without a matrix product: nothing but its instructions makes the code of architectures differ. And in the cases of
# bottleneck_adapter those of lora_linear, which its own cases compile for every architecture.
ALIKE = {
    "add_blocks_kernel", "add_rows_kernel", "dropout_mask_kernel", "finish_kernel", "multi_add_spans_kernel",
    "multi_address_kernel", "multi_finish_kernel", "multi_scale_rows_kernel", "multi_segment_kernel",
}  # fmt: skip
SHARED = {"bottleneck_adapter": {"shrink_kernel", "adapter_grad_kernel"}}


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """TRITON_CACHE_DIR below build/, for the tests of this folder."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from peftkern.verify.static import triton

    with triton.own_cache():
        yield


def _variant(item, arch: int) -> str:
    from peftkern.verify.static import triton

    return triton.key(item, arch).partition(" ")[2]


def _kind(item) -> tuple:
    """What decides by which instructions a kernel multiplies: whether the base product is its own, and the large dtype."""
    from peftkern.verify.static import triton

    large = max(triton.tensors(item).values(), key=lambda t: t.numel())
    return item.name, item.constants.get("GEMM"), large.dtype


@functools.cache
def _chosen(launches, archs: tuple[int, ...]) -> dict[int, list]:
    """By architecture the launches that are compiled: each variant for one of the architectures where it is launched, in
    turn; and the first of each kind that multiplies for all of them."""
    standard = [case for case in launches.STANDARD if case.arch in archs]
    # The others are launched on one architecture, in turn; on sm_120, which has few, all.
    turns = zip(*(launches.more_cases(arch) for arch in archs if arch != 120))
    more = [cases[i % len(cases)] for i, cases in enumerate(turns)]
    more += [case for case in launches.MORE if case.arch == 120 and 120 in archs]
    alike = ALIKE | SHARED.get(launches.__name__.rpartition(".")[2], set())
    found, first = collections.defaultdict(dict), {}
    for case in itertools.chain(standard, more):
        for item in launches.capture(case):
            name = _variant(item, case.arch)
            found[name].setdefault(case.arch, item)
            if item.name not in alike:
                first.setdefault((*_kind(item), case.arch), name)
    chosen = {(sorted(items)[zlib.crc32(name.encode()) % len(items)], name) for name, items in found.items()}
    chosen |= {(arch, name) for (*_, arch), name in first.items()}
    return {arch: [found[name][arch] for a, name in sorted(chosen) if a == arch] for arch in archs}


@pytest.fixture
def reports():
    """(launches, archs, arch) -> what was made of the op's launches on ``arch`` where the tests compile for ``archs``.
    ``peftkern verify --static`` takes every variant on every architecture: here one of them, as ``_chosen`` says."""
    from peftkern.verify.static import triton

    return lambda launches, archs, arch: triton.reports(_chosen(launches, archs)[arch], arch)


@pytest.fixture
def within_bounds(reports):
    """(launches, archs, arch) -> None: what is compiled of the op passes its checks and stays within its recorded bounds."""
    from peftkern.verify.static import records
    from peftkern.verify.static.triton import VERSION

    def check(launches, archs, arch) -> None:
        bounds, unknown, found = records.read(launches.BOUNDS), 0, reports(launches, archs, arch)
        assert found
        for r in found:
            assert not [p for check in launches.CHECKS for p in check(r)], r.key
            assert not records.broken(r.row, bounds.get(r.key, {})), r.key
            unknown += VERSION not in bounds[r.key]
        if unknown:
            pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")

    return check

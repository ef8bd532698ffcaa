"""Compiled kernels are kept in this checkout, one folder for each state of its kernels. What of each case is compiled."""

import collections
import functools
import importlib.util
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


@functools.cache
def _turns(launches) -> dict[str, int]:
    """Of each variant among the standard cases the architecture that it is compiled for, in turn, where one is enough."""
    archs = collections.defaultdict(set)
    alike = ALIKE | SHARED.get(launches.__name__.rpartition(".")[2], set())
    for case in launches.STANDARD:
        for item in launches.capture(case):
            if item.name in alike:
                archs[_variant(item, case.arch)].add(case.arch)
    return {name: sorted(found)[zlib.crc32(name.encode()) % len(found)] for name, found in archs.items()}


@functools.cache
def _reports(launches, case):
    from peftkern.verify.static import triton

    turns = _turns(launches) if case in launches.STANDARD else {}
    items = [i for i in launches.capture(case) if turns.get(_variant(i, case.arch), case.arch) == case.arch]
    return triton.reports(items, case.arch)


@pytest.fixture
def reports():
    """(launches, case) -> what was made of the case's launches, in order. ``peftkern verify --static`` takes all: here a
    variant of a kernel that architectures hardly differ in is compiled for one of them."""
    return _reports


@pytest.fixture
def within_bounds():
    """(launches, case) -> None: what the case launches compiles, passes its checks and stays within its recorded bounds."""
    from peftkern.verify.static import records
    from peftkern.verify.static.triton import VERSION

    def check_case(launches, case) -> None:
        bounds, unknown = records.read(launches.BOUNDS), 0
        for r in _reports(launches, case):
            assert not [p for check in launches.CHECKS for p in check(r)], r.key
            assert not records.broken(r.row, bounds.get(r.key, {})), r.key
            unknown += VERSION not in bounds[r.key]
        if unknown:
            pytest.skip(f"registers differ between versions of Triton, and none were recorded with {VERSION}")

    return check_case

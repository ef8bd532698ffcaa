"""How many launches a step makes: the work nodes of a CUDA graph that it is captured in."""

from __future__ import annotations

import ctypes

from .device_timing import captured, run

# CUgraphNodeType: what the GPU has to start. Others order launches, or stand for nothing.
KERNEL, MEMCPY, MEMSET = 0, 1, 2
WORK = (KERNEL, MEMCPY, MEMSET)


def count(step, i: int, backward: bool) -> int | None:
    """Kernels, copies and fills of one step that has run before; None if it cannot be captured or counted."""
    try:
        graph = captured(lambda: run(step, i, backward), keep_graph=True)
        return work_nodes(graph.raw_cuda_graph(), ctypes.CDLL("libcuda.so.1"))
    except Exception:
        # What was captured by then is lost; what went wrong on the device shows in the next step that is timed.
        return None


def work_nodes(graph: int, driver) -> int | None:
    """Nodes of ``graph`` (a CUgraph) whose type is in WORK, asked of the driver's library; None if it refuses."""
    handle, number = ctypes.c_void_p(graph), ctypes.c_size_t(0)
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(number)) != 0:
        return None
    nodes = (ctypes.c_void_p * number.value)()
    if number.value and driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)) != 0:
        return None
    found = 0
    for node in nodes:
        kind = ctypes.c_int(-1)
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) != 0:
            return None
        found += kind.value in WORK
    return found

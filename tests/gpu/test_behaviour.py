"""What programs rely on beside values: graphs, no waiting for the device, streams, determinism, torch.compile."""

from __future__ import annotations

import pytest
import torch
from calls import NAMES, call, change, unable, using

import peftkern


@pytest.fixture(params=NAMES)
def ready(request, backend):
    """A call that ``backend`` can take, run once."""
    found = call(request.param)
    reason = unable(found, backend)
    if reason:
        pytest.skip(reason)
    found.run()
    torch.cuda.synchronize()
    return found


def needs_a_kernel(backend: str) -> None:
    """The reference reads sizes from the device in many-adapter ops; only kernels promise not to."""
    if backend == "reference":
        pytest.skip("the reference reads from the device")


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def capture(found):
    """(graph, its results); warmed up on another stream, as torch's documentation asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            found.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = found.run()
    return graph, results


def test_a_graph_replays_with_other_data_ids_and_seeds(ready, backend):
    needs_a_kernel(backend)
    graph, results = capture(ready)
    before = None
    for _ in range(3):
        change(ready)
        graph.replay()
        torch.cuda.synchronize()
        got = [r.clone() for r in results]
        assert equal(got, ready.run())
        # Nothing is frozen in the graph.
        assert before is None or not any(torch.equal(a, b) for a, b in zip(got, before))
        before = got


def test_two_graphs_do_not_share_scratch(backend):
    """Replayed on two streams at once, each with its own counters and partial sums."""
    needs_a_kernel(backend)
    pairs = []
    for name in NAMES:
        found = call(name)
        if unable(found, backend) is None:
            expected = found.run()
            pairs.append((*capture(found), [r.clone() for r in expected]))
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(10):
        for (graph, _, _), stream in zip(pairs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert pairs and all(equal(results, expected) for _, results, expected in pairs)


def test_the_host_does_not_wait(ready, backend):
    needs_a_kernel(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            ready.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_once(ready, backend):
    """Both are given work before either is done; nothing of one shows in the other."""
    other = call(ready.name)
    change(other)
    expected = ready.run(), other.run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for _ in range(8):
        for stream, each, found in zip(streams, (ready, other), results):
            with torch.cuda.stream(stream):
                found.append(each.run())
    torch.cuda.synchronize()
    for found, right in zip(results, expected):
        assert all(equal(r, right) for r in found)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "same"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_calls_give_equal_bits(name, backend, adapter_dtype):
    found = call(name, adapter_dtype=adapter_dtype)
    reason = unable(found, backend)
    if reason:
        pytest.skip(reason)
    first = found.run()
    assert all(r.isfinite().all() for r in first)
    for _ in range(5):
        assert equal(found.run(), first)


def test_dropout_bits_are_the_definitions(backend):
    from peftkern.ops.dropout_mask import dropout_mask_ref

    for M, K, p in ((1, 1, 0.5), (33, 1000, 0.1), (512, 129, 0.75)):
        seed = torch.tensor([-(2**40) - M], device="cuda")
        mask = torch.ops.peftkern.dropout_mask(seed, M, K, p)
        assert torch.equal(mask.cpu(), dropout_mask_ref(seed.cpu(), M, K, p))


@pytest.mark.parametrize("name", ["lora_linear-plain", "lora_linear-dropout"])
def test_compiles_without_a_break(name, backend):
    found = call(name)
    reason = unable(found, backend)
    if reason:
        pytest.skip(reason)
    torch._dynamo.reset()
    t, drop = found.inputs, 0.25 if "dropout" in name else 0.0

    @torch.compile(fullgraph=True)
    def step(x, A, B):
        return peftkern.lora_linear(
            x, t["weight"], A, B, bias=t["bias"], scaling=2.0, dropout_p=drop, training=True, seed=t["seed"]
        ).mul(1.0)

    leaves = [t[k].detach().requires_grad_() for k in ("x", "A", "B")]
    y = step(*leaves)
    got = [y.detach(), *torch.autograd.grad(y, leaves, t["dy"])]
    assert equal(got, found.run())


def test_the_highest_rank_that_is_taken_starts():
    """What a block may have of shared memory is known by architecture, and no more than the device has."""
    from peftkern.backends.cuda import native
    from peftkern.backends.marshal import CODES

    x = torch.randn(3, 40, device="cuda")
    kernel = CODES[x.dtype], native.device(x).arch
    rank = max(r for r in (6335, 10431, 14527) if native._C.cuda_sgmv_takes(r, *kernel))
    A, B = torch.randn(rank, 40, device="cuda") / 40, torch.randn(24, rank, device="cuda") / rank**0.5
    with using("cuda"), torch.inference_mode():
        got = peftkern.sgmv(x, [(A, B, 1.0)], torch.zeros(3, dtype=torch.int64, device="cuda"))
    expected = x.double() @ A.double().T @ B.double().T
    assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()

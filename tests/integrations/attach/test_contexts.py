"""A request in the thread, task, generator or graph it belongs to, and nowhere else."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import os
import random
import threading
import time

import pytest
import torch

import peftkern

SECONDS = float(os.environ.get("PEFTKERN_RACE_SECONDS", "3"))


@pytest.fixture
def serving(zoo, tmp_path):
    """(model, inputs of one row, {name or None: logits}, attach(**options))."""
    twin = zoo.several("llama", first={"r": 4}, second={"r": 9}, third={"r": 2})
    twin.save_pretrained(tmp_path)
    plain = zoo.copy(twin).unload().eval()
    ids = zoo.batch("llama", rows=1)["input_ids"]
    expected = {}
    with torch.no_grad():
        expected[None] = plain(ids).logits
        for name in twin.peft_config:
            twin.set_adapter(name)
            expected[name] = twin(ids).logits
    multi = []

    def attach(**options):
        multi.append(peftkern.attach_adapters(plain, {n: tmp_path / n for n in twin.peft_config}, **options))
        return multi[0]

    return plain, ids, expected, attach


def same(y, expected):
    return torch.allclose(y, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bind_holds_wherever_it_is_called(serving):
    plain, ids, expected, attach = serving
    multi = attach()
    bound = {name: multi.bind(name) for name in expected}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for name in expected:
            assert same(pool.submit(torch.no_grad()(bound[name]), ids).result().logits, expected[name])

    def stream(name):
        for _ in range(3):
            yield bound[name](ids).logits

    # Advanced in turn, each step in a context of its own.
    streams = {name: stream(name) for name in expected}
    for _ in range(3):
        for name, steps in streams.items():
            assert same(contextvars.copy_context().run(next, steps), expected[name])
            assert same(plain(ids).logits, expected[None])

    async def serve(name):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, torch.no_grad()(lambda: bound[name](ids).logits))

    async def serve_all():
        return await asyncio.gather(*map(serve, expected))

    for name, y in zip(expected, asyncio.run(serve_all())):
        assert same(y, expected[name])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    for name in expected:
        with multi.use(name):
            tokens = plain.generate(ids, **options)
        assert torch.equal(bound[name].generate(ids, **options), tokens)
    mixed = multi.bind(["first", None], repeats=2)
    y = mixed(ids.repeat(4, 1)).logits
    assert same(y, torch.cat([expected["first"]] * 2 + [expected[None]] * 2))
    with multi.use("second"):
        assert same(bound["first"](ids).logits, expected["first"])
        assert same(plain(ids).logits, expected["second"])
    with pytest.raises(KeyError, match="nobody"):
        multi.bind("nobody")
    multi.remove("first")
    with pytest.raises(KeyError, match="first"):
        bound["first"](ids)


@torch.no_grad()
def test_outside_error(serving):
    plain, ids, expected, attach = serving
    multi = attach(outside="error")
    results = []

    def run(call):
        try:
            results.append(torch.no_grad()(call)(ids).logits)
        except RuntimeError as error:
            results.append(str(error))

    calls = [
        plain,
        plain.model,
        plain.generate,
        lambda ids: plain.model.layers[0].self_attn.q_proj(torch.randn(1, 2, 32)),
    ]
    with multi.use("first"):
        for call in calls:
            thread = threading.Thread(target=run, args=(call,))
            thread.start()
            thread.join()
        assert len(results) == len(calls) and all("outside of use()" in result for result in results)
        thread = threading.Thread(target=run, args=(multi.bind("second"),))
        thread.start()
        thread.join()
        assert same(results[-1], expected["second"])
        assert same(plain(ids).logits, expected["first"])
    with pytest.raises(RuntimeError, match=r"outside of use.*bind"):
        plain(ids)
    for names in (None, [None]):
        with multi.use(names):
            assert same(plain(ids).logits, expected[None])
    multi.detach()
    assert same(plain(ids).logits, expected[None])
    for outside in ("raise", None, True):
        with pytest.raises(ValueError, match="outside is"):
            attach(outside=outside)


@torch.no_grad()
def test_generators_are_refused_and_context_managers_are_not(serving):
    plain, ids, expected, attach = serving
    multi = attach()

    def stream():
        with multi.use("first"):
            yield plain(ids)

    async def async_stream():
        with multi.use("first"):
            yield plain(ids)

    def with_stack():
        with contextlib.ExitStack() as stack:
            stack.enter_context(multi.use("first"))
            yield plain(ids)

    def by_hand():
        multi.use("first").__enter__()
        yield plain(ids)

    @contextlib.contextmanager
    def helper():
        with multi.use("first"):
            yield

    def around_a_helper():
        with helper():
            yield plain(ids)

    for generator in (
        stream(),
        with_stack(),
        by_hand(),
        around_a_helper(),
        (multi.use("first").__enter__() for _ in "a"),
    ):
        with pytest.raises(RuntimeError, match=r"inside a generator.*bind"):
            next(generator)
    with pytest.raises(RuntimeError, match="inside a generator"):
        asyncio.run(anext(async_stream()))

    @contextlib.asynccontextmanager
    async def async_helper():
        with multi.use("second"):
            yield

    async def serve():
        async with async_helper():
            await asyncio.sleep(0)
            return plain(ids).logits

    with helper():
        assert same(plain(ids).logits, expected["first"])
        assert same(asyncio.run(serve()), expected["second"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(multi.use("second"))
        stack.enter_context(helper())
        assert same(plain(ids).logits, expected["first"])
    assert same(plain(ids).logits, expected[None])
    assert multi.in_use == 0


@torch.no_grad()
def test_blocks_may_be_left_in_any_order(serving):
    plain, ids, expected, attach = serving
    multi = attach()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        blocks = [multi.use(name) for name in ("first", "second", "third")]
        for block in blocks:
            block.__enter__()
        left = ["first", "second", "third"]
        for i in order:
            assert same(plain(ids).logits, expected[left[-1]])
            blocks[i].__exit__(None, None, None)
            left.remove(("first", "second", "third")[i])
        assert same(plain(ids).logits, expected[None])


@torch.no_grad()
def test_a_block_that_has_ended_serves_nobody(serving):
    plain, ids, expected, attach = serving
    multi = attach()
    with multi.use("first"):
        inside = contextvars.copy_context()
        assert same(inside.run(plain, ids).logits, expected["first"])
    with pytest.raises(RuntimeError, match=r"has ended.*bind"):
        inside.run(plain, ids)
    assert same(inside.run(multi.bind("second"), ids).logits, expected["second"])
    # Left in another context than it was entered in.
    block, other = multi.use("first"), contextvars.copy_context()
    block.__enter__()
    other.run(block.__exit__, None, None, None)
    with pytest.raises(RuntimeError, match="has ended"):
        plain(ids)
    with multi.use("second"):
        assert same(plain(ids).logits, expected["second"])
    assert same(other.run(plain, ids).logits, expected[None])

    async def late():
        async def background():
            await asyncio.sleep(0.01)
            return plain(ids)

        with multi.use("first"):
            task = asyncio.create_task(background())
        return await task

    with pytest.raises(RuntimeError, match="has ended"):
        contextvars.Context().run(asyncio.run, late())


def test_a_layer_is_not_recomputed_without_its_adapter(serving):
    plain, ids, _, attach = serving
    plain.requires_grad_(False)
    multi = attach()
    embeddings = torch.randn(2, 4, 32)
    gradients = []
    for checkpointing in (False, True):
        plain.train()
        if checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        x = embeddings.clone().requires_grad_(True)
        with multi.use(["first", "second"]):
            plain(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    x = embeddings.clone().requires_grad_(True)
    with multi.use(["first", "second"]):
        y = plain(inputs_embeds=x, use_cache=False).logits
    with pytest.raises(RuntimeError, match="recomputed in backward outside of the use"):
        y.square().mean().backward()


@torch.no_grad()
def test_one_graph_for_any_mix(serving):
    plain, ids, expected, attach = serving
    multi = attach(max_adapters=8)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    batch = ids.repeat(4, 1)
    mixes = [["first", None, "second", "third"], ["third", "third", "first", None], ["first"] * 4, [None] * 4, "second"]
    for names in mixes:
        with multi.use(names):
            y = compiled(input_ids=batch).logits
        names = [names] * 4 if isinstance(names, str) else names
        assert same(y, torch.cat([expected[name] for name in names]))
    multi.remove("third")
    assert same(compiled(input_ids=batch).logits, torch.cat([expected[None]] * 4))
    with multi.use(["first", "second"]), pytest.raises(ValueError, match=r"names 2 sequences.*\(4, 7\)"):
        compiled(input_ids=batch)
    assert counters["stats"]["unique_graphs"] == 1
    other = copy.deepcopy(plain)
    assert same(torch.compile(other, backend="eager")(ids).logits, expected[None])
    multi.detach()
    assert same(compiled(input_ids=ids).logits, expected[None])


def test_requests_never_meet(serving):
    """Threads, executors, tasks, generators in copied contexts, cancelled ones: each answer is its own adapter's."""
    plain, ids, expected, attach = serving
    multi = attach(outside="error")
    names = list(expected)
    stop, errors, answered = threading.Event(), [], []
    pool = concurrent.futures.ThreadPoolExecutor(2)

    def check(logits, mix):
        if not all(same(y[None], expected[name]) for y, name in zip(logits, mix)):
            errors.append(mix)
        answered.append(mix)

    def batch(choose):
        mix = [choose.choice(names) for _ in range(choose.randint(1, 3))]
        return mix, ids.repeat(len(mix), 1)

    @torch.no_grad()
    def run(mix, rows, bind):
        if bind:
            return multi.bind(mix)(rows).logits
        with multi.use(mix):
            return plain(rows).logits

    def in_thread(choose):
        mix, rows = batch(choose)
        check(run(mix, rows, choose.random() < 0.5), mix)

    def in_executor(choose):
        mix, rows = batch(choose)
        check(pool.submit(contextvars.copy_context().run, run, mix, rows, True).result(), mix)

    def in_tasks(choose):
        async def one(mix, rows):
            with multi.use(mix), torch.no_grad():
                await asyncio.sleep(choose.random() / 1000)
                y = plain(rows).logits
                await asyncio.sleep(0)
                return mix, y

        async def several():
            tasks = [asyncio.create_task(one(*batch(choose))) for _ in range(3)]
            await asyncio.sleep(choose.random() / 1000)
            choose.choice(tasks).cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        for result in asyncio.run(several()):
            if isinstance(result, tuple):
                check(result[1], result[0])
            elif not isinstance(result, asyncio.CancelledError):
                errors.append(result)

    def in_generators(choose):
        def stream(mix, rows):
            bound = multi.bind(mix)
            for _ in range(2):
                with torch.no_grad():
                    yield mix, bound(rows).logits

        streams = [stream(*batch(choose)) for _ in range(3)]
        for _ in range(2):
            for steps in choose.sample(streams, 3):
                mix, y = contextvars.copy_context().run(next, steps, (None, None))
                if mix is not None:
                    check(y, mix)
                if choose.random() < 0.2:
                    steps.close()

    def outside(choose):
        try:
            with torch.no_grad():
                plain(ids)
            errors.append("a call outside")
        except RuntimeError:
            answered.append(None)

    def work(seed):
        choose = random.Random(seed)
        while not stop.is_set() and not errors:
            try:
                choose.choice([in_thread, in_executor, in_tasks, in_generators, outside])(choose)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    pool.shutdown()
    assert not errors and len(answered) > 10
    assert multi.in_use == 0

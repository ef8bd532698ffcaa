"""The choice: pure, kept under everything that steers it, the same for a call as for who asks, and with reasons."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch

import peftkern
from peftkern.backends.cpu import native
from peftkern.bases.base import KINDS
from peftkern.dispatch import registry, tuned
from peftkern.dispatch.choose import ORDER, Declined, choose, load
from peftkern.dispatch.explain import decision, passes
from peftkern.kernels import configs
from peftkern.problem import CpuWay, Problem
from peftkern.settings import CANDIDATES, Settings, current, using

FAKE = "Imaginary GPU"
CPU = load("cpu").unavailable(Settings()) is None
needs_cpu = pytest.mark.skipif(not CPU, reason="the C++ extension is not built")


def problem(op="lora_linear_fwd", device="cuda", M=2048, flags=(), dtype=torch.bfloat16, adapter=torch.float32):
    arch = "sm_90" if device == "cuda" else "AVX2"
    return Problem(op, device, arch, dtype, adapter, M, 4096, 4096, 16, frozenset(flags))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``gpu(*rows)``: settings under which both GPU back ends work and rows (op, M, candidate) were measured."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(load(name), "unavailable", lambda now: None)
    sizes = dict(dtype="bf16", adapter_dtype="fp32", dropout=False, N=4096, K=4096, R=16)
    tiles = dict(block_m=128, block_c=128)

    def write(*rows):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        rows = [
            sizes | dict(op=op, M=M, choice=candidate, config=tiles if candidate == "fused" else None)
            for op, M, candidate in rows
        ]
        (folder / f"{tuned.slug(FAKE)}.json").write_text(json.dumps({"schema": 1, "rows": rows}))
        return Settings(tables=(str(folder),), gpu=FAKE)

    return write


def test_the_cuda_kernels_take_what_they_were_measured_to_be_fastest_at(gpu):
    now = gpu(("lora_linear_fwd", 2048, "cuda"), ("lora_linear_fwd", 8192, "fused"))
    first = choose(problem(), now)
    assert first.backend == "cuda" and first.way is None and not first.declined and "measured" in first.why
    for other in (problem(M=8192), problem(M=64), problem(flags=("dropout",))):
        assert choose(other, now).backend == "triton" and "no measurement" in choose(other, now).declined["cuda"]
    # Named, or preferred whatever was measured, they take all that they can.
    for named in (now._replace(backend="cuda"), now._replace(candidate="cuda")):
        assert choose(problem(M=64), named).backend == "cuda"
    assert choose(problem(M=64, dtype=torch.float32), now._replace(candidate="cuda")).backend == "triton"
    # What nobody measures is whoever comes first.
    assert choose(problem("dropout_mask"), now).backend == "cuda"


def test_many_adapters_follow_the_measurement_of_their_branch(gpu, monkeypatch):
    monkeypatch.setattr(load("cuda"), "decline", lambda problem, now: None)
    now = gpu(("sgmv_add", 64, "cuda"))
    assert choose(problem("multi_lora_linear_fwd", M=64, flags=("base", "bias")), now).backend == "cuda"
    assert choose(problem("multi_lora_linear_fwd", M=512, flags=("base",)), now).backend == "triton"
    # Vectors cost the candidates differently, and were not measured.
    assert choose(problem("multi_lora_linear_fwd", M=64, flags=("base", "g_b")), now).backend == "triton"


def test_triton_is_told_what_was_measured_unless_something_is_fixed(gpu):
    now = gpu(("lora_linear_fwd", 2048, "fused"), ("lora_linear_fwd", 64, "overlap"))
    tiles = configs.LaunchConfig(128, 128)
    assert choose(problem(), now).way.fixed == (("base", "fused"), ("gemm", tiles))
    assert choose(problem(M=64), now).way.fixed == (("base", "overlap"),)
    assert choose(problem(M=512), now).way.fixed == ()
    fixed = now._replace(triton_fixed=configs.fixed(base="addmm", shrink_groups=3))
    assert dict(choose(problem(), fixed).way.fixed) == {"base": "addmm", "gemm": tiles, "shrink_groups": 3}
    invariant = choose(problem(), now._replace(batch_invariant=True)).way
    assert invariant.batch_invariant and invariant.fixed == ()


def test_a_back_end_that_is_named_and_cannot_is_an_error():
    with pytest.raises(Declined, match=r"PEFTKERN_BACKEND=cuda cannot take lora_linear_fwd\[cpu.*\]: "):
        choose(problem(device="cpu"), Settings(backend="cuda"))
    assert choose(problem(device="cpu"), Settings(backend="reference"))[:2] == ("reference", None)
    assert choose(problem(device="meta"), Settings())[:2] == ("reference", None)


def test_a_base_that_no_kernel_reads_is_nobodys(monkeypatch):
    """A back end says which kinds it reads: a new one is not taken for a dense weight."""
    monkeypatch.setitem(KINDS, "ternary", None)
    now = Settings(tables=("nowhere for kinds",), gpu=FAKE)
    for device, names in ORDER.items():
        for name in names:
            monkeypatch.setattr(load(name), "unavailable", lambda now: None)
        for op in ("lora_linear_fwd", "lora_linear_bwd", "multi_lora_linear_fwd", "lora_row_norm"):
            found = choose(problem(op, device, flags=("base", "ternary")), now)
            assert found.backend == "reference"
            for name in (name for name in names if op in load(name).OPS):
                assert found.declined[name] == "has no kernel that reads a base of kind ternary"
    assert "kind identity" in choose(problem(flags=("identity",)), now).declined["cuda"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4"])
def test_the_cuda_kernels_read_codes_for_few_rows_forward(gpu, kind):
    """What they leave is Triton's."""
    now = gpu()._replace(candidate="cuda")
    for M, chosen in ((1, "cuda"), (64, "cuda"), (65, "triton")):
        found = choose(problem(M=M, flags=(kind, "bias", "dropout", "g_b")), now)
        assert found.backend == chosen
        assert chosen == "cuda" or found.declined["cuda"] == f"reads a base of kind {kind} for up to 64 rows, K above 0"
    for op in ("lora_linear_bwd", "lora_row_norm", "multi_lora_linear_fwd"):
        found = choose(problem(op, M=8, flags=(kind, "base")), now)
        assert found.backend == "triton"
        assert found.declined["cuda"] == f"reads a base of kind {kind} in the forward pass of lora_linear alone"
    for other in (problem(M=8, flags=(kind, "p_b")), problem(M=8, flags=(kind,), dtype=torch.float32)):
        assert choose(other, now).backend == "triton"
    assert choose(problem(M=8, flags=("fp8",)), now).declined["cuda"] == "has no kernel that reads a base of kind fp8"
    assert "no measurement" in choose(problem(M=8, flags=(kind,)), gpu()).declined["cuda"]


@needs_cpu
def test_the_cpu_is_told_its_base_product():
    now = Settings(tables=("nowhere",), cpu_isa="plain")
    told = {kind: choose(problem(device="cpu", M=4), now._replace(cpu_kind=kind)).way for kind in ("vendor", "few")}
    # A weight of odd strides is not in a problem, so the way says what is done then.
    assert {kind: way[1:3] for kind, way in told.items()} == {"vendor": ("vendor", "vendor"), "few": ("few", "panels")}
    assert told["few"].now == now._replace(cpu_kind="few")
    without = choose(problem("dropout_mask", device="cpu"), now)
    assert without.way == CpuWay(now) and without.backend == "cpu"


@needs_cpu
def test_it_is_pure(monkeypatch):
    """Neither the environment nor what ``using`` changes has a say once the settings are handed in."""
    asked = [problem(op, "cpu", M, ("need_x",)) for op in registry.OPS for M in (1, 64, 2048)]
    first = [choose.__wrapped__(p, Settings()) for p in asked]
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    monkeypatch.setenv("PEFTKERN_CPU_BASE", "vendor")
    monkeypatch.setenv("PEFTKERN_CPU_ISA", "plain")
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "1")
    with using(cpu_kind="panels", candidate="cuda", tables=("nowhere",)):
        assert [choose.__wrapped__(p, Settings()) for p in asked] == first


AB = torch.ones(4, 64), torch.ones(48, 4)
# Of each field another value, and a call that is computed otherwise under it.
OTHERS = dict(
    backend="reference", cpu_base="panels", cpu_isa="plain", batch_invariant=True, save_input="copy", triton_interpret=True,
    cpu_kind="panels", candidate="cuda", tables=("nowhere",), gpu=FAKE, triton_fixed=(("base", "fused"),), small_calls=True,
    least=(("x", 1),),
)  # fmt: skip


def test_every_field_is_part_of_the_key():
    assert set(OTHERS) == set(Settings._fields)
    now = Settings()
    for name, value in OTHERS.items():
        other = now._replace(**{name: value})
        assert other != now and hash(other) != hash(now), name


@needs_cpu
@pytest.mark.parametrize(
    "change, kind",
    [(dict(cpu_base="panels"), "few"), (dict(batch_invariant=True), "panels"), (dict(cpu_kind="panels"), "panels")],
)
def test_a_change_is_seen_at_the_next_call(change, kind, monkeypatch):
    """Of one and the same call, without anything being forgotten; the last result is the first one's, bit for bit."""
    from peftkern.backends.cpu import call as native_call

    told, learn = [], native_call.learn_forward
    monkeypatch.setattr(native_call, "learn_forward", lambda *args: told.append(args[-2]) or learn(*args))
    call = functools.partial(peftkern.lora_linear, torch.randn(5, 64), torch.randn(48, 64), *AB)
    with using(tables=f"nowhere for {change}", cpu_isa="auto"):
        first = call()
        with using(**change):
            call()
        with using(backend="reference"):
            call()
        assert torch.equal(call(), first)
    expected = kind if kind != "few" or native.level().isa != "plain" else "panels"
    assert told == ["vendor", expected]  # the last call was known


@needs_cpu
def test_the_instruction_set_follows_every_change():
    """For calls too that are known natively, and so are not decided again."""
    x, w, A, B = torch.randn(5, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)
    with using(cpu_isa="auto"):
        first = [peftkern.lora_linear(x, w, A, B) for _ in range(2)][-1]
        best = native.level().isa
        with using(cpu_isa="plain"):
            peftkern.lora_linear(x, w, A, B)
            assert native.level().isa == "plain"
        assert torch.equal(peftkern.lora_linear(x, w, A, B), first) and native.level().isa == best


def test_passes_are_those_that_the_ops_describe(monkeypatch):
    """A report's problems are the problems of a real call."""
    met, plain = [], registry.choose
    monkeypatch.setattr(registry, "choose", lambda p, now: met.append(p) or plain(p, now))
    x, w = torch.randn(7, 24, requires_grad=True), torch.randn(40, 24)
    A, B = torch.randn(3, 24, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    with using(gpu="of this test"):
        peftkern.lora_linear(x, w, A, B, bias=torch.randn(40)).sum().backward()
    call = dataclasses.replace(met[0], op="lora_linear")
    assert set(passes(call)) == set(met) and met[0] == passes(call)[0]


def test_a_decision_in_words():
    found = decision(problem(device="cpu", dtype=torch.float64), Settings())
    assert found["backend"] == "reference" and set(found["declined"]) == {"cpu"}
    named = decision(problem(device="cpu"), Settings(backend="triton"))
    assert named["backend"] is None and "PEFTKERN_BACKEND=triton cannot take" in named["why"]


def test_candidates_are_what_kernels_and_tables_know():
    assert set(configs.BASES) <= set(CANDIDATES)
    assert current().candidate == "measured"

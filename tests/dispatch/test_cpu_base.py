"""Whose base product: what a table of this CPU model says, the vendor's fp32 where there is none, and honest tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftkern import doctor, lora_linear
from peftkern.backends.cpu import native
from peftkern.dispatch import cpu_table
from peftkern.dispatch.choose import choose
from peftkern.dispatch.cpu_base import Cpu, choose_kind, panel_rows
from peftkern.dispatch.cpu_table import Product
from peftkern.dispatch.table_files import slug
from peftkern.problem import Problem
from peftkern.settings import TABLES, Settings, current, using

FP32, BF16 = torch.float32, torch.bfloat16
MILAN = cpu_table.CpuModel("AuthenticAMD", 25, 1)
MKL = cpu_table.Level("avx2", "AVX2", True)
NOW = Settings()


def content(*rows, models=(1, 1), level=MKL, vendor="AuthenticAMD", family=25):
    cpu = {"vendor": vendor, "family": family, "models": list(models)}
    return {
        "schema": 1,
        "meta": {"cpu": cpu, "level": level._asdict(), "threads": 2, "date": "2026-12-01T00:00:00+00:00"},
        "rows": list(rows),
    }


def row(M, vendor, panels, few=None, dtype="fp32", which="forward", D=4096, C=4096):
    us = {"vendor": vendor, "panels": panels} | ({"few": few} if few else {})
    return {"dtype": dtype, "pass": which, "D": D, "C": C, "M": M, "us": us}


MEASURED = content(
    row([4, 16, 64, 256], [90, 95, 100, 100], [200, 100, 90, 98], [40, 99, 95, None]),
    row([16, 256], [None, None], [10, 10], [9, None], dtype="bf16"),
)


def kind(M, table=MEASURED, dtype=FP32, D=4096, C=4096, transpose=True, unit_stride=True, **settings):
    on = Cpu("avx2", frozenset({"x86"}), None if table is None else cpu_table.Table(table, "x.json"))
    return choose_kind(Product(dtype, transpose, M, D, C, unit_stride), on, Settings(**settings))[0]


def test_fp32_of_a_model_that_nobody_measured_is_the_vendors():
    for transpose in (True, False):
        for M in (1, 2, 4, 16, 64, 65, 512, 4096):
            for D, C in ((4096, 4096), (7, 4096), (256, 31), (14336, 4096)):
                assert kind(M, None, D=D, C=C, transpose=transpose) == "vendor"
    # Half precision has its rules without a table: its vendor's product may be slower by factors.
    assert kind(512, None, BF16) == "panels" and kind(4, None, BF16) == "few"


def test_a_table_decides():
    # Ours must win by 5 %: not at 16 rows (99 and 100 to 95), nor at 256 (98 to 100).
    assert {M: kind(M) for M in (4, 16, 64, 256)} == {4: "few", 16: "vendor", 64: "panels", 256: "vendor"}
    # The nearest row, at most a factor of two away; the last one for all beyond.
    assert [kind(M) for M in (1, 2, 7, 9, 40, 128, 129, 10**6)] == [
        "vendor", "few", "few", "vendor", "panels", "panels", "vendor", "vendor"
    ]  # fmt: skip
    rising = content(row([16, 64], [100, 100], [99, 50]))
    assert kind(10**6, rising) == "panels" and kind(32, rising) == "vendor" and kind(33, rising) == "panels"
    # Sizes, pass and dtype must be near, or the same; else it is as without a table.
    for other in (dict(D=2000), dict(C=8200), dict(D=16000), dict(transpose=False)):
        assert kind(64, **({"D": 4096, "C": 4096} | other)) == "vendor"
    assert kind(64, D=2048, C=8192) == "panels"
    assert (
        kind(16, dtype=BF16) == "few" and kind(16, dtype=torch.float16) == "few" and kind(256, dtype=BF16) == "panels"
    )


def test_the_nearest_shape_speaks():
    two = content(row([64], [100], [50], D=1024, C=4096), row([64], [50], [100]))
    assert kind(64, two, D=1100) == "panels" and kind(64, two, D=2047) == "panels" and kind(64, two, D=2049) == "vendor"


def test_an_empty_product_is_near_to_nothing():
    for sizes in (dict(M=0), dict(M=4, D=0), dict(M=4, C=0), dict(M=0, D=0, C=0)):
        assert kind(**sizes) == "vendor"


def test_what_cannot_run_is_passed_over():
    assert kind(4, unit_stride=False) == "vendor"
    assert kind(4, content(row([4], [90], [50], [40])), unit_stride=False) == "panels"
    pairs = content(row([64], [90], [50], dtype="bf16") | {"us": {"vendor": [90], "bf16": [50], "few": [95]}})
    assert kind(64, pairs, BF16) == "vendor"  # no such kernel here
    on = Cpu("avx512", frozenset({"x86", "bf16_kernel"}), cpu_table.Table(pairs, "x"))
    chosen = [choose_kind(Product(BF16, True, 64, 4096, 4096, scaled=s), on, Settings())[0] for s in (False, True)]
    assert chosen == ["bf16", "vendor"]  # the kernel takes no scale


def test_settings_stand_above_a_table():
    for M in (4, 16, 64, 256):
        assert kind(M, cpu_base="vendor") == "vendor"
        assert kind(M, cpu_base="panels") == ("few" if M <= 64 else "panels")
        assert kind(M, None, cpu_base="panels") == ("few" if M <= 64 else "panels")
        assert kind(M, batch_invariant=True) == kind(M, batch_invariant=True, cpu_base="vendor") == "panels"
    assert kind(64, cpu_base="panels", D=15) == "few" and kind(65, cpu_base="panels", D=15) == "vendor"


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(schema=2), "schema"), (dict(rows=[row([4, 16], [1], [1, 2])]), "one for each M"),
        (dict(rows=[row([4], [1], [1]) | {"us": {"magic": [1]}}]), "expected times of"),
        (dict(rows=[row([4, 4], [1, 1], [1, 2])]), "rising"), (dict(rows=[row([], [], [])]), "rising"),
        (dict(rows=[row([4], [1], [1], which="backward")]), "dx for the pass"),
    ],
)  # fmt: skip
def test_tables_that_make_no_sense(change, match):
    with pytest.raises(ValueError, match=rf"bad\.json.*{match}"):
        cpu_table.Table(MEASURED | change, "bad.json")


def test_a_table_holds_for_the_models_it_names(tmp_path):
    def found(*cpu):
        table = cpu_table.of_model(cpu_table.CpuModel(*cpu), (str(tmp_path),))
        return table and Path(table.name).name

    assert found(*MILAN) is None
    wide = "cpu-authenticamd-25-0-15-avx2.json"
    (tmp_path / wide).write_text(json.dumps(content(models=(0, 15))))
    assert found(*MILAN) == found("AuthenticAMD", 25, 15) == wide
    (tmp_path / cpu_table.file_name(MILAN, "avx2")).write_text(json.dumps(content()))
    assert found(*MILAN) == "cpu-authenticamd-25-1-avx2.json" and found("AuthenticAMD", 25, 2) == wide
    others = (
        ("AuthenticAMD", 25, 16),
        ("AuthenticAMD", 2, 1),
        ("AuthenticAMD", 26, 1),
        ("GenuineIntel", 25, 1),
        ("", 0, 0),
    )
    assert [found(*cpu) for cpu in others] == [None] * len(others)
    table = cpu_table.of_model(MILAN, (str(tmp_path),))
    assert cpu_table.applies(table, MKL)
    assert not any(
        cpu_table.applies(table, MKL._replace(**other))
        for other in (dict(isa="avx512"), dict(isa="plain"), dict(torch_isa="DEFAULT"), dict(mkl=False))
    )


def model() -> cpu_table.CpuModel:
    return cpu_table.CpuModel(*native.model())


@pytest.fixture
def packaged(tmp_path):
    """``packaged(*rows)``: a folder with a table of this very CPU, to be used as the settings' ``tables``."""
    native.use_isa("auto")

    def write(*rows, **changes):
        cpu, folder = model(), tmp_path / str(len(list(tmp_path.iterdir())))
        named = dict(vendor=cpu.vendor, family=cpu.family, models=(cpu.model, cpu.model), level=native.level())
        folder.mkdir()
        (folder / cpu_table.file_name(cpu, native.level().isa)).write_text(
            json.dumps(content(*rows, **(named | changes)))
        )
        return (str(folder),)

    return write


needs_model = pytest.mark.skipif(
    native._C is None or not native.model()[0], reason="no C++ extension, or this CPU does not say which model it is"
)


@needs_model
def test_a_layer_follows_the_table_of_this_cpu(packaged, tmp_path):
    """Unknown, measured in favour of ours, and measured elsewhere; forward and backward; the same bits each time."""
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(96, 64)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)

    def step(**changes):
        with using(**changes):
            problems = [
                Problem(op, "cpu", "", FP32, FP32, 40, 96, 64, 4, frozenset({"need_x"}))
                for op in ("lora_linear_fwd", "lora_linear_bwd")
            ]
            y = lora_linear(x, w, A, B)
            kinds = [choose(p, current()).way.kind for p in problems]
            return [y, *torch.autograd.grad(y.sum(), (x, A, B))], kinds

    plain, unknown = step(tables=(str(tmp_path),))
    assert unknown == ["vendor", "vendor"]
    ours = (row([32], [90], [50], D=96, C=64), row([32], [90], [50], [40], D=64, C=96, which="dx"))
    tables = packaged(*ours)
    first, measured = step(tables=tables)
    assert measured == ["panels", "few"]
    again, _ = step(tables=tables)
    assert all(map(torch.equal, first, again))
    for result, expected in zip(first, plain):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert step(tables=tables, cpu_base="vendor")[1] == ["vendor", "vendor"]
    elsewhere = packaged(*ours, level=native.level()._replace(mkl=not native.level().mkl))
    assert step(tables=elsewhere)[1] == ["vendor", "vendor"]


@needs_model
def test_doctor_names_the_cpu_and_its_table(packaged, tmp_path):
    assert doctor.cpu()["model_id"] == list(model())
    with using(tables=(str(tmp_path),)):
        assert "none for this CPU model" in doctor.text(doctor.report())
    with using(tables=packaged(row([64, 256], [100, 100], [50, 200]))):
        text = doctor.text(doctor.report())
        assert "{}, family {}, model {}".format(*model()) in text
        assert f"{cpu_table.file_name(model(), native.level().isa)}, measured 2026-12-01 with 2 threads" in text
        assert doctor.base_products()["float32"] == {
            "forward": "up to 31 rows torch's product; up to 128 rows peftkern, fp32 panels; else torch's product",
            "input gradient": "torch's product",
        }
    with using(tables=packaged(level=native.level()._replace(isa="plain"))):
        if native.level().isa != "plain":
            assert "not used: it holds for plain" in doctor.text(doctor.report())


@needs_model
def test_cpuinfo_agrees():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "vendor_id" not in values:
        pytest.skip("/proc/cpuinfo does not name a vendor")
    named = cpu_table.CpuModel(values["vendor_id"], int(values["cpu family"]), int(values["model"]))
    assert model() == named


def test_packaged_tables():
    """Every table that is shipped can be read and is found under the models that it names."""
    files = sorted(Path(TABLES).glob("cpu-*.json"))
    assert files
    for file in files:
        data = json.loads(file.read_text())
        cpu = data["meta"]["cpu"]
        first, last = cpu["models"]
        numbers = f"{first}" if first == last else f"{first}-{last}"
        assert file.stem == f"cpu-{slug(cpu['vendor'])}-{cpu['family']}-{numbers}-{data['meta']['level']['isa']}"
        level = cpu_table.Level(**data["meta"]["level"])
        found = cpu_table.of_model(cpu_table.CpuModel(cpu["vendor"], cpu["family"], last), (TABLES,), level)
        assert found.name == file.name and found.rows


def test_quantised_weights_are_the_vendors_only_where_a_table_says_so():
    few, many = panel_rows(False, True), 40
    on = Cpu("avx2", frozenset({"x86"}), None, 64, {few: many})

    def kind(M: int, on: Cpu = on, now: Settings = NOW, dtype: torch.dtype = torch.float32, **changes) -> str:
        return choose_kind(Product(dtype, True, M, 300, 200, coded=True, **changes), on, now)[0]

    assert [kind(M) for M in (1, many - 1, many, 64, 5000)] == ["few", "few", "panels", "panels", "panels"]
    # Half precision as well: a vendor's fast instructions alone say nothing of codes.
    pairs = on._replace(isa="avx512", features=frozenset({"x86", "bf16_kernel", "avx512_bf16"}))
    assert kind(5000, pairs, dtype=torch.bfloat16) == "bf16"
    measured = content(row([8, 60, 5000], [9, 9, 1], [5, 1, 9], [1, 0.5, None], D=300, C=200))
    told = on._replace(table=cpu_table.Table(measured, "x.json"))
    assert [kind(M, told) for M in (8, 60, 5000)] == ["few", "panels", "vendor"]
    assert kind(5000, told, Settings(batch_invariant=True)) == "panels"
    assert kind(5000, told, Settings(cpu_base="panels")) == "panels"
    for asked in (Settings(cpu_base="vendor"), Settings(cpu_kind="vendor")):
        assert kind(5000, on, asked) == "vendor"
    assert kind(8, on, Settings(cpu_base="vendor")) == "few"
    assert kind(5000, told, integers=True) == "int8"

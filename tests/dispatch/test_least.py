"""From how much work on a call is ours, and whose table says so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from peftkern.backends.cpu import native
from peftkern.dispatch import cpu_table, table_files
from peftkern.dispatch.least import least_work
from peftkern.settings import TABLES, Settings

needs_model = pytest.mark.skipif(native._C is None or not native.model()[0], reason="no C++ kernels here, or no x86")


def write(folder: Path, least: dict, cpu=("AuthenticAMD", 1, 1), level=None) -> str:
    folder.mkdir(exist_ok=True)
    vendor, family, model = cpu
    meta = {"cpu": {"vendor": vendor, "family": family, "models": [model, model]}, "threads": 2, "date": ""}
    meta["level"] = (level or cpu_table.Level("avx2", "AVX2", True))._asdict()
    file = folder / cpu_table.file_name(cpu_table.CpuModel(*cpu), meta["level"]["isa"])
    file.write_text(json.dumps({"schema": 1, "meta": meta, "least": least, "rows": []}))
    return str(folder)


def test_where_nothing_is_known_of_this_cpu_the_most_of_all_counts(tmp_path):
    folder = write(tmp_path / "a", {"x": 7, "y": 1})
    write(tmp_path / "a", {"x": 3, "z": 2}, cpu=("AuthenticAMD", 1, 2))
    now = Settings(tables=(folder,))
    assert [least_work(name, now) for name in ("x", "y", "z", "unknown")] == [7, 1, 2, 0]
    changed = now._replace(least=(("x", 0), ("unknown", 5)))
    assert [least_work(name, changed) for name in ("x", "y", "unknown")] == [0, 1, 5]


@needs_model
def test_this_cpus_own_table_counts_first(tmp_path):
    native.use_isa("auto")
    package = write(tmp_path / "package", {"x": 7, "y": 1})
    write(tmp_path / "package", {"x": 3}, native.model(), native.level())
    assert [least_work(n, Settings(tables=(package,))) for n in "xy"] == [3, 1]
    own = write(tmp_path / "own", {"x": 4}, native.model(), native.level())
    assert [least_work(n, Settings(tables=(own, package))) for n in "xy"] == [4, 1]
    # Measured at other instruction sets, a table does not speak for these, alone or beside one that does.
    other = native.level()._replace(isa="other")
    for folder, expected in ((tmp_path / "alone", 3), (tmp_path / "own", 4)):
        folder = write(folder, {"x": 5}, native.model(), other)
        now = Settings(tables=(folder + "/", package))  # another folder by name: what was read is kept
        assert least_work("x", now) == expected


def test_a_users_table_of_another_version_is_passed_over(tmp_path, monkeypatch):
    good = write(tmp_path / "good", {"x": 7})
    for k, text in enumerate(('{"schema": 99}', "not json", '{"schema": 1}')):
        bad = tmp_path / str(k)
        bad.mkdir()
        (bad / "cpu-x-1-1.json").write_text(text)
        with pytest.warns(RuntimeWarning, match="peftkern tune"):
            assert least_work("x", Settings(tables=(str(bad), good))) == 7
        monkeypatch.setattr(table_files, "TABLES", str(bad))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ValueError, KeyError)):
                list(table_files.read_all((str(bad),), "cpu-*.json", cpu_table.Table))


def test_packaged_limits_are_of_names_that_somebody_asks_for():
    from peftkern.dispatch.cpu_base import BRANCH_RANKS, PAIR_RANKS, panel_rows
    from peftkern.dispatch.least import ADAPTERS, WEIGHT
    from peftkern.methods import METHODS

    asked = {m.name for m in METHODS.values() if m.loses_small} | {*ADAPTERS, WEIGHT, PAIR_RANKS, BRANCH_RANKS}
    asked |= {panel_rows(half, forward) for half in (False, True) for forward in (False, True)}
    tables = [table for _, table in table_files.read_all((TABLES,), "cpu-*.json", cpu_table.Table)]
    named = {name for table in tables for name in table.least}
    assert named == asked

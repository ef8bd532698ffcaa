"""Settings: one object while nothing changes, another after every change, whoever makes it and wherever it is seen."""

from __future__ import annotations

import runpy
import threading

import pytest

from peftkern import settings
from peftkern.settings import Settings, current, using


def test_words_of_the_environment(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "yes")
    monkeypatch.setenv("PEFTKERN_BACKEND", " Reference ")
    assert current().batch_invariant and current().backend == "reference"
    monkeypatch.setenv("PEFTKERN_BATCH_INVARIANT", "off")
    assert not current().batch_invariant
    monkeypatch.setenv("PEFTKERN_CPU_BASE", "fast")
    with pytest.raises(ValueError, match="PEFTKERN_CPU_BASE='fast' is not one of auto, vendor, panels"):
        current()


def test_equal_settings_are_one_object(monkeypatch):
    first = current()
    assert current() is first
    with using(cpu_kind="panels"):
        inside = current()
        assert inside is not first and inside is current() and inside == first._replace(cpu_kind="panels")
    assert current() is first
    monkeypatch.setenv("PEFTKERN_CPU_BASE", "vendor")
    assert current().cpu_base == "vendor" and current() is current()


def test_changes_stand_above_the_environment_and_the_last_one_counts(monkeypatch):
    with using(backend="cpu", candidate="cuda"):
        monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
        assert current().backend == "cpu"
        with using(backend="reference"):
            assert current()[:1] == ("reference",) and current().candidate == "cuda"
        assert current().backend == "cpu"
        with pytest.raises(ZeroDivisionError), using(backend="reference"):
            raise ZeroDivisionError
        assert current().backend == "cpu"
    assert current().backend == "triton" and current().candidate == "measured"


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(bakend="cpu"), "no setting is called bakend; there are backend"), (dict(backend="fast"), "backend is 'fast'"),
        (dict(candidate="magic"), "candidate is 'magic'"), (dict(cpu_kind="blas"), "cpu_kind is 'blas'"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_refused(change, match):
    before = current()
    with pytest.raises(ValueError, match=match), using(**change):
        pass
    assert current() is before


def test_threads_that_overlap_leave_nothing_behind():
    """Each sees its own field all the time, whatever the others enter and leave meanwhile."""
    before, wrong = current(), []
    fields = {"cpu_kind": "panels", "candidate": "fused", "gpu": "x", "tables": "elsewhere"}
    start = threading.Barrier(len(fields))

    def work(name, value):
        start.wait()
        for _ in range(300):
            with using(**{name: value}):
                for _ in range(3):
                    if getattr(current(), name) != value:
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=item) for item in fields.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and current() == before


def test_a_change_reaches_other_threads():
    seen = []
    with using(gpu="x"):
        t = threading.Thread(target=lambda: seen.append(current().gpu))
        t.start()
        t.join()
    assert seen == ["x"]


def test_every_variable_is_a_field():
    assert len(Settings._fields) == len(Settings()) and hash(Settings()) == hash(Settings())
    assert settings.Settings().tables == (settings.OWN_TABLES, settings.TABLES) and settings.TABLES.endswith("tuned")


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"PEFTKERN_TABLES": "/a/b"}, "/a/b"), ({"PEFTKERN_TABLES": "", "XDG_CACHE_HOME": "/c"}, "/c/peftkern"),
        ({"PEFTKERN_TABLES": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/peftkern"),
    ],
)  # fmt: skip
def test_where_a_users_tables_are(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runpy.run_path(settings.__file__)["OWN_TABLES"] == folder


def test_followers_hear_of_every_change():
    heard = []
    settings.follow(lambda now: heard.append(now.gpu))
    with using(gpu="x"):
        current()
        current()
    current()
    assert heard == ["", "x", ""]

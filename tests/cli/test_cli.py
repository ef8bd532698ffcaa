"""The command line: help, exit codes, and that nothing heavy is imported to answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peftkern import __version__, cli


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "bench", "verify", "doctor"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"peftkern {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"]])
def test_wrong_use_is_2(argv, capsys):
    assert cli.main(argv) == 2
    assert "usage" in "".join(capsys.readouterr())


def test_missing_optional_package_is_named(monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError("No module named 'rich'", name="rich.console")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["bench"]) == 3
    assert "'rich' is not installed" in capsys.readouterr().err


def test_a_missing_part_of_peftkern_is_not_blamed_on_the_user(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'peftkern.x'", name="peftkern.x")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])


def test_module_runs_and_imports_nothing_optional():
    code = (
        "import sys; from peftkern import cli; assert cli.main(['--help']) == 0;"
        "import peftkern.benchmarks.bench, peftkern.benchmarks.verify, peftkern.benchmarks.report, peftkern.doctor;"
        "bad = {'peft', 'matplotlib', 'rich', 'triton', 'transformers'} & set(sys.modules);"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "peftkern", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"peftkern {__version__}")

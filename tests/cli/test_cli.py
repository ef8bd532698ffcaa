"""The command line: help, exit codes, and that nothing heavy is imported to answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import peftkern
from peftkern import __version__, cli


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "bench", "verify", "methods", "doctor"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"peftkern {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["no-such-command"]])
def test_wrong_use_is_2(argv, capsys):
    assert cli.main(argv) == 2
    assert "usage" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "module, package", [("peft.tuners", "peft"), ("matplotlib", "matplotlib"), ("rich.console", "rich")]
)
def test_a_missing_package_is_named_with_the_command_that_mends_it(monkeypatch, capsys, module, package):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["bench"]) == 3
    said = capsys.readouterr().err
    assert f"{package!r} is not installed: pip install {package} (" in said and said.count("\n") == 1


@pytest.fixture
def no_peft(monkeypatch):
    """A process in which peft is not installed."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "peft" or m.startswith("peftkern.integrations")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "peft", None)


@pytest.mark.parametrize("name", ["accelerate", "restore", "status"])
def test_what_needs_peft_says_how_to_get_it(no_peft, name):
    with pytest.raises(ModuleNotFoundError, match=r"^peftkern\.accelerate needs peft, or adapters: pip install peft$"):
        getattr(peftkern, name)(torch.nn.Linear(2, 2))


def test_names_that_need_peft_say_how_to_get_it(no_peft, monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^peftkern\.attach_adapters needs transformers: pip install transformers$"
    ):
        peftkern.attach_adapters  # noqa: B018


def test_a_missing_part_of_peftkern_is_not_blamed_on_the_user(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'peftkern.x'", name="peftkern.x")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench"])


def test_module_runs_and_imports_nothing_optional():
    code = (
        "import sys; from peftkern import cli; assert cli.main(['--help']) == 0;"
        "import peftkern.benchmarks.bench, peftkern.verify.main, peftkern.benchmarks.report, peftkern.doctor;"
        "bad = {'peft', 'matplotlib', 'rich', 'triton', 'transformers'} & set(sys.modules);"
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "peftkern", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"peftkern {__version__}")

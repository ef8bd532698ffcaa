"""The command line: help, exit codes, and that nothing heavy is imported to answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


# In a process of its own: importing the modules a second time here would register their ops anew.
@pytest.mark.parametrize(
    "absent, names, message",
    [
        ("peft", ["accelerate", "restore", "status"], "peftkern.accelerate needs peft, or adapters: pip install peft"),
        ("transformers", ["attach_adapters"], "peftkern.attach_adapters needs transformers: pip install transformers"),
    ],
)
def test_what_needs_a_package_says_how_to_get_it(absent, names, message):
    code = (
        f"import sys; sys.modules[{absent!r}] = None; import torch, peftkern\n"
        f"for name in {names}:\n"
        "    try:\n        getattr(peftkern, name)(torch.nn.Linear(2, 2))\n"
        "    except ModuleNotFoundError as error:\n        print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{message}\n" * len(names)), done.stderr


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

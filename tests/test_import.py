"""``import peftkern`` is light and changes nothing; the folder kernels/ hides nobody's package."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs in a fresh interpreter: what is there before `import peftkern`, what has changed after it.
PROBE = """
import json, os, sys
import torch, torch.nn.functional, torch.utils.checkpoint, numpy

def state():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("torch", "numpy") and hasattr(module, "__dict__"):
            for key, value in list(vars(module).items()):
                seen[name, key] = id(value)
                if isinstance(value, type):
                    seen.update({(name, key, k): id(v) for k, v in list(vars(value).items())})
    return seen

environment, modules, before = dict(os.environ), set(sys.modules), state()
settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed()
import peftkern
after = state()
ignored = ("__warningregistry__", "__abstractmethods__")
print(json.dumps({
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "triton": "triton" in sys.modules and "triton" not in modules,
    "changed": [list(key) for key in before if after.get(key) != before[key] and key[-1] not in ignored],
    "environment": dict(os.environ) == environment,
    "settings": settings
    == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed()),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def run(code: str, **environment: str) -> str:
    """Output of Python code in a fresh interpreter that starts at the repository root."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def probe():
    return json.loads(run(PROBE).splitlines()[-1])


def test_import_loads_no_other_package(probe):
    assert set(probe["new"]) - set(sys.stdlib_module_names) == {"peftkern"}
    assert not probe["triton"]


def test_import_changes_no_other_package(probe):
    assert probe["changed"] == []
    assert probe["environment"] and probe["settings"]


def test_import_touches_no_gpu(probe):
    assert not probe["cuda"]


def test_lazy_names_resolve_and_unknown_ones_raise():
    import peftkern

    for name in peftkern.__all__:
        assert getattr(peftkern, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        peftkern.no_such_name  # noqa: B018


def test_version_is_the_distribution_version():
    import peftkern

    assert peftkern.__version__.count(".") == 2
    try:
        installed = importlib.metadata.version("peftkern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("peftkern runs from the source folder, uninstalled")
    assert installed == peftkern.__version__


def test_hugging_face_kernels_is_not_hidden():
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed (requirements-nodeps.txt)")
    code = "import kernels, peftkern, sys; print(kernels.__file__); print(kernels.__version__)"
    file, version = run(code).split()
    assert ROOT / "kernels" not in Path(file).parents
    assert version == importlib.metadata.version("kernels")

"""The shape of the source tree: layers, cycles, includes, completeness of every op, file sizes, paths in documents."""

from __future__ import annotations

import ast
import collections
import functools
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftkern.methods import FUNCTIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "peftkern": ROOT / "peftkern",
    "peftkern.kernels": ROOT / "kernels/tl",
    "peftkern.benchmarks": ROOT / "benchmarks",
}
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".inc", ".cu", ".cuh"}

# Height of each layer: a module imports from its own or from lower layers. The longest matching prefix counts.
HEIGHT = {
    "peftkern": 11,  # the package itself: public names, gathered from below
    "peftkern.cli": 10,
    "peftkern.__main__": 11,
    "peftkern.demo": 9,
    "peftkern.benchmarks": 9,
    "peftkern.verify": 9,
    "peftkern.doctor": 9,
    "peftkern.testing": 8,
    "peftkern.integrations": 8,
    "peftkern.methods": 7,
    "peftkern.nn": 7,
    "peftkern.autograd": 6,
    "peftkern.many": 5,
    "peftkern.ops": 5,
    "peftkern.dispatch": 4,
    "peftkern.dispatch.tuned": 2,
    "peftkern.dispatch.table_files": 2,
    "peftkern.backends": 3,
    "peftkern.bases": 2,
    "peftkern.equation": 2,
    "peftkern.kernels": 2,
    "peftkern._C": 2,
    "peftkern.activations": 1,
    "peftkern.checks": 1,
    "peftkern.problem": 1,
    "peftkern.screen": 1,
    "peftkern.settings": 1,
    "peftkern._version": 0,
}
# Third-party packages beside torch and numpy, and the only layers that may import them.
THIRD_PARTY = {
    "bitsandbytes": ("peftkern.benchmarks",),
    "adapters": ("peftkern.integrations.adapter_hub", "peftkern.testing.residual", "peftkern.benchmarks"),
    "peft": ("peftkern.integrations", "peftkern.methods", "peftkern.demo", "peftkern.benchmarks"),
    "transformers": ("peftkern.integrations", "peftkern.methods", "peftkern.demo", "peftkern.benchmarks"),
    "triton": (
        "peftkern.kernels",
        "peftkern.backends.triton",
        "peftkern.doctor",
        "peftkern.benchmarks",
        "peftkern.verify",
    ),
    "packaging": ("peftkern.integrations",),
    "safetensors": ("peftkern.integrations",),
    "matplotlib": ("peftkern.demo", "peftkern.benchmarks"),
    "psutil": ("peftkern.benchmarks",),
    "polylora": ("peftkern.benchmarks.peers.polylora",),
}
# Ops without a benchmark of their own, and why.
NO_BENCHMARK = {
    "dropout_mask": "shows bits that lora_linear makes for itself; not on any hot path",
    "block_rotate": "a step of a layer, which bench --methods times as a whole",
    "lora_row_norm": "a scale of DoRA's layers, once a step; a part of a layer's time, not one of its own",
    "sgmv": "the branch of multi_lora_linear; a provider of that op's benchmark",
}
# Folders that may hold more than FILES files, and why.
FILES = 15
MANY_FILES = {
    ".": "what tools look for at the root",
    "benchmarks/results": "a file for each machine",
    "findings": "a file for each surprise, to be run alone",
    "tests/gpu/golden": "a file of vectors for each wrapped instruction",
}
# Public functions whose parameters users rely on; every other function has PARAMETERS at most.
PARAMETERS = 8
PUBLIC = {
    "peftkern.autograd.residual.bottleneck_adapter.bottleneck_adapter",
    "peftkern.autograd.expert_lora_linear.expert_lora_linear",
    "peftkern.autograd.lora_linear.lora_linear",
    "peftkern.autograd.residual.reft.reft",
    "peftkern.nn.bottleneck.BottleneckAdapter.__init__",
    "peftkern.nn.lora.LoRALinear.__init__",
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository: those git knows and those it would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for line in done.stdout.split("\n") if line and (path := ROOT / line).is_file()]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Absolute dotted names of what a module imports anywhere, functions included; modules of ours by full name."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in MODULES or full == "peftkern._C" else source)
    return frozenset(found)


def height(name: str) -> int:
    while name not in HEIGHT:
        name, _, last = name.rpartition(".")
        assert name and name != "peftkern", f"{last}: a new layer; give it a place in HEIGHT"
    return HEIGHT[name]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downward(name):
    for target in imports(name):
        if target.startswith("peftkern") and target != "peftkern":
            assert height(target) <= height(name), f"{name} imports {target}, which is in a higher layer"
        elif target == "peftkern":
            assert height(name) >= HEIGHT["peftkern.testing"], f"{name} imports the whole package from below"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_third_party_imports_have_a_home(name):
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "peftkern", "__future__"}
    for target in imports(name):
        top = target.partition(".")[0]
        homes = THIRD_PARTY.get(top, ())
        assert top in allowed or name.startswith(homes or ("-",)), f"{name} imports {target}"


def test_kernels_import_torch_triton_and_siblings_only():
    for name in MODULES:
        if name.startswith("peftkern.kernels"):
            for target in imports(name):
                ours = target.startswith("peftkern.kernels")
                standard = target.partition(".")[0] in sys.stdlib_module_names
                assert ours or standard or target.partition(".")[0] in ("torch", "triton"), f"{name} imports {target}"


def test_no_import_cycles():
    graph = {name: {t for t in imports(name) if t in MODULES and t != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_native_sources_know_no_torch_and_only_bindings_know_python():
    sources = [path for path in tracked("csrc") if path.suffix in SOURCE_SUFFIXES]
    assert sources
    for path in sources:
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.M):
            assert not re.match(r"torch/|ATen/|c10/|caffe2/", header), f"{path} includes {header}"
            bindings = ROOT / "csrc/bindings" in path.parents
            assert bindings or not re.match(r"Python\.h|pybind11|bindings/", header), f"{path} includes {header}"


def op_files() -> list[Path]:
    """Files of peftkern/ops that register an op."""
    return [p for p in sorted((ROOT / "peftkern/ops").glob("*.py")) if re.search(r"^define\(", p.read_text(), re.M)]


def test_every_op_has_reference_test_and_benchmark():
    from peftkern.benchmarks import registry
    from peftkern.dispatch import registry as dispatch

    stems = [path.stem for path in op_files()]
    assert {"lora_linear", "dropout_mask"} <= set(stems)
    for stem in stems:
        text = (ROOT / f"peftkern/ops/{stem}.py").read_text()
        assert re.search(rf"^def {stem}\w*_ref\(", text, re.M), f"{stem}: no reference"
        assert (ROOT / f"tests/ops/test_{stem}.py").is_file(), f"{stem}: no test"
        if list((ROOT / "peftkern/autograd").rglob(f"{stem}.py")):
            tests = list((ROOT / "tests/autograd").rglob(f"test_{stem}.py"))
            assert tests, f"{stem}: its autograd function has no test"
        assert stem in registry.OPS or stem in NO_BENCHMARK, f"{stem}: no benchmark"
    for name, op in dispatch.OPS.items():
        assert any(name.startswith(stem) for stem in stems), f"{name}: registered outside peftkern/ops"
        assert callable(op.reference)


def test_every_module_says_what_it_is():
    for path in tracked("*.py"):
        assert ast.get_docstring(parsed(path)), f"{path.relative_to(ROOT)} has no docstring"


def test_files_are_small():
    lengths = {p: p.read_text().count("\n") for p in tracked() if p.suffix in SOURCE_SUFFIXES}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 450}
    assert not long, f"one concept a file: {long}"
    assert statistics.median(lengths.values()) < 180


def test_folders_are_small():
    count = collections.Counter(path.parent.relative_to(ROOT).as_posix() for path in tracked())
    full = {folder: n for folder, n in count.items() if n > FILES and folder not in MANY_FILES}
    assert not full, f"a subfolder for what belongs together: {full}"


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and definition of every function, nested ones and methods included."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f"{prefix}.{node.name}" if named else prefix
        if named and not isinstance(node, ast.ClassDef):
            yield name, node
        yield from functions(node, name)


def parameters(node: ast.FunctionDef) -> int:
    """How many a caller passes."""
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def test_functions_have_few_parameters():
    """Kernels, whose parameters are those of a launch, the bindings, and the functional form of each method apart."""
    found = {}
    public = PUBLIC | {f"{form.__module__}.{name}" for name, form in FUNCTIONS.items()}
    for module, path in MODULES.items():
        for name, node in functions(parsed(path), module):
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not kernel and name not in public and parameters(node) > PARAMETERS:
                found[name] = parameters(node)
    assert not found, f"an object for what belongs together: {found}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", "_C")


def private_names(path: Path) -> tuple[set[str], set[str]]:
    """Private names that a file defines, and those that it imports, reads of an object or replaces (in a test)."""
    defined, used = set(), set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")
            (defined if own else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and re.search(r"\b[sgdh](et|el|as)attr$", ast.unparse(node.func)):
            used |= {
                arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return set(filter(private, defined)), set(filter(private, used))


def test_private_names_stay_in_their_file():
    """A private name that a file uses is its own, or one of torch or Python (``_modules``, ``_version``, ``_fields``)."""
    import torch

    theirs = (torch.nn.Module(), torch.Tensor, collections.namedtuple("Empty", ""), os.environ)
    names = {path: private_names(path) for path in tracked("*.py")}
    ours = set().union(*(defined for defined, _ in names.values()))
    foreign = {name for name in ours if any(hasattr(one, name) for one in theirs)}
    found = {
        path.relative_to(ROOT).as_posix(): wrong
        for path, (defined, used) in names.items()
        if (wrong := (used & ours) - defined - foreign)
    }
    assert not found, f"give it a public name, or leave it where it is: {found}"


def test_listed_packages_are_the_folders():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(config["packages"]) == folders
    assert not (ROOT / "kernels/__init__.py").exists()


def test_paths_in_documents_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *tracked("docs/*.md")]
    for document in documents:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|txt|cpp|h))`", text)
        linked = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
        for path in named:
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for path in linked:
            assert (document.parent / path).exists(), f"{document.name} links to {path}"

#!/usr/bin/env bash
# PEFT 0.21.2, torch 2.13.0 (CPU).
#
# BOFT tries to compile a CUDA extension when its first layer is made, with CC and CXX set to gcc for that time: by a context manager
# (patch_environment in tuners/boft/layer.py) whose second half does not run if the block raises. Without a CUDA toolkit it
# does raise, a warning says so, and the process, with all that it starts, goes on with CXX=gcc, which compiles C++ but links
# no C++ library. Whoever builds with $CXX later in that process gets libraries that do not load.
#
# Expected: the environment as it was.
# Seen:     CC and CXX are gcc; a shared library with one virtual function, built with $CXX, fails to load with an undefined symbol
#           of __cxxabiv1. Before the layer was made the same build works.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check -q"
$pip install torch==2.13.0
$pip install peft==0.21.2 setuptools ninja
cat >"$folder/shape.cpp" <<'CODE'
struct Shape { virtual int sides() const; };
int Shape::sides() const { return 3; }
extern "C" int sides() { return Shape().sides(); }
CODE
# No CUDA toolkit, wherever it may be.
env -u CC -u CXX -u CUDA_HOME -u CUDA_PATH PATH="$folder/venv/bin:/usr/bin:/bin" TORCH_EXTENSIONS_DIR="$folder/extensions" \
  FOLDER="$folder" "$folder/venv/bin/python" - <<'CODE'
import os
import subprocess
import sys
import warnings

warnings.filterwarnings("ignore")
import peft
import torch


def loads(name):
    """What a process of its own says when it loads a library that was built with the C++ compiler of the environment."""
    library = f"{os.environ['FOLDER']}/{name}.so"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", f"{os.environ['FOLDER']}/shape.cpp", "-o", library], check=True)
    code = f"import ctypes; print(ctypes.CDLL({library!r}).sides())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def compilers():
    return {name: os.environ.get(name) for name in ("CC", "CXX")}


before, built_before = compilers(), loads("before")
peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(8, 8)), peft.BOFTConfig(target_modules=["0"], boft_block_size=4)
)
after, built_after = compilers(), loads("after")
print("peft", peft.__version__, "torch", torch.__version__)
print("before:", before, built_before)
print("after: ", after, built_after)
assert before == {"CC": None, "CXX": None} and built_before == "3"
assert after == {"CC": "gcc", "CXX": "gcc"} and "undefined symbol" in built_after and "cxxabiv1" in built_after
CODE
echo "as described"

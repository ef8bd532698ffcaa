# Each target works alone in a fresh clone: it needs Python 3.11, g++ and make, nothing else.
# A set-up step runs again only when what it reads has changed (stamp files inside .venv).

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -qq
# Beside the other: AdapterHub's `adapters` with the release of transformers that it needs.
HUB    := .venv-adapters
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# Two test processes with one torch thread each (tests/conftest.py) finish sooner than one process with two.
WORKERS ?= 2
TESTS   ?= tests

# The tests want the CUDA kernels compiled wherever there is nvcc, whatever torch was built with; users get AUTO.
TEST_CUDA := $(if $(or $(CUDACXX),$(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc 2>/dev/null)),ON,OFF)

NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
# Objects are kept: after a change only what it reaches is compiled again.
BUILD  := PEFTKERN_BUILD_DIR="$(CURDIR)/build/objects" PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps -e .

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint bench setup adapters-env clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m peftkern demo --png demo.png

test: lint $(VENV)/.package-cuda adapters-env
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --durations 10 $(TESTS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check -q .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.cpp' '*.h' '*.hpp' '*.inc' '*.cu' '*.cuh')

bench: setup
	mkdir -p out
	$(BIN)/python -m peftkern bench --op lora_linear --preset quick --json out/bench.json --plot out

setup: $(VENV)/.package

# tests/integrations/test_adapters.py runs tests/integrations/adapters in it.
adapters-env: $(HUB)/.requirements

$(VENV)/.python:
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements-torch.txt requirements.txt requirements-nodeps.txt $(VENV)/.python
	@echo "installing pinned requirements (torch first)"
	@$(PIP) install -r requirements-torch.txt
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps -r requirements-nodeps.txt
	@touch $@

$(HUB)/.requirements: requirements-adapters.txt $(VENV)/.requirements
	@echo "creating $(HUB)"
	@$(PYTHON) -m venv --clear --without-pip $(HUB)
	@$(PIP) --python $(HUB)/bin/python install --no-deps -r requirements-adapters.txt
	@echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(HUB)/bin/python $(PURELIB))/venv.pth"
	@touch $@

$(VENV)/.package: $(NATIVE) $(VENV)/.requirements
	@echo "building peftkern"
	@$(BUILD)
	@touch $@

# Serves the other targets as well.
$(VENV)/.package-cuda: $(NATIVE) $(VENV)/.requirements
	@echo "building peftkern for the tests"
	@PEFTKERN_CUDA=$${PEFTKERN_CUDA:-$(TEST_CUDA)} $(BUILD)
	@touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) $(HUB) build dist out *.egg-info peftkern/*.so demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target works alone in a fresh clone: it needs Python 3.11, g++ and make, nothing else.
# A set-up step runs again only when what it reads has changed (stamp files inside .venv).

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -qq
# Beside it: AdapterHub's `adapters` with the release of transformers that it needs, and the libraries that quantise.
BESIDE := .venv-adapters .venv-quantised
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

.PHONY: demo test lint bench setup adapters-env quantised-env clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m peftkern demo --png demo.png

test: lint $(VENV)/.package-cuda adapters-env quantised-env
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations 10 $(TESTS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check -q .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.cpp' '*.h' '*.hpp' '*.inc' '*.cu' '*.cuh')

bench: setup
	mkdir -p out
	$(BIN)/python -m peftkern bench --op lora_linear --preset quick --json out/bench.json --plot out

setup: $(VENV)/.package

# tests/integrations/test_environments.py runs tests/integrations/adapters and tests/integrations/quantised in them.
adapters-env: .venv-adapters/.requirements

quantised-env: .venv-quantised/.requirements

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

$(BESIDE:=/.requirements): .venv-%/.requirements: requirements-%.txt $(VENV)/.requirements
	@echo "creating $(@D)"
	@$(PYTHON) -m venv --clear --without-pip $(@D)
	@$(PIP) --python $(@D)/bin/python install --no-deps -r $<
	@echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(@D)/bin/python $(PURELIB))/venv.pth"
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
	rm -rf $(VENV) $(BESIDE) build dist out *.egg-info peftkern/*.so demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

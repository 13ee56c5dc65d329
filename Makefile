# Every target sets up what it needs; a second run is instant. `make help` lists them.
#
#   PYTHON=...  the Python (3.11 or newer) that .venv is made from
#   PY=...      a Python that has everything already; nothing is installed then

PYTHON ?= python3
VENV := .venv
NAMESPACE := build/namespace
PROTOC := build/protoc
CODE := adapters_store benchmarks cli client deploy examples kernels models router runner service tests
PACKAGES := adapters_store cli client examples kernels models router runner service v1
PROTOS := $(wildcard protos/granatum/v1/*.proto)

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
BOX := $(VENV)/.box
DEV := $(VENV)/.dev
BENCH := $(VENV)/.bench
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: $(BOX)  ## start a router and two runners, serve every example adapter at once, check the answers
	$(PY) -m granatum.cli demo

.PHONY: test
test: $(DEV)  ## run every test that needs no GPU
	$(PY) -m pytest -m "not gpu" --numprocesses 2 --dist worksteal --durations 10

.PHONY: gpu-test
gpu-test: $(DEV) $(NAMESPACE)  ## run the tests that need a GPU
	PYTHONPATH=$(NAMESPACE) $(PY) -m pytest -m gpu tests/kernels tests/runner/engine/test_engine_gpu.py tests/runner/engine/test_hostile_gpu.py tests/runner/model/test_model_gpu.py tests/runner/model/test_logits.py

.PHONY: sanitize
sanitize: $(DEV) $(NAMESPACE)  ## look for bad accesses and races in kernels on a GPU, hostile numbers among them
	$(SANITIZE) --tool memcheck $(PY) -m pytest -m gpu -k $(SANITIZED) tests/kernels tests/runner/engine/test_hostile_gpu.py
	$(SANITIZE) --tool racecheck $(PY) -m pytest -m gpu -k $(SANITIZED) tests/kernels

# Of the engine's tests only memory is checked: racecheck cannot follow the library's products.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(NAMESPACE) compute-sanitizer \
  --error-exitcode 1 --kernel-name kns=_kernel
SANITIZED := "skewed and bfloat16 or bit_identical or test_tile_lists or made_of or numbers_that_break or not_finite or beyond_the_vocabulary or hostile"

.PHONY: check
check: format-check types stubs-check  ## formatting, lint, types, protos, stubs, compose file
	$(VENV)/bin/buf lint
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(PY) -m pytest tests/test_architecture.py

.PHONY: extras
extras: $(DEV)  ## install each extra alone and import what it promises
	$(PY) deploy/extras.py

.PHONY: format
format: $(DEV)  ## format the code and fix what lint can fix
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

.PHONY: format-check
format-check: $(DEV)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)

.PHONY: types
types: $(DEV) $(NAMESPACE)  ## check the types
	MYPYPATH=$(NAMESPACE) $(PY) -m mypy $(PACKAGES:%=-p granatum.%)
	MYPYPATH=$(NAMESPACE):benchmarks:tests/lib $(PY) -m mypy --no-strict-equality benchmarks deploy tests

.PHONY: plots
plots: $(BENCH) $(NAMESPACE)  ## draw docs/*.svg from the benchmarks' results
	PYTHONPATH=$(NAMESPACE) $(PY) benchmarks/plot.py benchmarks/results/h200 docs

.PHONY: stubs
stubs: $(DEV) $(PROTOC)  ## regenerate the stubs beside the protos
	$(call protoc,protos)

.PHONY: stubs-check
stubs-check: $(DEV) $(PROTOC)
	rm -rf build/stubs && mkdir -p build/stubs
	$(call protoc,build/stubs)
	cd build/stubs && for stub in granatum/v1/*; do \
	  diff -u "$(CURDIR)/protos/$$stub" "$$stub" || { echo "stale stub: run make stubs"; exit 1; }; \
	done

define protoc
PYTHONPATH=$(PROTOC) $(PY) -m grpc_tools.protoc -Iprotos \
  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTOS)
endef

.PHONY: clean
clean:  ## remove what the other targets made
	rm -rf build $(VENV)

$(NAMESPACE): pyproject.toml deploy/namespace.py
	$(PY) deploy/namespace.py

# Apart from the environment: its grpcio and protobuf are newer than this compiler accepts.
$(PROTOC): constraints.txt | $(DEV)
	rm -rf $@
	$(PY) -m pip install --quiet --no-deps --target $@ --constraint constraints.txt grpcio-tools

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f"granatum needs Python 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}. " \
	  "Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "pip>=25.1"

# The images of deploy/ install with the same lines (tests/deploy holds them together).
$(VENV)/.box: pyproject.toml constraints.txt | $(VENV)/bin/python
	PYTHONWARNINGS=ignore \
	  $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[box]"
	@touch $@

$(VENV)/.dev: $(VENV)/.box
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@

$(VENV)/.bench: $(VENV)/.box
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --group bench
	@touch $@

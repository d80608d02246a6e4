# Needs make and Python 3.11 or newer; no compiler, no root. `make help` lists the rest.
#
#   make demo ARGS="--peers 4 --rounds 6 --json"
#   make test PYTHON=python3.12 PYTEST_ARGS="tests/dht -x"
#
# TORCH=auto takes the CPU build of torch where there is no NVIDIA GPU; cpu and pypi force one.

PYTHON ?= python3
TORCH ?= auto
BIN := .venv/bin
PROTOS := $(sort $(wildcard */proto/*.proto))
PROTOC := $(BIN)/python -m grpc_tools.protoc -I .

.PHONY: help demo test unit lint types imports stubs proto soak test-docker venv venv-dev clean
.NOTPARALLEL: # the checks of `make test` are cheap first, and its last line is pytest's
.DEFAULT_GOAL := help

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: venv ## four peers on this machine train together; ARGS="--peers 4 --rounds 6 --json"
	@exec $(BIN)/shoal demo $(ARGS)

test: lint types imports stubs unit ## everything that must hold before a commit

unit: venv-dev ## the tests alone; PYTEST_ARGS="tests/dht -x"
	@exec $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: venv-dev ## style
	@$(BIN)/ruff check .

types: venv-dev ## mypy, strict
	@$(BIN)/mypy

imports: venv-dev ## which package may import which
	@$(BIN)/lint-imports --no-logo

stubs: venv-dev ## the committed protobuf stubs are what their .proto files generate
	@rm -rf build/stubs && mkdir -p build/stubs
	@test -z "$(PROTOS)" || $(PROTOC) --python_out=build/stubs --pyi_out=build/stubs $(PROTOS)
	@stale=0; \
	for file in $(PROTOS:.proto=_pb2.py) $(PROTOS:.proto=_pb2.pyi); do \
	    diff -u "$$file" "build/stubs/$$file" || stale=1; \
	done; \
	test $$stale = 0 || { echo "stubs: out of date, run \`make proto\`" >&2; exit 1; }
	@echo "stubs: $(words $(PROTOS)) .proto files match"

proto: venv-dev ## generate the protobuf stubs anew
	@$(PROTOC) --python_out=. --pyi_out=. $(PROTOS)

soak: venv-dev ## the simulator, for as many seeds as you like; SEEDS=100000
	@exec $(BIN)/python -m tests.sim.soak --seeds $(or $(SEEDS),1000)

test-docker: ## build the image and train with compose; needs a Docker engine
	@exec bash tests/docker/run.sh

venv:
	@command -v $(PYTHON) >/dev/null || { echo "shoal: there is no $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -S .ci/venv.py --torch $(TORCH)

venv-dev:
	@command -v $(PYTHON) >/dev/null || { echo "shoal: there is no $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -S .ci/venv.py --torch $(TORCH) dev

clean: ## remove the environment and every cache
	rm -rf .venv .venv.lock build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

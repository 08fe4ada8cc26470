# Each target works alone on a fresh checkout with Python >= 3.11 and make: .venv is made on first
# use and again when pyproject.toml or constraints.txt changes.
#
#   make swarm ARGS="--peers 8 --baseline"      make test ARGS="tests/gossip -x"
#   make PYTHON=/opt/python3.12/bin/python3 test

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/ready
PROTOS := $(patsubst proto/%,shoal/proto/%,$(wildcard proto/v1/*.proto))
ARGS ?=
SECONDS ?= 10

.PHONY: help swarm test test-slow check proto bench fuzz libp2p clean

help:
	@echo "make swarm      four daemons on this machine train a model on real text"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow ones"
	@echo "make check      format, lint, types, layers, wire schema"
	@echo "make proto      generate proto/v1 anew"
	@echo "make bench      the benchmarks; one: make bench ARGS=overhead"
	@echo "make fuzz       feed every decoder garbage, SECONDS=10 each"
	@echo "make libp2p     try again to install what finds peers on the local network"

swarm: $(READY)
	$(BIN)/shoal swarm --peers 4 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	@if [ -x $(BIN)/buf ]; then echo $(BIN)/buf lint .pkg; $(BIN)/buf lint .pkg; \
	else echo "buf is not here: the wire schema was not linted"; fi

proto: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I.pkg --python_out=.pkg \
		--grpc_python_out=.pkg --mypy_out=quiet:.pkg --mypy_grpc_out=quiet:.pkg $(PROTOS)

bench: $(READY)
	$(BIN)/shoal bench $(ARGS)

fuzz: $(READY)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	@for name in $(or $(ARGS),$$($(BIN)/python tests/fuzz/decoders.py --names)); do \
		echo "fuzzing $$name"; $(BIN)/python tests/fuzz/decoders.py $$name \
			-max_total_time=$(SECONDS) -verbosity=0 -print_final_stats=1 2>&1 \
			| tee .venv/fuzz.log | grep -E 'exec_per_sec|number_of_executed|Error|Exception|BINGO|artifact' ; \
		if grep -q 'Test unit written' .venv/fuzz.log; then cat .venv/fuzz.log; exit 1; fi; \
	done

libp2p: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[libp2p]'

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

# libp2p is an extra: one of its dependencies compiles from source, and Shoal works without it.
$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "Shoal needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@if ! printf '#include <gmp.h>\n' | $${CC:-cc} -E - >/dev/null 2>&1; then \
		echo "libp2p is left out: it needs a C compiler and gmp.h (Debian: gcc libgmp-dev)."; \
		echo "Peers are found by address; everything else works. Later: make libp2p"; \
	elif ! $(BIN)/pip install -q -c constraints.txt -e '.[libp2p]' >.venv/libp2p.log 2>&1; then \
		echo "libp2p is left out: it did not install (.venv/libp2p.log says why)."; \
		echo "Peers are found by address; everything else works. Later: make libp2p"; \
	fi
	@touch $@

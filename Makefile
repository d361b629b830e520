# make run          installs, creates or opens the town in .town, and serves REST on 127.0.0.1:8787
# make test         installs, and runs the tests
# make setup        only installs
# make lint         runs ruff and mypy --strict
# make chaos        kills and breaks parts of a town for SECONDS=60, and kills a worker at every command; SEED=N repeats a run
# make dist         builds dist/townhall.pyz, dist/tt.pyz and the wheel; WHEELS=DIR adds files for other platforms from there
# make bundle       builds a tarball that installs without a network; WHEELS=DIR takes wheels from there, without downloads
# make docs         writes the parts of ARCHITECTURE.md and docs/ that are made from the code
# make bench        compares the speed with other servers (needs wrk, and node for one of them); BENCH='--short --only townhall'
# make conformance  runs the official MCP conformance suite, for both protocol generations
# make test-system  runs that suite, real MCP clients, tests with nginx, haproxy and promtool, Schemathesis on our OpenAPI
#                   document, and a longer fuzz of the HTTP parser; SEED=N sets its seed
# Needs Python 3.11 or newer with venv. To choose another one:  make PYTHON=python3.13 run

PYTHON ?= python3
BIN := .venv/bin

SECONDS ?= 60
SEED ?=
BENCH ?=
WHEELS ?=

.PHONY: run test test-system conformance chaos bench dist bundle setup lint docs clean

run: .venv/run
	@test -f .town/tinytown.toml || $(BIN)/tt init --town .town --name town --cli demo >/dev/null
	@exec $(BIN)/townhall --town .town

test: .venv/dev
	$(BIN)/python -m pytest -q -n 4

test-system: .venv/dev .venv/tools
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/system
	FUZZ=3000 FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/http/test_fuzz.py

conformance: .venv/dev
	$(BIN)/python -m pytest -q tests/system/test_conformance.py

chaos: .venv/dev
	CRASH_POINTS=all $(BIN)/python -m pytest -q -n auto tests/worker/test_crash_points.py
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

bench: .venv/dev
	$(BIN)/python -m bench $(BENCH)

dist bundle: .venv/dev
	$(BIN)/python deploy/$@.py $(if $(WHEELS),--wheels $(WHEELS))

docs: .venv/dev
	$(BIN)/python -m tests.docs

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: .venv/dev

clean:
	rm -rf .venv .peers .bench .town .mypy_cache .ruff_cache *.egg-info build dist

.venv/run: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.13 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,fast]'
	@touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded,fast,dev]'
	@touch $@

.venv/tools: .venv/run
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check 'schemathesis >= 4.32, < 5'
	@touch $@

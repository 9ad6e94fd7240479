# Everything a contributor runs. `make` alone lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo dashboard bento bench bench-quality faults mutants export lab test clean

VENV := .venv
BIN := $(VENV)/bin
# Stamps: what is up to date is not done again.
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 15

setup: $(INSTALLED) ## create .venv from requirements.lock (about two minutes, once)

$(LOCKED): requirements.lock
	@case "$$(uname -sm)" in Linux*|"Darwin arm64") ;; *) echo "setup: needs Linux or a Mac with Apple silicon" >&2; exit 1;; esac
	@python=$$(for name in python3.13 python3.12 python3.11 python3; do \
	    "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo "$$name"; break; }; done || true); \
	[ -n "$$python" ] || { echo "setup: needs Python 3.11, 3.12 or 3.13 on PATH" >&2; exit 1; }; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $$python lacks its venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }; \
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(INSTALLED): $(LOCKED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## servers, history, a first model, a live stream and its proof (DEMO_SECONDS=60 ends by itself)
	@$(BIN)/fraud demo $(if $(DEMO_SECONDS),--seconds $(DEMO_SECONDS))

dashboard: setup ## the analyst's desk on loopback, beside the demo or a stream of your own
	@$(BIN)/fraud dashboard

bench: setup ## the worker beside a record-at-a-time pipeline; or OF=soak, OF=recovery (WITH="--minutes 5")
	@$(BIN)/python -m tests.bench.$(or $(OF),bench) $(WITH)

bench-quality: setup ## detection quality on the Handbook's payments, beside the book (FOLDS=validation looks at no test week)
	@$(BIN)/python -m tests.bench.quality

faults: setup ## pull every plug, and prove that nothing is lost or twice (SEEDS=20 ONLY=1,5 JOBS=4; goes on where it stopped)
	@$(BIN)/python -m tests.faults.run --seeds $(or $(SEEDS),3) --only "$(ONLY)" --jobs $(or $(JOBS),1)
	@$(if $(ONLY),,FUZZ_CASES=1000000 $(BIN)/python -m pytest -q tests/faults/test_bad_input.py tests/faults/test_fuzz.py)

mutants: setup ## take one safety mechanism out at a time, and see that the tests notice (ONLY=3,7; half an hour)
	@$(BIN)/python -m tests.faults.mutants --only "$(ONLY)"

bento: setup ## package the prediction service with the champion inside, for `bentoml serve`
	@$(BIN)/fraud bento

export: setup ## format the notebooks, write fraud_nb/ from them, clean them
	$(BIN)/ruff format --quiet nbs
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

lab: setup ## open JupyterLab on this repository, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. $(if $(filter 0,$(shell id -u)),--allow-root) # in a container

test: setup ## everything a change must pass, in the order of CI
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	bin=$$PWD/$(BIN); cp -R nbs fraud_nb settings.ini pyproject.toml "$$scratch"; cd "$$scratch"; \
	"$$bin/ruff" format --quiet nbs; "$$bin/nbdev_export"; "$$bin/nbdev_clean"; cd "$$OLDPWD"; \
	for part in nbs fraud_nb pyproject.toml; do \
	    diff -r -x __pycache__ -x .ipynb_checkpoints "$$part" "$$scratch/$$part" \
	    || { echo "test: $$part is not what 'make export' writes; run it and keep the result" >&2; exit 1; }; done
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nbdev_test --n_workers 0 --skip_folder_re '^(jobs$$|[_.])' # tests/ runs the jobs, as papermill does
	$(BIN)/python -m pytest -n 2 --dist loadfile # two files at a time: most of them wait for servers

clean: ## remove .venv, caches and everything a run left behind
	rm -rf $(VENV) .fraud runs mlruns _proc _docs *.egg-info .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -path ./.git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

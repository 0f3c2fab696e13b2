# `make help` lists the commands. Each creates the environment it needs, once, in .venv.
# Only python3 (3.10 or newer, with venv and pip) and make must be there.

PYTHON ?= python3
# Another Transformers release, in an environment of its own: make test TRANSFORMERS='5.17.*'
TRANSFORMERS ?=
# pytest processes; each computes with one thread.
WORKERS ?= 2
# Passed on to the command behind a target: make test ARGS='-k attention'
ARGS ?=
# Which benchmarks `make bench` runs.
BENCH ?= op train

VENV := .venv$(if $(TRANSFORMERS),-transformers-$(subst *,x,$(TRANSFORMERS)))
RUN := $(VENV)/bin/python -m
# Touched last, so an interrupted installation is not taken for a ready one.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help coverage demo try fuzz test test-distributed test-ecosystem test-faults test-notebooks test-transformers lint bench paper paper-quick figures notebooks docs docs-serve matrix clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(READY) ## train a LongNet on real text, evaluate it, plot, save, load it back
	$(RUN) examples.demo $(ARGS)

FILE = modeling_longnet
try: $(READY) ## load the trained model of pretrained/, let it write, measure it on FILE=..., in a minute
	$(RUN) examples.try_model --file '$(FILE)' $(ARGS)

test: $(READY) ## run the tests (TRANSFORMERS='5.17.*' with that release, ARGS=... for pytest)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) $(ARGS)

coverage: $(READY) ## the tests, and which lines of the package they run; under 95 % is an error
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=95 $(ARGS)

test-distributed: $(READY) ## run the whole matrix of sequences sharded over processes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest tests/sharding_matrix.py $(ARGS)

test-transformers: $(READY) ## run Transformers' own model tests, minutes (TRANSFORMERS='5.17.*' those of that release)
	$(VENV)/bin/python tests/library/source.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) -r fEx tests/library/model_tests.py $(ARGS)

test-ecosystem: .venv-ecosystem/.ready ## run other libraries on the models: PEFT, TRL, lm-eval and more (TABLE=docs/ecosystem.md)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TABLE=$(TABLE) .venv-ecosystem/bin/python -m pytest tests/ecosystem $(ARGS)

test-faults: $(READY) ## kill training, saves, conversions, streams and sharded processes at random moments; minutes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -m faults tests/test_faults.py $(ARGS)

test-notebooks: $(READY) ## run every notebook at toy size, those that start processes too
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -m "notebooks or not notebooks" tests/test_notebooks.py $(ARGS)

MINUTES ?= 5
fuzz: $(READY) ## random inputs against the dense reference, and damaged files (MINUTES=30 or CASES=20000, ARGS='--replay ...')
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(RUN) fuzz $(if $(CASES),--cases $(CASES),--minutes $(MINUTES)) $(ARGS)

lint: $(READY) ## check style and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

bench: $(READY) ## time against the rivals (BENCH=op for one), write benchmarks/results/*.json
	for name in $(BENCH); do $(RUN) benchmarks.run $$name $(ARGS) || exit 1; done

paper: $(READY) ## redo the paper's comparisons, small; hours, resumes where it stopped (ARGS='--hours 2')
	$(RUN) examples.paper.run $(ARGS)

paper-quick: $(READY) ## the same at toy size, in a minute: shows that every step runs
	$(RUN) examples.paper.run --quick --results output/paper-quick
	$(RUN) examples.paper.figures --results output/paper-quick

figures: $(READY) ## rebuild every table and plot from the JSON files of benchmarks/ and examples/paper/
	$(RUN) benchmarks.figures $(ARGS)
	$(RUN) examples.paper.figures
	$(RUN) tests.matrix --page

notebooks: $(READY) ## run the notebooks anew and keep their outputs; minutes
	HF_HUB_OFFLINE=1 $(RUN) examples.notebooks.run $(ARGS)

matrix: $(READY) ## run the tests with other versions of Python, PyTorch and Transformers; hours, gigabytes
	$(RUN) tests.matrix $(ARGS)

docs: $(READY) ## build the documentation and the API reference into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict $(ARGS)

docs-serve: $(READY) ## show the documentation on this machine, rebuilt when a page changes
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs serve $(ARGS)

clean: ## remove the environments and caches
	rm -rf .venv .venv-ecosystem .venv-transformers-* .matrix .cache .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info build site

.venv-ecosystem/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/pip install --quiet --constraint constraints.txt --editable '.[examples,dev,ecosystem]'
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[examples,dev]' \
		$(if $(TRANSFORMERS),'transformers==$(TRANSFORMERS)')
	touch $@

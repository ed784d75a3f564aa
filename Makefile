PYTHON ?= $(shell command -v python || command -v python3)
LAB ?= $(PYTHON) -m reflow_lab.cli
# of the tables: how large, how many training seeds from which one on, and which experiment (empty: the study's own, the quickstart's data)
SCALE ?= mini
SEEDS ?= 3
SEED ?= 10
DATA ?=
STUDIES := $(patsubst experiments/simple_reflow/%.yaml,%,$(wildcard experiments/simple_reflow/*.yaml))
AYF := $(patsubst experiments/align_your_flow/%.yaml,%,$(wildcard experiments/align_your_flow/*.yaml))
MEASURED = scale=$(SCALE) seeds=$(SEEDS) seed=$(SEED) $(if $(DATA),experiment=$(DATA)) $(WITH)
WHERE = $(if $(DATA),-$(DATA))$(if $(filter-out mini,$(SCALE)),-$(SCALE))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint type report tables $(STUDIES:%=table-%) $(AYF:%=table-ayf_%) bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: ## install the package, editable, with everything the tests need
	$(PYTHON) -m pip install -e ".[dev]"

demo: ## ReFlow at work on real images: the ladder of improvements as a table, in outputs/demo
	$(LAB) study study=quickstart out=outputs/demo

test: lint type ## what has to pass: lint, types and the tests (one process per core)
	$(PYTHON) -m pytest -n auto -m "not slow and not gpu"

test-all: lint type ## the slow tests as well, and those for a GPU where there is one
	$(PYTHON) -m pytest -n auto

lint: ## style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type: ## static types
	$(PYTHON) -m mypy

# one target a study of experiments/simple_reflow, e.g. make table-ladder DATA=cifar10 SCALE=h100_30min WITH="teacher.path=base.safetensors"
$(STUDIES:%=table-%): table-%:
	$(LAB) study study=simple_reflow/$* $(MEASURED) out=experiments/results/$*$(WHERE)

# and of experiments/align_your_flow, e.g. make table-ayf_headline
$(AYF:%=table-ayf_%): table-ayf_%:
	$(LAB) study study=align_your_flow/$* $(MEASURED) out=experiments/results/ayf_$*$(WHERE)

tables: ## all results of studies on one page, experiments/README.md; make table-NAME runs a study
	$(LAB) tables

report: ## all results of studies as one HTML page, report.html
	$(LAB) report

bench: ## our training step, sampler, pairs, data and distances against bare loops and other packages
	$(LAB) bench train
	$(LAB) bench sample
	$(LAB) bench pairs
	$(LAB) bench data
	$(LAB) bench evaluate
	$(LAB) bench flow_map

clean: ## remove caches and built packages; outputs/ stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

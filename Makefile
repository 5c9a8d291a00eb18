# Everything runs in .venv, which the first target that needs it builds. `make` alone prints this list.
PYTHON ?= python3.11
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help venv repro test long lab notebooks book bench report remote lint clean

help: ## print this list
	@echo "make repro, then make test. All targets:"
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-11s%s\n", $$1, $$2}'

venv: ## build .venv from requirements.txt (about 4 GB with GPU wheels; once)
	@if cmp -s requirements.txt .venv/installed.txt; then exit 0; fi; set -e; \
	echo "== building .venv with $(PYTHON): some minutes, once =="; \
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv; \
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt; \
	echo "== installing tlv itself, editable =="; \
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	cp requirements.txt .venv/installed.txt; \
	echo "== .venv is ready =="

repro: venv ## run the pipeline, raw clips to evaluated model; only what changed runs again
	dvc repro

test: venv ## run all tests: units, golden values, notebooks, a small pipeline in a clone
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

long: venv ## notebook 06 on the whole grid: all selections and mergings, clips to 10,000 frames
	python -m tlv.stage run 06_long_video --preset tiny/long

lab: venv ## open the notebooks in JupyterLab
	python -m tlv.lab

notebooks: venv ## run every notebook at smoke scale and store its outputs and costs in place
	python -m tlv.notebooks refresh

book: venv ## render the notebooks as web pages in book/
	jupyter nbconvert --to html --output-dir book notebooks/*.ipynb

bench: venv ## run every stage again, whether it changed or not, and print what each cost
	dvc repro --force
	python -m tlv.report costs

report: venv ## fill the README's tables from outputs/
	python -m tlv.report readme

remote: venv ## make DIR=/some/folder the place for dvc push and dvc pull, on this machine only
	@test -n "$(DIR)" || { echo "say where: make remote DIR=/some/folder"; exit 2; }
	dvc remote add --local --default --force store "$$(realpath -m "$(DIR)")"

lint: venv ## check the code's style
	ruff check .

clean: ## delete scratch files and unfinished runs; keeps .venv, results and the DVC cache
	rm -rf book dvc_plots outputs/scratch outputs/.resume outputs/.code outputs/.embeddings .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

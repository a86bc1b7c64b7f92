# make demo and make test need python3, make and, for the C helper, a C compiler; nothing else, and no privileges.

# The interpreter for the virtual environment; another one than last time builds it anew.
PYTHON ?= python3
VENV ?= .venv
# Test processes. Tests mostly wait for real workers, so more than there are cores.
TEST_PROCESSES ?= 6
# Seconds after which no further test is started.
TEST_SECONDS ?= 3000
# For make test-v2: which tests, seconds for all of them, by how much everything is slower there, test processes.
V2_TESTS ?= -m cgroup tests/contract tests/faults tests/integration
V2_SECONDS ?= 7200
V2_SLOWNESS ?= 10
V2_PROCESSES ?= 2
# More options for tests/version2/run.py.
V2_ARGS ?=
# More options for pytest, such as PYTEST_ARGS="-k spawn -x".
PYTEST_ARGS ?=
# Examples that `make check-model` tries; `make pytest` tries a few.
MODEL_EXAMPLES ?= 10000
# More options for the demo and the benchmarks.
DEMO_ARGS ?=
BENCH_ARGS ?=

# What make check-ctypes runs, of which -k leaves out what needs the C helper.
CTYPES_TESTS := tests/unit tests/native tests/integration/test_ladder.py tests/contract/test_reports.py

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --session-timeout $(TEST_SECONDS)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CREATED := $(VENV)/.created-$(subst /,_,$(PYTHON))
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.[ch] csrc/*.py)
COMMA := ,

# What a caller's shell has set must not leak into the virtual environment.
unexport PYTHONPATH PYTHONHOME

.PHONY: help demo test test-v2 pytest check-model check-ctypes lint format bench clean

help:
	@echo "make demo    run a real worker on this pool, with nothing else to install"
	@echo "make test    make lint and all tests; PYTEST_ARGS=... for pytest, TEST_PROCESSES=$(TEST_PROCESSES), PYTHON=$(PYTHON)"
	@echo "make pytest  the tests alone"
	@echo "make test-v2 those of cgroups on a real version 2, in an emulated machine: V2_TESTS=..., V2_SECONDS=$(V2_SECONDS)"
	@echo "make check-model  search longer for what the rules do not think of: MODEL_EXAMPLES=$(MODEL_EXAMPLES)"
	@echo "make check-ctypes  some of the tests, without the C helper"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format the code"
	@echo "make bench   measure against Celery's own pool; benchmarks/ladder.py does so in cgroups"
	@echo "make clean   remove what these made"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# Tests run whatever lint says, and end last, so that their summary is the end of the output; either one's failure counts.
test: $(VENV)/.installed-test
	@failed=; \
	$(MAKE) --no-print-directory lint || failed=lint; \
	$(MAKE) --no-print-directory pytest || failed="$$failed pytest"; \
	test -z "$$failed" || { echo "make test: failed: $$failed" >&2; exit 1; }

pytest: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_ARGS)

# Also on machines that have version 1, and for those who are not root: see tests/version2/run.py.
test-v2: $(VENV)/.installed-test
	$(BIN)/python tests/version2/run.py --packages build/version2 --seconds $(V2_SECONDS) \
	    --slowness $(V2_SLOWNESS) --processes $(V2_PROCESSES) $(V2_ARGS) -- $(V2_TESTS) $(PYTEST_ARGS)

# Half of them on machines where nobody lies: there memory must not even pass the budget.
check-model: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=long MODEL_EXAMPLES=$(MODEL_EXAMPLES) $(BIN)/python -m pytest -n 2 --timeout 0 -o faulthandler_timeout=0 tests/unit/test_model.py tests/unit/test_prefetch.py $(PYTEST_ARGS)

# Without the C helper in any interpreter, also where it is built.
check-ctypes: $(VENV)/.installed-test
	export PYTHONPATH=$(CURDIR)/tests/harness/no_extension; \
	$(BIN)/python -c 'from memsafe_pool import native; assert not native.HAVE_EXTENSION' && \
	$(PYTEST) $(CTYPES_TESTS) -k "not extension and not nothing_is_missing" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	@failed=; \
	$(BIN)/ruff check --output-format concise || failed=1; \
	$(BIN)/ruff format --check --output-format concise || failed=1; \
	$(BIN)/mypy || failed=1; \
	test -z "$$failed"

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/table.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f memsafe_pool/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable, so that a change in memsafe_pool/ needs no new installation: one in the build inputs does. The extension is
# optional, so its old build goes first: it would stay, unnoticed, where the new one fails.
define INSTALL
	rm -f memsafe_pool/_native*.so
	$(PIP) install --editable '.$(1)'
	@$(BIN)/python -c 'from memsafe_pool import native; native.HAVE_EXTENSION or print("make: the C helper was not built (is there a C compiler?); the pool uses ctypes:", native.EXTENSION_ERROR)'
	@touch $@ $(VENV)/.installed
endef

$(VENV)/.installed: $(CREATED) $(BUILD_INPUTS)
	$(call INSTALL,)

$(VENV)/.installed-test: $(CREATED) $(BUILD_INPUTS)
	$(call INSTALL,[test$(COMMA)dev])

$(VENV)/.installed-bench: $(CREATED) $(BUILD_INPUTS)
	$(call INSTALL,[bench])

# pip 22: the first ones that come with some Python 3.10 cannot install this package in editable form.
$(CREATED):
	@command -v "$(PYTHON)" >/dev/null || \
	{ echo "make: there is no $(PYTHON); install Python 3.10 or later, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "make: $(PYTHON) is older than Python 3.10; name a later one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu it is in the package python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) install 'pip>=22'
	@touch $@

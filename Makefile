# Everything a checkout needs: `make demo` and `make test` set up their own virtual environment first.
#
#   make demo          answer questions about a long context from a compressed cache
#   make test          lint, types and the fast tests
#   make test-slow     the tests that are marked slow
#   make test-newest   all tests with the newest releases that pyproject.toml allows, whatever the pins say
#   make test-oldest   all tests with the oldest releases that pyproject.toml allows
#   make test-oldest-transformers   generation with the oldest Transformers and the other packages as pinned
#   make test-pythons  `make test` with Python 3.10, 3.11, 3.12 and 3.13
#   make docs          the documentation as a site, in build/site
#   make lint          ruff and mypy alone
#   make clean         remove what was built
#   make distclean     remove the environments too
#
#   PYTHON=python3.12  the interpreter (3.10 to 3.13); the first suitable one otherwise
#   TORCH_INDEX=URL    where torch comes from; on Linux without a GPU https://download.pytorch.org/whl/cpu saves gigabytes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SUITABLE := import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$p -c '$(SUITABLE)' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
OLDEST ?= .venv-oldest
OLDEST_TRANSFORMERS ?= .venv-oldest-transformers
NEWEST ?= .venv-newest
DOCS ?= .venv-docs
# Names or paths. Each gets an environment of its own, .venv-3.10 and so on.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Two processes of one thread each: the tests need no more than two cores. torchac looks for ninja on the path.
TEST_WITH = PATH="$(abspath $(1))/bin:$$PATH" OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal

TORCH := $(shell grep -m 1 '^torch==' requirements-dev.txt)
# name==version of every dependency in pyproject.toml, with the oldest version that is allowed there.
OLDEST_ALLOWED := $(shell sed -nE '/^dependencies/,/^\]/s/^ *"([a-z_]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml)
# Every requirement in pyproject.toml as it stands there, quoted: the dependencies and those of all extras.
ALLOWED := $(shell sed -n '/^dependencies/,/^\[project.scripts/p' pyproject.toml | \
	grep -oE '"[a-zA-Z0-9_-]+(\[[a-z0-9]+\])?[<>=][^"]*"')
# What depends on Transformers most: generation in every decoding mode, caches and their layers.
MATRIX := $(wildcard tests/test_generation*.py) tests/test_cache.py tests/test_layers.py
NATIVE := $(shell find cuda_ext -type f 2>/dev/null)
# The library is built by itself, since pip would hide what the compiler says (without one the package still works, slowly).
# Without isolation pip uses the pinned setuptools; without dependencies it cannot replace a pinned package.
INSTALL_WITH = $(1)/bin/python setup.py --quiet build_ext --inplace && \
	$(1)/bin/python -m pip install -qq --no-build-isolation --no-deps --editable .

VERSIONS_OF = @$(1)/bin/python -c "import torch, transformers as t; print('== torch', torch.__version__, 'transformers', t.__version__)"

.PHONY: FORCE demo test test-slow test-newest test-oldest test-oldest-transformers test-pythons lint docs setup clean distclean

demo: setup
	@$(VENV)/bin/hf-cachegen demo

test: lint
	$(call TEST_WITH,$(VENV)) -m "not slow" $(PYTEST_ARGS)

test-slow: setup
	$(call TEST_WITH,$(VENV)) -m slow $(PYTEST_ARGS)

test-newest: $(NEWEST)/.package
	$(call VERSIONS_OF,$(NEWEST))
	$(call TEST_WITH,$(NEWEST)) $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.package
	$(call VERSIONS_OF,$(OLDEST))
	$(call TEST_WITH,$(OLDEST)) $(PYTEST_ARGS)

test-oldest-transformers: $(OLDEST_TRANSFORMERS)/.requirements
	$(call VERSIONS_OF,$(OLDEST_TRANSFORMERS))
	$(call TEST_WITH,$(OLDEST_TRANSFORMERS)) $(MATRIX) $(PYTEST_ARGS)

# An interpreter that is not there is an error: what was not tested does not pass.
test-pythons:
	@for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "== Python $$version"; $(MAKE) PYTHON=$$python VENV=.venv-$$version test; \
	done

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(DOCS)/.requirements
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

setup: $(VENV)/.package

# Stamps: each step is done again only when what it depends on is newer.
$(VENV)/.created $(OLDEST)/.created $(OLDEST_TRANSFORMERS)/.created $(NEWEST)/.created $(DOCS)/.created:
	@if ! $(or $(PYTHON),false) -c '$(SUITABLE)' 2>/dev/null; then \
		echo "needs Python 3.10 to 3.13 with venv; name one by 'make PYTHON=...'" >&2; exit 1; fi
	@echo "== $(@D): a virtual environment of $(PYTHON)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.torch: requirements-dev.txt | $(VENV)/.created
	@echo "== $(TORCH), first, so that nothing else chooses another"
	@if [ -n "$(TORCH_INDEX)" ]; then $(VENV)/bin/python -m pip install $(TORCH) --index-url $(TORCH_INDEX); \
	else $(VENV)/bin/python -m pip install $(TORCH) \
		|| $(VENV)/bin/python -m pip install $(TORCH) --index-url $(CPU_INDEX); fi
	@touch $@

$(VENV)/.requirements: $(VENV)/.torch
	@echo "== the other packages of requirements-dev.txt"
	@$(VENV)/bin/python -m pip install -qq -r requirements-dev.txt
	@touch $@

$(VENV)/.package: $(VENV)/.requirements pyproject.toml setup.py $(NATIVE)
	@echo "== hf_cachegen and its native library"
	@$(call INSTALL_WITH,$(VENV))
	@touch $@

# PyPI's torch for Linux brings CUDA, gigabytes of it: it is taken where the index without is out of reach, since with
# another release than the oldest this would test nothing. What is not a dependency has its pin, but for tokenizers, which
# transformers chooses; pandas and contourpy, whose newest releases take no numpy so old; s3fs, which takes no
# fsspec but its twin (tests against S3 are skipped); and pyparsing, whose later releases warn of the words in which the oldest
# matplotlib asks. The oldest numpy is for Python 3.10 to 3.12.
$(OLDEST)/.requirements: requirements-dev.txt pyproject.toml | $(OLDEST)/.created
	@echo "== $(OLDEST_ALLOWED)"
	@$(OLDEST)/bin/python -m pip install --retries 0 --timeout 15 $(filter torch==%,$(OLDEST_ALLOWED)) \
		--index-url $(or $(TORCH_INDEX),$(CPU_INDEX)) || \
		$(OLDEST)/bin/python -m pip install $(filter torch==%,$(OLDEST_ALLOWED))
	@names=$$(printf '%s|' $(subst _,-,$(OLDEST_ALLOWED)) | sed -E 's/==[0-9.]+//g'); \
		grep -vE "^($${names}tokenizers|contourpy|pandas|s3fs|pyparsing)==" requirements-dev.txt > $(@D)/requirements.txt
	@$(OLDEST)/bin/python -m pip install -qq $(OLDEST_ALLOWED) 'pyparsing<3.3' -r $(@D)/requirements.txt
	@touch $@

$(OLDEST)/.package: $(OLDEST)/.requirements pyproject.toml setup.py $(NATIVE)
	@$(call INSTALL_WITH,$(OLDEST))
	@touch $@

# The environment of `make test` with another Transformers in front: it costs one small download, and torch is the same.
# addsitedir also follows the editable installation there. pip sees what is there and leaves it alone.
$(OLDEST_TRANSFORMERS)/.requirements: pyproject.toml $(VENV)/.package | $(OLDEST_TRANSFORMERS)/.created
	@echo "== $(filter transformers==%,$(OLDEST_ALLOWED)) and what it needs, the rest from $(VENV)"
	@packages() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(packages $(VENV))')" > "$$(packages $(@D))/shared.pth"
	@$(@D)/bin/python -m pip install -qq $(filter transformers==%,$(OLDEST_ALLOWED))
	@touch $@

# The newest torch comes from the index of builds without CUDA. Where that is out of reach, PyPI's newest would bring
# gigabytes of CUDA, so the pin is taken, and the output says which it was.
# Every run resolves again: what is newest changes.
$(NEWEST)/.requirements: FORCE | $(NEWEST)/.created
	@echo "== the newest releases of" $(ALLOWED)
	@$(NEWEST)/bin/python -m pip install -qq --upgrade --retries 0 --timeout 15 $(filter "torch>=%,$(ALLOWED)) \
		--index-url $(or $(TORCH_INDEX),$(CPU_INDEX)) || \
		{ echo "== the newest torch is out of reach without CUDA: $(TORCH), as pinned" >&2; \
		$(NEWEST)/bin/python -m pip install -qq $(TORCH); }
	@$(NEWEST)/bin/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' > $(@D)/torch.txt
	@echo "== $$(cat $(@D)/torch.txt) is the newest torch without CUDA that can be reached"
	@$(NEWEST)/bin/python -m pip install -qq --upgrade --upgrade-strategy eager --constraint $(@D)/torch.txt $(ALLOWED) wheel
	@touch $@

$(NEWEST)/.package: $(NEWEST)/.requirements pyproject.toml setup.py $(NATIVE)
	@$(call INSTALL_WITH,$(NEWEST))
	@touch $@

# mkdocs reads the sources without importing them: no torch here.
$(DOCS)/.requirements: requirements-docs.txt | $(DOCS)/.created
	@$(DOCS)/bin/python -m pip install -qq -r requirements-docs.txt
	@touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.package $(OLDEST)/.package $(NEWEST)/.package
	find hf_cachegen -name '*.so' -delete -o -name '*.dylib' -delete
	find hf_cachegen eval tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(OLDEST) $(OLDEST_TRANSFORMERS) $(NEWEST) $(DOCS) .venv-3.1[0-3]

# Everything here does its own set-up, on Debian 12, as root; the second time it is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the package's build needs (python-prctl: libcap's headers; the provider: OpenSSL's)
# and what the tests drive.
BUILD_PACKAGES := gcc libc6-dev libcap-dev libssl-dev python3-dev python3-venv
TEST_PACKAGES := clang curl libseccomp2 nginx-light openssl procps

.PHONY: demo test lint clean

demo: $(VENV)/built
	$(BIN)/titus-py demo

test: $(VENV)/built $(VENV)/test-packages
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGUMENTS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info keyd/provider/*.so

$(VENV)/build-packages: Makefile
	.ci/apt-install $(BUILD_PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/test-packages: $(VENV)/build-packages
	.ci/apt-install $(TEST_PACKAGES)
	touch $@

$(VENV)/built: $(VENV)/build-packages pyproject.toml setup.py $(wildcard keyd/provider/*.[ch])
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

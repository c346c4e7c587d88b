# Everything here does its own set-up, on Debian 12 or 13, as root; the second time it is quick.

# Debian's own, whose headers are among the packages below. It is optimised, and has within itself
# what others load as thirty libraries: a worker's copy of it is made and taken down faster.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

# What the package's build needs (python-prctl: libcap's headers; the provider: OpenSSL's)
# and what the demo and the tests drive, or have installed.
BUILD_PACKAGES := gcc libc6-dev libcap-dev libssl-dev python3-dev python3-venv
PEER_PACKAGES := nginx-light libnginx-mod-stream haproxy stunnel4 hitch openssl erlang-base erlang-ssl
DEMO_PACKAGES := curl
TEST_PACKAGES := $(DEMO_PACKAGES) clang haproxy iproute2 libnginx-mod-stream libseccomp2 nftables nghttp2-client nginx-light openssl procps prometheus softhsm2 man-db systemd-container \
    python3-cryptography python3-openssl libtpm2-pkcs11-1 libtpm2-pkcs11-tools libtss2-dev swtpm tpm2-tools e2fsprogs apache2-bin postgresql stunnel4 \
    erlang-base erlang-ssl redis-server
LINT_PACKAGES := shellcheck
SCRIPTS := .ci/run .ci/apt-install packaging/deb packaging/install packaging/lock packaging/units \
    $(addprefix packaging/debian/,postinst postrm prerm)

# Where `make install` puts things: the program, below PREFIX, knows where it is.
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
export DESTDIR PREFIX SYSCONFDIR SYSTEMD
# When what is built says that it was built: with the last commit.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
export SOURCE_DATE_EPOCH

VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
REVISION ?= 1
PACKAGED = LICENSE CHANGELOG.md $(wildcard titus_py/*.py titus_py/*/*.py keyd/*.py keyd/*/*.py keyd/*/*.[ch] completion/* docs/man/* \
    docs/*.md examples/* examples/*/* systemd/* systemd/prometheus/* packaging/locked/*) \
    packaging/titus.toml packaging/install packaging/units docs/reference.py
# The release's name and number are in the package's version, and decide before the revision does: an upgrade of
# Debian takes a higher one, whatever the revision was. Debian's testing has no number.
RELEASE := $(shell . /etc/os-release; echo "+$$ID$${VERSION_ID:-testing}")
PACKAGE_VERSION = $(VERSION)$(RELEASE)-$(REVISION)
DEB = build/titus-py_$(PACKAGE_VERSION)_$(shell dpkg --print-architecture).deb

# Whose OpenSSL the package has: the one in cryptography's wheels, or Debian's, with which Debian's
# python3-cryptography goes. Debian 12's is too old.
OPENSSL ?= $(shell . /etc/os-release; test "$$ID" = debian && test "$${VERSION_ID:-13}" -ge 13 && \
    echo debian || echo wheels)

# Nothing is installed whose hash is not in packaging/locked, and nothing is fetched to build with.
PIP_INSTALL = $(BIN)/python -m pip install --quiet
LOCKED_INSTALL = $(PIP_INSTALL) --require-hashes --no-build-isolation --use-pep517 --requirement

.PHONY: demo test bench bench-quick peers lint clean install deb docs lock

demo: $(VENV)/built $(VENV)/demo-packages
	$(BIN)/titus-py demo

# PYTEST_ARGUMENTS=--full: the long ones as often as was once promised. Many tests wait for something
# most of the time: six at a time keep two processors busy. What Python has compiled is kept, whatever
# the environment says: a program that is started a thousand times is compiled once.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/built $(VENV)/test-packages
	$(BIN)/python -m pytest -n 6 --dist worksteal $(PYTEST_ARGUMENTS)

bench: peers $(VENV)/pictures build/load build/floor build/sign build/echo
	$(BIN)/python -m bench $(BENCH_ARGUMENTS)

bench-quick: peers $(VENV)/pictures build/load build/floor build/sign build/echo
	$(BIN)/python -m bench --quick $(BENCH_ARGUMENTS)

lint: $(VENV)/built $(VENV)/lint-packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck $(SCRIPTS)
	shellcheck --shell=bash completion/titus-py.bash

install: $(VENV)/built
	packaging/install $(BIN)/python wheels

# The package is made from what this lays out. REVISION=2 makes a later one from the same. It is the only one that is
# left: of several, `apt install ./build/titus-py_*.deb` would install whichever comes last by its name.
deb: $(DEB)
	find build -maxdepth 1 -name 'titus-py_*.deb' ! -path $(DEB) -delete

$(DEB): build/stage packaging/deb $(wildcard packaging/debian/*)
	packaging/deb $< $(PACKAGE_VERSION) $(OPENSSL) $@

# Whoever chooses the other one gets the other package.
build/openssl-is-$(OPENSSL):
	mkdir -p build
	rm -f build/openssl-is-*
	touch $@

build/stage: $(VENV)/built $(PACKAGED) build/openssl-is-$(OPENSSL)
	rm -rf $@ $@.new
	DESTDIR=$(CURDIR)/$@.new PREFIX=/usr SYSCONFDIR=/etc packaging/install $(BIN)/python $(OPENSSL)
	mv $@.new $@
	touch $@

docs: $(VENV)/docs-packages
	$(BIN)/mkdocs build --strict --quiet

# What was tested is installed: the tests have to pass with what this writes.
lock: $(VENV)/built
	$(LOCKED_INSTALL) packaging/locked/lock.txt
	packaging/lock $(BIN)/uv

clean:
	rm -rf $(VENV) build *.egg-info keyd/*/*.so titus_py/*.so titus_py/*/*.so

# A virtual environment belongs to the Python that it was made with: it is made anew for another one, as after
# an upgrade of Debian. One that is not there, or does not start, is no other one.
MADE_WITH := $(notdir $(wildcard $(VENV)/lib/python3.*))
ifneq ($(MADE_WITH),)
THERE_IS := $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
ifneq ($(and $(THERE_IS),$(filter-out $(THERE_IS),$(MADE_WITH))),)
.PHONY: another-python
another-python:
	rm -rf $(VENV)
$(VENV)/build-packages: another-python
endif
endif

$(VENV)/build-packages: Makefile
	.ci/apt-install $(BUILD_PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/lint-packages: $(VENV)/build-packages
	.ci/apt-install $(LINT_PACKAGES)
	touch $@

$(VENV)/demo-packages: $(VENV)/build-packages
	.ci/apt-install $(DEMO_PACKAGES)
	touch $@

$(VENV)/test-packages: $(VENV)/build-packages
	.ci/apt-install $(TEST_PACKAGES)
	touch $@

# The checkout itself, as a path (compat): otherwise it is found by a module of setuptools', whose
# import is half of what it takes to start a Python, and tests start thousands.
$(VENV)/built: $(VENV)/build-packages pyproject.toml setup.py $(wildcard packaging/locked/*.txt keyd/*/*.[ch] titus_py/*.c titus_py/*/*.[ch])
	$(PIP_INSTALL) --require-hashes --requirement packaging/locked/build.txt
	$(LOCKED_INSTALL) packaging/locked/test.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	# Each Python would load a module of setuptools' as it starts, for programs that import distutils.
	rm -f $(VENV)/lib/python*/site-packages/distutils-precedence.pth
	touch $@

# One that cannot be installed is missing from the results, which then say so.
peers: $(VENV)/built
	for package in $(PEER_PACKAGES); do .ci/apt-install $$package || echo "bench: no $$package" >&2; done

$(VENV)/pictures: $(VENV)/built
	$(LOCKED_INSTALL) packaging/locked/bench.txt
	touch $@

build/%: bench/%.c
	mkdir -p build
	$(CC) -std=c11 -O2 -Wall -Wextra -Werror -o $@ $< -lssl -lcrypto

$(VENV)/docs-packages: $(VENV)/built
	$(LOCKED_INSTALL) packaging/locked/docs.txt
	touch $@

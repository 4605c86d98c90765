# make demo      serve a small trained DeepSeek-V3.2 and ask it over the OpenAI API;  HOST=sglang: by SGLang
# make test      lint, types, unit tests, serving tests on both hosts: what CI runs
# make test-all  the same with every cell of the big matrices
# make vllm, make sglang  only create the environment
# VLLM=0.30.0, SGLANG=0.5.22  choose another release, in an environment of its own
DEFAULT_VLLM := 0.32.0
VLLM ?= $(DEFAULT_VLLM)
VENV ?= .venv/vllm$(if $(filter-out $(DEFAULT_VLLM),$(VLLM)),-$(VLLM))
DEFAULT_SGLANG := 0.5.23
SGLANG ?= $(DEFAULT_SGLANG)
SGLANG_VENV ?= .venv/sglang$(if $(filter-out $(DEFAULT_SGLANG),$(SGLANG)),-$(SGLANG))
# For the tests, which start its servers.
export DSA_TEST_SGLANG ?= $(SGLANG_VENV)
HOST ?= vllm
PYTHON3 ?= python3
# Address of a package index with torch's CPU builds, where the configured ones have none.
TORCH_INDEX ?=

.PHONY: vllm sglang demo test test-all lint unit

vllm:
	@$(PYTHON3) ci/setup_vllm.py --vllm $(VLLM) --venv $(VENV) --torch-index "$(TORCH_INDEX)"

sglang:
	@$(PYTHON3) ci/setup_sglang.py --sglang $(SGLANG) --venv $(SGLANG_VENV) --torch-index "$(TORCH_INDEX)"

# Demo and tests run in vLLM's environment, which has their tools; SGLang is a process of its own.
demo: vllm $(filter sglang,$(HOST))
	@PYTHONPATH=tests $(VENV)/bin/python -m dsa_testbed.demo --host $(HOST)

test: vllm sglang
	@ci/test $(VENV)/bin/python "not matrix"

test-all: vllm sglang
	@ci/test $(VENV)/bin/python ""

unit: vllm
	@TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -q -m "triton and not matrix"
	@$(VENV)/bin/python -m pytest -m "not triton and not serving and not matrix"

lint: vllm sglang
	@ci/lint $(VENV)/bin/python

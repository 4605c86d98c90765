# make demo      serve a DeepSeek-V3.2 checkpoint with `vllm serve` and ask it over the OpenAI API
# make test      lint, types, unit tests, serving tests: what CI runs
# make test-all  the same with every cell of the big matrices
# make vllm      only create the environment;  VLLM=0.30.0 chooses another release of vLLM
DEFAULT_VLLM := 0.32.0
VLLM ?= $(DEFAULT_VLLM)
VENV ?= .venv/vllm$(if $(filter-out $(DEFAULT_VLLM),$(VLLM)),-$(VLLM))
PYTHON3 ?= python3
# Address of a package index with torch's CPU builds, where the configured ones have none.
TORCH_INDEX ?=

.PHONY: vllm demo test test-all lint unit

vllm:
	@$(PYTHON3) ci/setup_vllm.py --vllm $(VLLM) --venv $(VENV) --torch-index "$(TORCH_INDEX)"

demo: vllm
	@PYTHONPATH=tests $(VENV)/bin/python -m dsa_testbed.demo

test: vllm
	@ci/test $(VENV)/bin/python "not matrix"

test-all: vllm
	@ci/test $(VENV)/bin/python ""

unit: vllm
	@TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -q -m "triton and not matrix"
	@$(VENV)/bin/python -m pytest -m "not triton and not serving and not matrix"

lint: vllm
	@ci/lint $(VENV)/bin/python

"""What each layer's indexer chose to read, as a figure and as a page: `dsa explain`.

`selections.py` records it from any DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM of transformers,
a model in training too; `figure.py` and `page.py` show it. Nothing that serves imports this.
"""

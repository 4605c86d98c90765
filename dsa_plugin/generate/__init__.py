"""DSA models without a host, for research and to read: one process, or `torchrun` with several.

model.py      the model, as the paper has it: embedding, layers of DSA and experts, norms, head
config.py     its numbers, of a checkpoint's folder
ranks.py      tensor parallelism: what ranks say to each other
cuts.py       which part of which tensor a rank has
weights.py    a rank's part of the checkpoint, read one tensor at a time
caches.py     paged caches, and the batches that are read and written through them
generator.py  prompts in, tokens out: prefill in chunks, decode together
sampling.py   the next token of each
text.py       text to tokens and back, by the checkpoint's chat template or encoding
deepseek_v32_messages.py  that of DeepSeek-V3.2
prompts.py    files of prompts
"""

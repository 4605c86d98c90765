"""Is a checkpoint whole, and does this machine compute its sparse attention right: `dsa verify`.

headers.py      tensors that are packed, missing, misshapen or without scales; headers alone
settings.py     what config.json contradicts: itself, the registry, what was published
weights.py      one layer's tensors, read one at a time, and what is wrong with their values
inputs.py       hidden states that the layers read
reference.py    indexer, selection and attention in fp64, from the specification
eager.py        the same by the ops' eager forms, whose errors say what may be expected
serving.py      the same as a host calls it: pages, chunks, decodes
compare.py      how far serving is from fp64
naming.py       which known mistake a wrong result equals
recall.py       which RoPE style the indexer's weights were trained with
run.py          all of it, layer by layer

Nothing that serves imports this.
"""

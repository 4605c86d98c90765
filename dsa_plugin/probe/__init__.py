"""A host asked, in a process of its own, what it makes of a command line or of our plugin.

ask.py              a question, its answer, and the process that asks
pretended_torch.py  what torch says of a GPU that this machine lacks
extensions.py       the host's compiled modules, which are not for that GPU
host_kernel.py      one op of the host's own DSA: what it would run, or its refusal
our_kernels.py      what runs each op where the plugin serves
checks.py           what `python -m dsa_plugin.hosts.<host>.probe.check` prints

The host's side is `dsa_plugin/hosts/<host>/probe/`; nothing of either runs while serving.
"""

"""What a host does with DSA on a machine, asked of the host itself: `dsa doctor`.

host_kernel.py   one op of the host's own DSA: what it would run, or its refusal
our_kernels.py   what runs each op where the plugin serves
model_folder.py  a config.json for the host to read
serving.py       both of these for models, GPUs and cache dtypes, and who serves
findings.py      what of this environment, machine or model stands in the way
report.py        all of it, for `dsa doctor`; ci/support_matrix.py makes tables of serving.py
features.py      what becomes of each switch of a host
command_line.py  that, and the host's own word, of a command that serves a model
bundle.py        what a bug report needs, in one file, for `dsa doctor --bundle`:
                 machine.py, checkpoint.py, self_probe.py (the kernels, run once), log_tail.py
redact.py        takes secrets, requests, and names of people and machines out of it
"""

"""Checkpoints in another precision, or cut for ranks.

FP8 in blocks of 128 or unquantised becomes bf16, W8A16 or W4A16; or stays as it is, in a file for
each rank of `dsa generate`.

`source.py` reads what there is, `formats.py` says what becomes of which tensor, `shard.py` writes
one file of it, and `run.py` a folder, which `manifest.py` records and a later run goes on with.
`compare.py` is `--check`, and `model_parallel.py` plans and checks ranks' files.
"""

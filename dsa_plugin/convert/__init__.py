"""Checkpoints in another precision: FP8 in blocks of 128 or unquantised, to bf16, W8A16 or W4A16.

`source.py` reads what there is, `formats.py` says what becomes of which tensor, `shard.py` writes
one file of it, and `run.py` a folder, which `manifest.py` records and a later run goes on with.
`compare.py` is `--check`.
"""

"""Test support: small checkpoints, reference answers, a server runner, mutations, the demo.

Not part of the wheel. pytest finds it through ``pythonpath = ["tests"]``, scripts through
``PYTHONPATH=tests``.
"""

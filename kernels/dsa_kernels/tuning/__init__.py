"""Launch configurations: a module an architecture, in it a table an op, named like it in capitals.

A table's keys are what the op's kernel.py calls its shape key. Each module says where and how its
numbers were found.
"""

"""SGLang asked what it makes of a command line on some machine; nothing here runs while serving.

resolve.py  its parser and its configuration
native.py   what its own DSA would run, or refuses
pretend.py  this machine, taken for one with another GPU
check.py    whether the plugin took
"""

"""A stand-in for torchvision, which SGLang imports although text models never call it.

What: modules in which every name exists, and is an error on use.
Why: srt/configs/nano_nemotron_vl.py and transformers' image utilities import torchvision whatever
the model, and PyPI's builds are for CUDA: beside a CPU torch they fail ("operator torchvision::nms
does not exist").
Remove when: SGLang imports torchvision where it uses it, or PyPI has CPU builds.
"""

from torchvision import io, transforms

__version__ = "0.28.0"
__all__ = ["io", "transforms"]

"""Every other name of it is absent."""

from torchvision.absent import name as __getattr__
from torchvision.transforms.v2 import functional

__all__ = ["__getattr__", "functional"]

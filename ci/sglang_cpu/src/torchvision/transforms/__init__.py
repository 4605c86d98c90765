"""Every other name of it is absent."""

from torchvision.absent import name as __getattr__
from torchvision.transforms import functional, v2

__all__ = ["__getattr__", "functional", "v2"]

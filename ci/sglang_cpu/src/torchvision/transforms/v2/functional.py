"""Every name of it is absent."""

from torchvision.absent import name as __getattr__

__all__ = ["__getattr__"]

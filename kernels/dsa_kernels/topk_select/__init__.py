"""Scores -> the indices of the best, and those -> physical slots."""

from dsa_kernels.topk_select.api import topk_select, topk_select_slots, topk_slots

__all__ = ["topk_select", "topk_select_slots", "topk_slots"]

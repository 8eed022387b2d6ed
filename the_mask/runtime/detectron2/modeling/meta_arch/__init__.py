"""Whole models and semantic segmentation heads, by name."""

from ..._missing import not_provided
from .build import META_ARCH_REGISTRY, build_model
from .semantic_seg import SEM_SEG_HEADS_REGISTRY, build_sem_seg_head

__all__ = ["META_ARCH_REGISTRY", "SEM_SEG_HEADS_REGISTRY", "build_model", "build_sem_seg_head"]

__getattr__ = not_provided(__name__)

"""Catalogs of datasets, and the plain datasets and samplers that loaders are made of."""

from .._missing import not_provided
from .build import trivial_batch_collator, worker_init_reset_seed
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset, ToIterableDataset

__all__ = [
    "DatasetCatalog",
    "DatasetFromList",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "ToIterableDataset",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

__getattr__ = not_provided(__name__)

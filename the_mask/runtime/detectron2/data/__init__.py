"""Catalogs of datasets, and the plain datasets that loaders are made of."""

from .._missing import not_provided
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset, ToIterableDataset

__all__ = [
    "DatasetCatalog",
    "DatasetFromList",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "ToIterableDataset",
]

__getattr__ = not_provided(__name__)

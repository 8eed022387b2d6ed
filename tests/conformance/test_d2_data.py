"""Documented behaviour of detectron2.data: catalogs and plain datasets."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.catalog import Metadata
from detectron2.data.common import ToIterableDataset
from torch.utils.data import DataLoader, IterableDataset, Sampler

NAME = "_conformance_dataset"


@pytest.fixture(autouse=True)
def clean_catalogs() -> Iterator[None]:
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        if NAME in catalog.list():
            catalog.remove(NAME)


def test_dataset_catalog() -> None:
    DatasetCatalog.register(NAME, lambda: [{"id": 1}])
    assert DatasetCatalog.get(NAME) == [{"id": 1}]
    assert NAME in DatasetCatalog.list()
    with pytest.raises(AssertionError, match="already registered"):
        DatasetCatalog.register(NAME, list)
    with pytest.raises(AssertionError):
        DatasetCatalog.register("_conformance_other", [1, 2])
    DatasetCatalog.remove(NAME)
    with pytest.raises(KeyError, match="not registered"):
        DatasetCatalog.get(NAME)


def test_metadata_is_set_once() -> None:
    meta = MetadataCatalog.get(NAME)
    assert MetadataCatalog.get(NAME) is meta
    assert meta.name == NAME
    assert meta.set(stuff_classes=["a", "b"], ignore_label=255) is meta
    assert (meta.stuff_classes, meta.get("ignore_label"), meta.get("other"), meta.get("other", 3)) == (
        ["a", "b"],
        255,
        None,
        3,
    )
    meta.stuff_classes = ["a", "b"]  # the same value again is fine
    with pytest.raises(AssertionError, match="stuff_classes"):
        meta.stuff_classes = ["c"]
    with pytest.raises(AttributeError, match=r"colours.*stuff_classes"):
        meta.colours  # noqa: B018
    assert not hasattr(meta, "colours")
    assert meta.as_dict() == {"name": NAME, "stuff_classes": ["a", "b"], "ignore_label": 255}
    with pytest.raises(AttributeError, match="empty"):
        Metadata(name="x").colours  # noqa: B018


@pytest.mark.parametrize("kwargs", [{}, {"serialize": False}])
def test_dataset_from_list_hands_out_copies(kwargs: dict[str, bool]) -> None:
    items = [{"values": [index]} for index in range(3)]
    dataset = DatasetFromList(items, **kwargs)
    dataset[1]["values"].append(9)
    assert (len(dataset), dataset[1]) == (3, {"values": [1]})


def test_dataset_from_list_without_copy_or_serialisation() -> None:
    items = [{"values": [0]}]
    assert DatasetFromList(items, copy=False, serialize=False)[0] is items[0]


def test_map_dataset_replaces_failed_items() -> None:
    dataset = MapDataset(list(range(10)), lambda x: None if x in (2, 3, 4, 5) else x * 10)
    assert len(dataset) == 10
    assert [dataset[i] for i in (0, 1, 6, 9)] == [0, 10, 60, 90]
    for index in (2, 3, 4, 5):
        assert dataset[index] in {0, 10, 60, 70, 80, 90}
    # The same replacements in every run: the generator is random.Random(42), over the items not yet known to fail.
    fresh = MapDataset(list(range(10)), lambda x: None if x == 2 else x)
    expected = random.Random(42).sample([0, 1, 3, 4, 5, 6, 7, 8, 9], k=1)[0]
    assert fresh[2] == expected


def test_map_dataset_pickles_lambdas() -> None:
    dataset = pickle.loads(pickle.dumps(MapDataset([1, 2], lambda x: x + 1)))
    assert [dataset[0], dataset[1]] == [2, 3]


class Counting(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def test_map_dataset_of_an_iterable_drops_failed_items() -> None:
    mapped = MapDataset(Counting(), lambda x: None if x == 2 else x)
    assert isinstance(mapped, IterableDataset)
    assert list(mapped) == [0, 1, 3, 4, 5]


class InOrder(Sampler):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("kwargs", "workers", "expected"),
    [
        ({}, 0, [0, 1, 2, 3, 4, 5, 6]),
        ({}, 2, [0, 1, 2, 3, 4, 5, 6]),
        ({"shard_chunk_size": 3}, 2, [0, 3, 1, 4, 2, 5, 6]),
        ({"shard_sampler": False}, 2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
    ],
)
def test_to_iterable_dataset_shards_over_workers(kwargs: dict[str, int], workers: int, expected: list[int]) -> None:
    dataset = ToIterableDataset(DatasetFromList(list(range(7))), InOrder(7), **kwargs)
    assert list(DataLoader(dataset, batch_size=None, num_workers=workers)) == expected


def test_worker_init_seeds_all_generators_from_torch() -> None:
    def draws(base: int, worker: int) -> tuple[float, float, float]:
        torch.manual_seed(base)
        worker_init_reset_seed(worker)
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002

    assert draws(11, 3) == draws(11, 3)
    # The documented seed is torch's plus the worker's number.
    assert draws(11, 3) == draws(14, 0)
    assert draws(11, 3) != draws(11, 4)


def test_trivial_batch_collator() -> None:
    batch = [{"a": 1}, {"b": 2}]
    assert trivial_batch_collator(batch) is batch

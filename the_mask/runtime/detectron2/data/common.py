"""Datasets made of a list, a mapping function, or a sampler."""

from __future__ import annotations

import copy as copy_module
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data as torch_data
from torch.utils.data import Sampler

from ..utils.serialize import PicklableWrapper

__all__ = ["DatasetFromList", "MapDataset", "ToIterableDataset"]


class _SerializedList:
    """A list as one tensor of pickles: worker processes share its memory instead of copying Python objects."""

    def __init__(self, items: list[Any]) -> None:
        pickles = [np.frombuffer(pickle.dumps(item, protocol=-1), dtype=np.uint8) for item in items]
        self._ends = torch.from_numpy(np.cumsum([len(p) for p in pickles], dtype=np.int64))
        self._bytes = torch.from_numpy(np.concatenate(pickles))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        start = 0 if idx == 0 else int(self._ends[idx - 1])
        return pickle.loads(self._bytes[start : int(self._ends[idx])].numpy().data)


class DatasetFromList(torch_data.Dataset):
    """A list as a dataset."""

    def __init__(self, lst: list[Any], copy: bool = True, serialize: bool | Callable[[list[Any]], Any] = True) -> None:
        """Wrap ``lst``.

        Args:
            lst: the items.
            copy: return deep copies, so that users may change them; serialised items are always copies.
            serialize: keep the items as pickles in one tensor, or what this callable makes of the list.
        """
        self._copy = copy
        self._serialize = serialize
        if serialize:
            self._lst = serialize(lst) if callable(serialize) else _SerializedList(lst)
        else:
            self._lst = lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        item = self._lst[idx]
        return copy_module.deepcopy(item) if self._copy and not self._serialize else item


class _MapIterableDataset(torch_data.IterableDataset):
    """A function applied to an iterable dataset; ``None`` results are dropped."""

    def __init__(self, dataset: Iterable[Any], map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for item in map(self._map_func, self._dataset):
            if item is not None:
                yield item


class MapDataset(torch_data.Dataset):
    """A function applied to a dataset. Where it returns ``None``, another random item is tried."""

    def __new__(cls, dataset: Any, map_func: Callable[[Any], Any]) -> Any:
        if isinstance(dataset, torch_data.IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, Any]:
        return self._dataset, self._map_func

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._rng = random.Random(42)
        self._fallback_candidates = set(range(len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        tries = 0
        current = int(idx)
        while True:
            item = self._map_func(self._dataset[current])
            if item is not None:
                self._fallback_candidates.add(current)
                return item
            tries += 1
            self._fallback_candidates.discard(current)
            current = self._rng.sample(sorted(self._fallback_candidates), k=1)[0]
            if tries >= 3:
                logging.getLogger(__name__).warning(
                    "Failed to apply `_map_func` for idx: %s, retry count: %s", idx, tries
                )


class ToIterableDataset(torch_data.IterableDataset):
    """The items of a map-style dataset in the order of a sampler, which is shared out among loader workers."""

    def __init__(
        self, dataset: torch_data.Dataset, sampler: Sampler, shard_sampler: bool = True, shard_chunk_size: int = 1
    ) -> None:
        """Combine ``dataset`` and ``sampler``.

        Args:
            dataset: map-style dataset.
            sampler: yields indices.
            shard_sampler: each worker takes its share; otherwise all of them take everything.
            shard_chunk_size: consecutive indices that stay on one worker.
        """
        assert not isinstance(dataset, torch_data.IterableDataset), dataset
        assert isinstance(sampler, Sampler), sampler
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        indices: Iterable[int] = self.sampler
        info = torch_data.get_worker_info() if self.shard_sampler else None
        if info is not None and info.num_workers > 1:
            indices = _every_nth_chunk(indices, info.id, info.num_workers, self.shard_chunk_size)
        for index in indices:
            yield self.dataset[index]


def _every_nth_chunk(indices: Iterable[int], first: int, step: int, size: int) -> Iterator[int]:
    source = iter(indices)
    for number in itertools.count():
        chunk = list(itertools.islice(source, size))
        if not chunk:
            return
        if number % step == first:
            yield from chunk

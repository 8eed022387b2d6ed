"""The order of samples depends on (seed, position) only."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.data.samplers import (
    SampleStream,
    TrainBatchSampler,
    derive_seed,
    epoch_permutation,
    rank_positions,
    sample_seed,
    shard_videos,
)


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_another_permutation():
    stream = SampleStream(7, seed=1)
    epochs = [[stream[p].item for p in range(e * 7, e * 7 + 7)] for e in range(5)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 3
    assert epochs[2] == epoch_permutation(1, 2, 7).tolist()


def test_seeds_differ_between_samples_and_runs():
    seeds = [SampleStream(5, s)[p].seed for s in range(4) for p in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert SampleStream(5, 3)[17].seed == sample_seed(3, 3, 17)
    assert (
        len({derive_seed(9), derive_seed(9, 0), derive_seed(9, 1), derive_seed(9, 1, 0), derive_seed(9, 1, 0, 0)}) == 5
    )


def test_golden_order():
    """A change here changes every training run: note it in the changelog."""
    stream = SampleStream(6, seed=0)
    assert [stream[p].item for p in range(12)] == [5, 3, 0, 1, 2, 4, 4, 3, 2, 0, 1, 5]
    assert stream[0].seed == 7896617691693857887


@settings(max_examples=60)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(0, 20),
)
def test_ranks_accumulation_and_resume_see_one_stream(num_items, world, accum, per_micro, start):
    total = world * accum * per_micro
    iterations = 3
    shards = []
    for rank in range(world):
        sampler = TrainBatchSampler(num_items, total, 5, rank, world, accum, start)
        shards.append(take(sampler, iterations * accum))
    assert all(len(batch) == per_micro for shard in shards for batch in shard)
    stream = SampleStream(num_items, 5)
    for i in range(iterations):
        seen = [key for shard in shards for batch in shard[i * accum : (i + 1) * accum] for key in batch]
        assert seen == [stream[p] for p in range((start + i) * total, (start + i + 1) * total)]


def test_rank_positions_are_contiguous():
    assert list(rank_positions(2, 8, 1, 4)) == [18, 19]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 5, "total_batch": 3, "seed": 0, "world_size": 2}, r"IMS_PER_BATCH 3 .* 2 x 1"),
        ({"num_items": 5, "total_batch": 4, "seed": 0, "accum_steps": 3}, r"IMS_PER_BATCH 4 .* 1 x 3"),
        ({"num_items": 5, "total_batch": 0, "seed": 0}, "IMS_PER_BATCH 0"),
        ({"num_items": 0, "total_batch": 1, "seed": 0}, "at least one item"),
        ({"num_items": 5, "total_batch": 1, "seed": -1}, "seed -1"),
        ({"num_items": 5, "total_batch": 2, "seed": 0, "rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"num_items": 5, "total_batch": 2, "seed": 0, "start_iter": -1}, "start_iter >= 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainBatchSampler(**arguments)


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 6))
def test_videos_are_sharded_whole_and_balanced(lengths, world):
    shards = shard_videos(lengths, world)
    assert len(shards) == world
    assert sorted(v for shard in shards for v in shard) == list(range(len(lengths)))
    assert all(shard == sorted(shard) for shard in shards)
    loads = [sum(lengths[v] for v in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_sharding_on_a_known_case():
    assert shard_videos([5, 9, 4, 4], 2) == [[1, 3], [0, 2]]
    assert shard_videos([3], 2) == [[0], []]

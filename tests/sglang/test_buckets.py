"""Weights in buckets: nothing is lost, they are full, and one is left alone while the next is filled."""

from __future__ import annotations

import itertools

import torch

from dapo.engine.buckets import FIRST, Bucket, buckets
from tests.sglang.test_weight_faults import CPU, make_weights


def test_buckets_hold_every_byte_in_order_within_their_size() -> None:
    weights = make_weights(5)
    for size in (1, 64, 600, 10**6):
        seen = []
        for bucket in buckets(iter(weights), size, CPU):
            assert len(bucket.data) <= size or len(bucket.parts) == 1
            assert [part.start for part in bucket.parts] == [0, *(part.end for part in bucket.parts[:-1])]
            for part in bucket.parts:
                seen.append(
                    (
                        part.name,
                        bucket.data[part.start : part.end].view(part.dtype).reshape(part.shape).clone(),
                    )
                )
        assert [name for name, _ in seen] == [name for name, _ in weights]
        assert all(torch.equal(got, tensor) for (_, got), (_, tensor) in zip(seen, weights, strict=True))


def test_buckets_are_as_full_as_they_can_be_but_for_a_small_first_one() -> None:
    weights = make_weights(5) + make_weights(6)
    for size in (64, 600, 2500):
        made = [
            (len(bucket.data), [(part.dtype, part.end - part.start) for part in bucket.parts])
            for bucket in buckets(iter(weights), size, CPU)
        ]
        for i, ((used, parts), (_, after)) in enumerate(itertools.pairwise(made)):
            limit = size if i else size // FIRST
            dtype, num_bytes = after[0]
            fits = used + num_bytes <= limit and used % dtype.itemsize == 0
            assert not fits or num_bytes > size, (size, i, parts, after)
    assert len(made) == 5, "18 tensors of 6 kB"


def test_a_bucket_is_left_alone_while_the_next_is_filled() -> None:
    weights = [(f"w{i}", torch.full((4,), float(i))) for i in range(9)]
    previous = None
    for i, bucket in enumerate(buckets(iter(weights), 16, CPU)):
        if previous is not None:
            assert previous.data.view(torch.float32).tolist() == [float(i - 1)] * 4
        previous = bucket
    assert i == 8


def test_what_a_server_takes_only_together_is_in_one_bucket_in_any_order() -> None:
    halves = ("q_a_proj", "kv_a_proj_with_mqa")
    names = [f"model.layers.{i}.self_attn.{half}.weight" for i in range(2) for half in halves]
    rows = iter((9, 4, 2, 7))
    pairs = [(name, torch.randn(next(rows), 5)) for name in names]
    between = [(name, tensor[:, :3]) for name, tensor in make_weights(5) if tensor.dim() == 2]

    def sizes(made: list[Bucket]) -> list[int]:
        return [sum(part.name in names for part in bucket.parts) for bucket in made]

    for q0, kv0, q1, kv1 in (pairs, pairs[::-1]):
        weights = [q0, between[0], kv0, between[1], q1, *between[2:], kv1]
        for size in (1, 64, 200, 400):
            made = []
            for bucket in buckets(iter(weights), size, CPU):
                assert len(bucket.data) <= size or len(bucket.parts) in (1, 2)
                made.append(Bucket(bucket.data.clone(), bucket.parts))
            assert sizes(made).count(1) == 0 and sum(sizes(made)) == 4, (size, sizes(made))
            found = {
                part.name: bucket.data[part.start : part.end].view(part.dtype).reshape(part.shape)
                for bucket in made
                for part in bucket.parts
            }
            assert found.keys() == dict(weights).keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in weights)


def test_half_of_what_goes_together_is_sent_too() -> None:
    alone = [("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", torch.ones(3)), ("a", torch.ones(2))]
    [bucket] = buckets(iter(alone), 1000, CPU)
    assert sorted(part.name for part in bucket.parts) == sorted(name for name, _ in alone)

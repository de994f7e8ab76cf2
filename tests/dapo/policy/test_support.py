"""How much of the distribution is likelier than a token, and how much is beyond it, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from dapo_kernels import Head

from dapo.policy.support import mass_above, mass_beyond

T, H, V, VALID = 40, 8, 48, 41


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_bytes", [None, 3 * 4 * V])
def test_masses_are_those_of_sorted_probabilities(temperature: float, chunk_bytes: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, H), torch.randn(V, H)
    targets, mask = torch.randint(VALID, (T,)), torch.rand(T) < 0.8
    head = Head(weight=weight, temperature=temperature, valid_vocab=VALID, chunk_bytes=chunk_bytes)
    above = mass_above(head, hidden, targets, mask)
    beyond = {x: mass_beyond(head, hidden, mask, x) for x in (0.0, 0.5, 0.9)}
    for t in range(T):
        p = (hidden[t] @ weight[:VALID].t() / temperature).double().softmax(0).tolist()
        expected = [sum(q for q in p if q > own) for own in p]
        assert float(above[t]) == pytest.approx(expected[targets[t]] if mask[t] else 0.0, abs=1e-5)
        for x, found in beyond.items():
            outside = sum(own for own, likelier in zip(p, expected, strict=True) if likelier > x)
            assert float(found[t]) == pytest.approx(outside if mask[t] else 0.0, abs=1e-5)

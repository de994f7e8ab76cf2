from typing import get_args

import numpy as np
import pytest

from dapo.config import Objective
from dapo.learn.advantages import ADVANTAGES, group_advantages, set_advantages
from tests.batches import plan
from tests.conftest import make_config, make_group


def test_every_sample_gets_the_advantage_of_its_reward_within_its_group():
    groups = [make_group([1, 0, 0], id=0), make_group([1, 1, 0], id=1)]
    set_advantages(groups)
    for group in groups:
        expected = group_advantages([sample.reward for sample in group.samples])
        assert [sample.advantage for sample in group.samples] == expected.tolist()


def test_the_estimators_are_those_that_the_config_allows():
    assert get_args(Objective.model_fields["advantage"].annotation) == tuple(ADVANTAGES)


def test_the_estimators_by_hand():
    rewards = [[1, -1, -1, -1], [1, -0.5], [1, 1, 1]]
    centred = np.array([1.5, -0.5, -0.5, -0.5, 0.75, -0.75, 0, 0, 0])
    divisors = {
        "group_std": np.repeat([1.0, np.sqrt(2) * 0.75, 1], [4, 2, 3]),
        "no_std": np.ones(9),
        "batch_std": np.full(9, centred.std(ddof=1)),
    }
    for name, divisor in divisors.items():
        found = ADVANTAGES[name](rewards)
        assert [len(a) for a in found] == [4, 2, 3] and {a.dtype for a in found} == {np.dtype(np.float32)}
        assert np.concatenate(found) == pytest.approx(centred / divisor, rel=2e-6), name
        assert not found[2].any(), "equal rewards give zeros, exactly"


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_step_without_groups_or_without_a_difference_has_no_advantages(name):
    set_advantages([], name)
    assert not np.concatenate(ADVANTAGES[name]([[0.1, 0.1, 0.1]])).any()


def test_an_estimator_is_one_function_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "toy", lambda rewards: [np.sign(r) * len(r) for r in rewards])
    group = make_group([1, 0], [5, 3])
    set_advantages([group], "toy")
    [batch] = plan([group], make_config(tmp_path), 1, {})
    [[microbatch]] = batch.minibatches
    assert microbatch.advantages[microbatch.loss_mask].tolist() == [2.0] * 5 + [-2.0] * 3

import numpy as np

from dapo.learn.advantages import ADVANTAGES, group_advantages, set_advantages
from tests.batches import plan
from tests.conftest import make_config, make_group


def test_every_sample_gets_the_advantage_of_its_reward_within_its_group():
    groups = [make_group([1, 0, 0], id=0), make_group([1, 1, 0], id=1)]
    set_advantages(groups)
    for group in groups:
        expected = group_advantages([sample.reward for sample in group.samples])
        assert [sample.advantage for sample in group.samples] == expected.tolist()


def test_an_estimator_is_one_function_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "toy", lambda rewards: np.sign(rewards) * len(rewards))
    group = make_group([1, 0], [5, 3])
    set_advantages([group], "toy")
    [batch] = plan([group], make_config(tmp_path), 1, {})
    [[microbatch]] = batch.minibatches
    assert microbatch.advantages[microbatch.loss_mask].tolist() == [2.0] * 5 + [-2.0] * 3

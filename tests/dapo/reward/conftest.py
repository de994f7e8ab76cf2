import pytest

from dapo.reward.pool import Reward
from tests.conftest import make_config


@pytest.fixture
def reward(tmp_path):
    """`reward("workers=2", …)`: a Reward without length penalty, closed at the end."""
    made = []

    def make(*options, is_interrupted=lambda: False):
        options = ["soft_overlong_punishment=false", *options]
        config = make_config(tmp_path, *[f"reward.{option}" for option in options])
        made.append(Reward(config.reward, 32, tmp_path / "disputes.jsonl", is_interrupted))
        return made[-1]

    yield make
    for each in made:
        each.close()

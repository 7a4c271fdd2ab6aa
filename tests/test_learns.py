"""Learning from nothing to playing well, in a world small enough for a test."""

import pytest

from run_tools import run


@pytest.mark.only("hop_onestep")  # test_tree_search.py has one of the search
def test_self_play_catches_the_stag(script, tmp_path):
    """Four learners in the small stag hunt: 3.0 each is the most, 1.0 is for hares alone."""
    args = script.Args(
        env_id="msh-4x4-4h1s",
        co_players="self",
        total_timesteps=81920,
        plan_samples=8,
        seed=1,
    )
    finished = run(script, args, tmp_path)
    result = script.evaluate(finished.path, "self", episodes=320)
    mean = (result["focal_return"] + 3 * result["co_player_return"]) / 4
    assert mean >= 2.5
    assert finished.metrics["charts/episodic_return"] >= 2.3

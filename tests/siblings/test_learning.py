"""Learning from nothing to playing well, in a world small enough for a test."""

import contextlib
import io

import pytest

OPTIONS = {"env_id": "msh-4x4-4h1s", "co_players": "self", "total_timesteps": 65536, "num_steps": 16, "seed": 1}
PLANNER = {"plan_samples": 8, "model_updates": 16}


@pytest.mark.slow
def test_self_play_catches_the_stag(script, tmp_path):
    """Four learners in the small stag hunt: 3.0 each is the most, 1.0 is for hares alone, 2.2 is plain PPO."""
    with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        metrics = script.train(script.Args(**OPTIONS, **PLANNER))
        result = script.evaluate(metrics["run"], "self", episodes=320)
    assert (result["focal_return"] + 3 * result["co_player_return"]) / 4 >= 2.5
    assert metrics["charts/episodic_return"] >= 2.3

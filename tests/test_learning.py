"""Learning from nothing to playing well, in a world small enough for a test."""

import contextlib
import dataclasses
import io

OPTIONS = {"env_id": "msh-4x4-4h1s", "co_players": "self", "total_timesteps": 81920, "num_steps": 32, "seed": 1}
PLANNER = {"transition": "simulator", "plan_samples": 8, "num_simulations": 8, "num_goal_samples": 2}
MODEL = {"plan_until": 1.0, "plan_samples": 4, "total_timesteps": 49152}  # a planner that has to learn a model first


def test_self_play_catches_the_stag(script, tmp_path):
    """Four learners in the small stag hunt: 3.0 each is the most, 1.0 is for hares alone, 0.9 is plain PPO so early."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    options = OPTIONS | {name: value for name, value in PLANNER.items() if name in names}
    options |= MODEL if "latent_size" in names else {}
    if "q_plan" not in script.Decision._fields:  # without a planner it takes longer
        options["total_timesteps"] *= 2
    with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        metrics = script.train(script.Args(**options))
        result = script.evaluate(metrics["run"], "self", episodes=320)
    assert (result["focal_return"] + 3 * result["co_player_return"]) / 4 >= 2.5
    assert metrics["charts/episodic_return"] >= 2.3

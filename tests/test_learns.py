"""Learning from nothing to playing well, in a world small enough for a test."""

import pytest

from run_tools import parsed, run


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


@pytest.mark.only("hop_onestep")
def test_learns_within_one_match(script, tmp_path):
    """Who has learnt to hunt the stag with a hunter of stags gets little beside a hunter of hares,
    however long the match; with `--init` it takes hares (1.0 each) before the match ends."""
    options = {"env_id": "msh-2x2-2p-3h1s", "horizon": 8, "num_envs": 32, "num_steps": 16}
    args = script.Args(**options, co_players="ns", total_timesteps=6144, hidden_size=32, seed=1)
    path = run(script, args, tmp_path).path
    frozen = script.evaluate(path, "nh", episodes=200, num_envs=2, match_episodes=100)
    returns = []

    def watch(finished, co_players, **others):
        for _, kinds, totals in finished:
            returns.extend(totals[kinds == 0].tolist())
        assert int(co_players.episode) == len(returns)  # it is still the first match

    words = ["--init", path, "--co-players", "nh", "--total-timesteps", 1000]
    run(script, parsed(script, tmp_path, *words), tmp_path, watch)
    late = returns[-(len(returns) // 3) :]
    assert len(returns) > 150
    assert sum(late) / len(late) > frozen["focal_return"] + 0.4

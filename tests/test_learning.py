"""What each method learns in a short run, and plain PPO does not in as many game steps or more."""

import pytest

from conftest import load_script
from run_tools import parsed, run

PLAIN = "--goal none --plan-update none"
SEARCH = "--num-simulations 8 --num-goal-samples 1"
METHODS = {  # script, options: fewer samples than by default
    "plain PPO": ("hop_onestep", f"{PLAIN} --total-timesteps 24576"),
    "one step": ("hop_onestep", "--plan-samples 8 --no-anneal --total-timesteps 16384"),
    "search": ("hop_mcts", f"{SEARCH} --total-timesteps 10240"),
    "discrete goals": ("hop_ppo_gumbel", "--total-timesteps 24576"),
    "latent model": ("latent_world_model", "--total-timesteps 16384"),
}


def trained(monkeypatch, method, words):
    """The script of a method, and the folder of its run with these options."""
    name, own = METHODS[method]
    script = load_script(name)
    if method == "latent model":
        monkeypatch.setattr(script, "MODEL_UPDATES", 8)
        monkeypatch.setattr(script, "MODEL_BATCH", 512)
    return script, run(script, parsed(script, f"{words} --num-envs 16 {own}")).path


@pytest.mark.parametrize("method", METHODS)
def test_two_learners_hunt_the_stag(monkeypatch, method):
    """It pays each 5; the hares, 1 each, keep plain PPO."""
    options = "--env-id msh-3x3-2p-2h1s --co-players self"
    script, path = trained(monkeypatch, method, options)
    result = script.evaluate(path, "self", episodes=320)
    mean = (result["focal_return"] + result["co_player_return"]) / 2
    assert mean < 1.2 if method == "plain PPO" else mean > 4.5


@pytest.mark.parametrize("method", METHODS)
def test_snow_is_left_to_who_clears_it(monkeypatch, method):
    """Of three drifts each pays 6 to both, less 4 to who clears it. Beside one that never does, 6
    is the most; beside one that always does, 18, and plain PPO, without goals, clears as well."""
    options = "--env-id msg-4x4-2p-3d --co-players cleaner,exploiter"
    script, path = trained(monkeypatch, method, options)
    kinds = ("cleaner", "exploiter")
    results = [script.evaluate(path, kind, episodes=160)["focal_return"] for kind in kinds]
    assert results[0] < 14.5 if method == "plain PPO" else results[0] > 15.0
    assert results[1] > 5.0


@pytest.mark.parametrize(
    "name, words, low, high", [("hop_mcts", SEARCH, 1.5, 3.0), ("hop_onestep", PLAIN, 0.0, 0.9)]
)
def test_on_8x8_search_leaves_the_hares_and_plain_ppo_does_not(name, words, low, high):
    """Four learners, of 3.0 each at most; plain PPO gets less than a hare each."""
    script = load_script(name)
    options = "--env-id msh --co-players self --num-envs 16 --total-timesteps 10240 --no-anneal"
    metrics = run(script, parsed(script, f"{options} --plan-until 1 {words}")).metrics
    assert low < metrics["charts/episodic_return"] < high

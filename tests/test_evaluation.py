"""Few-shot evaluation: what `evaluate` plays, counts, returns and prints."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from conftest import HUNT, one_script, plans, small_args
from run_tools import run, trust

OFFSET = {"plan_update": "offset", "plan_until": 1.0, "update_epochs": 1}
FEW = {"episodes": 4, "match_episodes": 2}
PLANNER = {"plan_update": "none", "plan_beta": 0.0}
SEARCH = {"num_simulations": 1, "num_goal_samples": 1, "puct_c": 20.0, "max_depth": 1}
PLAY = {  # other values of the options in PLAYED
    "hop_onestep": {**PLANNER, "plan_samples": 1},
    "hop_mcts": {**PLANNER, **SEARCH},
    "hop_ppo_gumbel": {"assignment": "hard"},
    "latent_world_model": {**PLANNER, "plan_samples": 1, "co_player_model": "ns"},
}


def note_calls(monkeypatch, script):
    """A list: options by which the planner scores, or else goals are assigned, every time."""
    calls = []
    owner, name = (script, "scores") if plans(script) else (script.MOA, "encode")
    function = getattr(owner, name)

    def noted(agent, *inputs):
        calls.append(dataclasses.asdict(agent.args))
        return function(agent, *inputs)

    monkeypatch.setattr(owner, name, noted)
    return calls


@one_script
@pytest.mark.parametrize("num_envs", [1, 3, 64])
@pytest.mark.parametrize("episodes", [2, 7, 12])
def test_every_episode_counts_once_and_in_order(script, done, monkeypatch, num_envs, episodes):
    """Each game plays match after match, of three episodes, every `num_envs`-th; what is played
    beyond the episodes that were asked for does not count."""
    games = min(num_envs, math.ceil(episodes / 3))
    played = torch.zeros(games)
    seats = {}  # of the focal player, by episode

    class Numbered(script.GridGame):
        """An episode's return is 100 times the number of the game, its number in that, and 0.1 for
        each seat before; half is paid in the first step, half in the last, also to who has left."""

        def step(self, state, actions):
            begins = state.time == 0
            state, _, terminated, truncated = super().step(state, actions)
            ended = (terminated | truncated).all(1)
            total = (100 * torch.arange(games) + played)[:, None] + torch.arange(3) / 10
            played.add_(ended)
            return state, (0.5 * begins + 0.5 * ended)[:, None] * total, terminated, truncated

    def watch(number, players, **others):
        seats.update(zip(number.tolist(), players.focal.tolist()))

    monkeypatch.setattr(script, "GridGame", Numbered)
    options = {"episodes": episodes, "num_envs": num_envs, "match_episodes": 3}
    result = script.evaluate(done, "nh,random", **options, watch=watch)
    assert played.min() <= 3 * math.ceil(episodes / 3 / games)  # and no more is played
    focal, company = [], []
    for number in range(episodes):
        rounds, game = divmod(number // 3, games)
        plain = 100 * game + 3 * rounds + number % 3
        focal.append(plain + 0.1 * seats[number])
        company.append(plain + 0.05 * (3 - seats[number]))  # the mean of the other two seats
    by_episode = [focal[k::3] for k in range(min(3, episodes))]
    assert result == {
        "focal_returns": pytest.approx(focal),
        "focal_return": pytest.approx(sum(focal) / episodes),
        "co_player_return": pytest.approx(sum(company) / episodes),
        "by_episode": pytest.approx([sum(part) / len(part) for part in by_episode]),
    }


def test_seed_determines_it_and_the_callers_random_state_is_left_alone(script, done):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    options = {"episodes": 20, "match_episodes": 2}
    first = script.evaluate(done, "random", **options, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert script.evaluate(done, "random", **options) == first
    assert script.evaluate(done, "random", **options, seed=2) != first


@one_script
def test_forms_of_co_players(script, done, monkeypatch):
    """One for all of them, or N-1; names, callables and checkpoints, also by a relative path."""

    def nh(observation, action_mask, clock, generator):  # only in name
        return torch.full((len(observation),), 4)

    monkeypatch.chdir(done.parent)
    groups = [
        ["nh", "nh,nh", ["nh"], ("nh", "nh")],
        ["ns,nh", ["ns", "nh"]],
        [str(done), f"{done},{done}", done.name, [done / "checkpoint.pt"] * 2],
        [nh, [nh], [nh, nh]],
    ]
    results = []
    for forms in groups:
        played = [script.evaluate(done, form, episodes=20) for form in forms]
        assert all(result == played[0] for result in played), forms
        results.append(played[0]["co_player_return"])
    assert len(set(results)) >= 3 and results[3] != results[0]
    for wrong in (["nh"] * 3, "nh,nh,nh", [], ["nh", 3], "nobody", "", [nh, "cleaner"]):
        with pytest.raises(script.UsageError):
            script.evaluate(done, wrong, episodes=2)


def test_run_of_another_script_is_played_by_that(script, sibling, done, monkeypatch):
    """Its planner, or its assignment of goals, included."""
    args = small_args(sibling, env_id=HUNT, co_players="self,nh", **OFFSET)
    foreign = run(sibling, args, trust).path
    player = script.load_player(foreign, script.GridGame(HUNT), 2)
    assert type(player) is sibling.Player is not script.Player
    calls = note_calls(monkeypatch, sibling)
    assert len(script.evaluate(done, foreign, **FEW)["focal_returns"]) == 4
    names = {field.name for field in dataclasses.fields(sibling.Args)}
    assert calls and all(set(options) == names for options in calls)


def test_other_games_of_the_family(script, done):
    """No network depends on the size of the world or on the numbers of players and items."""
    for env_id, players in {"msh-5x2-2p-3h2s": 2, "msh-4x4-5p-1h2s": 5}.items():
        best = script.GridGame(env_id).best_return * players
        for co_players in (["nh"] * (players - 1), "self"):
            returns = script.evaluate(done, co_players, env_id=env_id, **FEW)["focal_returns"]
            assert len(returns) == 4 and all(0.0 <= value <= best for value in returns)
    with pytest.raises(script.UsageError):
        script.evaluate(done, "cleaner", env_id="msg-3x3-3p-2d")


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_planner_is_on_as_asked(script, small, done, command, monkeypatch):
    """One that steps the game itself also on top of a run without one, and trusted in full."""
    plain = run(script, small(env_id=HUNT, **{**OFFSET, "plan_until": 0.0})).path
    calls = note_calls(monkeypatch, script)
    script.evaluate(done, "nh", **FEW)
    assert {options["plan_update"] for options in calls} == {"offset"}
    calls.clear()
    script.evaluate(done, "nh", **FEW, plan_update="none")
    without = script.evaluate(plain, "nh", **FEW)
    assert not calls
    script.evaluate(done, "nh", **FEW, plan_update="hop", plan_beta=3.0)
    assert {(options["plan_update"], options["plan_beta"]) for options in calls} == {("hop", 3.0)}
    options = {**FEW, "plan_update": "offset", "plan_beta": 100.0}
    if script.SCRIPT == "hop_mcts":
        assert script.evaluate(plain, "nh", **options) != without
        player = script.load_player(plain, script.GridGame(HUNT), 2, plan_update="offset")
        assert float(player.agent.plan_slope) == 1.0
        calls.clear()
        words = ["--evaluate", plain, "--co-players", "nh", "--eval-episodes", 2]
        assert command(*words)[0] == 0 and not calls
        assert command(*words, "--plan-update", "hop")[0] == 0 and calls
    else:
        with pytest.raises(script.UsageError, match="has not learnt"):  # it was never trained
            script.evaluate(plain, "nh", **options)


def test_every_option_of_play_changes_what_is_played(script, done, tmp_path):
    options = {"episodes": 40, "match_episodes": 4}
    options |= {"plan_update": "hop"} if plans(script) else {}
    if script.SCRIPT == "hop_mcts":
        options["num_simulations"] = 16  # after 4 puct_c decides little
    content = script.load_checkpoint(done)
    content["agent"]["actor.out.weight"] *= 100.0  # the first policies hardly depend on goals
    torch.save(content, tmp_path / "checkpoint.pt")
    first = script.evaluate(tmp_path, "nh", **options)
    assert set(PLAY[script.SCRIPT]) == set(script.PLAYED)
    for name, value in PLAY[script.SCRIPT].items():
        assert script.evaluate(tmp_path, "nh", **{**options, name: value}) != first, name
    for name in [*PLAY[script.SCRIPT], "episodes", "num_envs", "match_episodes", "no_such_option"]:
        with pytest.raises(script.UsageError):
            script.evaluate(done, "nh", **{**options, name: -1})


@one_script
def test_evaluation_on_the_command_line(script, done, command):
    """Prints what `evaluate` returns, with a 95 % interval over matches, and writes nothing."""
    words = f"--evaluate {done} --co-players nh,ns --match-episodes 3 --seed 4 --num-envs 2".split()
    status, out, _ = command(*words, "--eval-episodes", 9)
    assert status == 0
    options = {"episodes": 9, "num_envs": 2, "match_episodes": 3, "seed": 4}
    result = script.evaluate(done, "nh,ns", **options)
    focal, others, by_episode = out.splitlines()
    matches = torch.tensor(result["focal_returns"]).double().view(3, 3).mean(1)
    assert f"{result['focal_return']:.3f} +- {1.96 * matches.std() / math.sqrt(3):.3f}" in focal
    assert "9 episodes" in focal
    assert f"{result['co_player_return']:.3f}" in others and "nh,ns" in others
    figures = by_episode.split("[")[1].rstrip("]").split()
    assert [float(figure) for figure in figures] == pytest.approx(result["by_episode"], abs=0.0051)
    assert not list(Path().iterdir()) and not (done / "episode.gif").exists()
    status, out, error = command(*words, "--eval-episodes", 3)
    assert status == 0 and "+- inf" in out and "Warning" not in error  # of one match

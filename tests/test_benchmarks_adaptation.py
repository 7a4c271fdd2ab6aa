"""The parts of benchmarks/adaptation.py that its figures rest on."""

import importlib
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def adaptation():
    load_script("hop_onestep")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("adaptation")
    sys.path.remove(str(ROOT / "benchmarks"))


def test_only_episodes_that_end_in_the_last_steps_count(adaptation):
    rewards = np.array([[1, 2, 4, 8, 16, 32, 64, 128], [5, 0, 0, 0, 0, 0, 7, 9]], float).T
    last = np.array([[0, 0, 1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1]], bool).T
    episodes = adaptation.episodes_of(rewards, last)
    assert [e.tolist() for e, _ in episodes] == [[3, 5, 7], [1, 8]]
    assert [values.tolist() for _, values in episodes] == [
        [7, 24, 96],
        [5, 16],
    ]  # the 128 is of no ended episode
    assert (
        adaptation.mean_ending(episodes, 4, 8) == (24 + 96 + 16) / 3
    )  # whole returns, pooled over matches
    assert (
        adaptation.mean_ending(episodes, 5, 8) == (96 + 16) / 2
    )  # an end at step 5 is not after step 5
    assert adaptation.mean_ending(episodes, 0, 3) == (7 + 5) / 2


def test_kinds_of_the_mixture_are_seen_and_all_others_are_not(adaptation):
    script = load_script("hop_onestep")
    game = script.GridGame("msh-4x4-4h1s")
    mixture = script.checked(script.Args(), game).co_players  # as a checkpoint has it
    assert all(adaptation.is_seen(kind, mixture) for kind in adaptation.SCRIPTED["msh"])
    assert not any(adaptation.is_seen(f"frozen {name}", mixture) for name in adaptation.FROZEN)
    assert not any(adaptation.is_seen(kind, "self") for kind in adaptation.SCRIPTED["msh"])
    assert adaptation.is_seen("ns", "self,ns") and not adaptation.is_seen("ns", "self,ns-noisy")


def test_each_match_has_three_of_one_kind(adaptation):
    script = load_script("hop_onestep")
    players = adaptation.company(
        script.GridGame("msh-4x4-4h1s"), ["ns", "nh-noisy"], 5, 50, torch.Generator()
    )
    names = [sorted(players.names[k] for k in row) for row in players.kind.tolist()]
    assert names == [["ns", "ns", "ns", "self"]] * 5 + [["nh-noisy"] * 3 + ["self"]] * 5
    assert players.kind.gather(1, players.focal.unsqueeze(1)).eq(0).all()


@pytest.fixture
def path(adaptation, tmp_path):
    """The checkpoint of a player to whom history matters, which plays without a planner."""
    script = load_script("hop_onestep")
    game = script.GridGame("msh-4x4-4h1s")
    torch.manual_seed(1)
    args = script.checked(script.Args(plan_update="none"), game)
    agent = script.Agent(game, args)
    for module in agent.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
    content = {"script": "hop_onestep", "args": vars(args), "agent": agent.state_dict()}
    content["played"] = {"plan_update": "none"}
    adaptation.runs.save(content, tmp_path / "player.pt")
    return tmp_path / "player.pt"


def test_a_long_match_is_played_as_evaluation_plays_it(adaptation, path):
    """Twenty episodes of one match, drawn from the same random numbers: history is carried on."""
    script = load_script("hop_onestep")
    game, generator = script.GridGame("msh-4x4-4h1s"), torch.Generator().manual_seed(3)
    expected = script.evaluate(path, "ns", episodes=20, num_envs=1, match_episodes=20, seed=3)[
        "focal_returns"
    ]
    players = script.CoPlayers(game, ["ns"] * 3, 1, 1000, generator, fixed=True)
    player = script.load_player(path, game, 1)
    rewards, last = adaptation.long_match(game, player, [players], 20 * 35, generator)
    ((_, returns),) = adaptation.episodes_of(rewards, last)
    assert returns[:20].tolist() == expected and len(set(expected)) > 1
    assert (players.episode >= 20).all()


def test_companies_side_by_side_keep_their_own_games(adaptation, path):
    """Hare hunters, in the second half of the games, end them sooner than random players do."""
    script = load_script("hop_onestep")
    game, generator = script.GridGame("msh-4x4-4h1s"), torch.Generator().manual_seed(1)
    companies = [adaptation.company(game, [kind], 16, 200, generator) for kind in ("random", "nh")]
    _, last = adaptation.long_match(
        game, script.load_player(path, game, 32), companies, 200, generator
    )
    assert last.shape == (200, 32)
    assert last[:, 16:].sum() > 1.3 * last[:, :16].sum()


def test_figures_of_a_trained_player_and_of_its_policy_alone(
    adaptation, path, tmp_path, monkeypatch
):
    """By kind, for scripted players and a frozen one."""
    monkeypatch.setattr(adaptation, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    frozen = adaptation.policy_alone("player.pt")
    kinds = {"ns": "ns", "frozen one step": frozen, "random": "random"}
    job = {"game": "msh-4x4-4h1s", "games": 3, "steps": 400, "last": 200, "seed": 1}
    found = adaptation.adapted("player.pt", kinds, job)
    assert list(found["late"]) == list(kinds)
    assert all(0.0 <= value <= 6.0 for value in found["late"].values())
    assert all(len(parts) == adaptation.WINDOWS for parts in found["by_time"].values())


def test_a_policy_that_never_had_a_planner_is_kept_and_played(adaptation, tmp_path, monkeypatch):
    script, other = load_script("hop_onestep"), load_script("hop_ppo_gumbel")
    game = other.GridGame("msh-4x4-4h1s")
    args = other.checked(other.Args(), game)
    content = {
        "script": "hop_ppo_gumbel",
        "args": vars(args),
        "agent": other.Agent(game, args).state_dict(),
    }
    adaptation.runs.save({**content, "played": {}}, tmp_path / "player.pt")
    monkeypatch.setattr(adaptation, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    kept = adaptation.policy_alone("player.pt")
    assert isinstance(script.load_player(kept, script.GridGame("msh-4x4-4h1s"), 2), other.Player)

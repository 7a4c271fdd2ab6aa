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
    assert [values.tolist() for _, values in episodes] == [[7, 24, 96], [5, 16]]  # the 128 is of no ended episode
    assert adaptation.mean_ending(episodes, 4, 8) == (24 + 96 + 16) / 3  # whole returns, pooled over matches
    assert adaptation.mean_ending(episodes, 5, 8) == (96 + 16) / 2  # an end at step 5 is not after step 5
    assert adaptation.mean_ending(episodes, 0, 3) == (7 + 5) / 2


def test_kinds_of_the_mixture_are_seen_and_all_others_are_not(adaptation):
    script = load_script("hop_onestep")
    mixture = script.resolved(script.Args()).co_players  # as a checkpoint has it
    assert all(adaptation.is_seen(kind, mixture) for kind in adaptation.SCRIPTED["msh"])
    assert not any(adaptation.is_seen(f"frozen {name}", mixture) for name in adaptation.FROZEN)
    assert not any(adaptation.is_seen(kind, "self") for kind in adaptation.SCRIPTED["msh"])
    assert adaptation.is_seen("ns", "self,ns") and not adaptation.is_seen("ns", "self,ns-noisy")


def test_each_match_has_three_of_one_kind(adaptation):
    script = load_script("hop_onestep")
    players = adaptation.company(script.GridGame("msh-4x4-4h1s"), ["ns", "nh-noisy"], 5, 50, torch.Generator())
    names = [sorted(players.names[k] for k in row) for row in players.kind.tolist()]
    assert names == [["ns", "ns", "ns", "self"]] * 5 + [["nh-noisy"] * 3 + ["self"]] * 5
    assert players.kind.gather(1, players.seat[:, :1]).eq(0).all()


def test_a_long_match_is_played_as_evaluation_plays_it(adaptation):
    """Three episodes of one match, drawn from the same random numbers: history is carried on in both."""
    script = load_script("hop_onestep")
    torch.manual_seed(1)
    agent = script.Agent(script.GridGame("msh-4x4-4h1s"), script.resolved(script.Args(plan_update="none")))
    for module in agent.modules():
        if isinstance(module, torch.nn.Linear):  # what was inferred is to matter
            torch.nn.init.normal_(module.weight, std=0.3)
    generator = torch.Generator().manual_seed(3)
    players = adaptation.company(agent.game, ["ns"], 1, 2, generator)  # a match of three episodes
    seat = int(players.seat[0, 0])
    expected = script.play_matches(agent, players, generator)[0, :, seat]
    generator = torch.Generator().manual_seed(3)
    players = adaptation.company(agent.game, ["ns"], 1, 110, generator)
    rewards, last = adaptation.long_match(agent, [players], 110, generator)
    ((_, returns),) = adaptation.episodes_of(rewards, last)
    assert returns[:3].tolist() == expected.tolist()
    assert (players.episode >= 3).all() and rewards.any()


def test_companies_side_by_side_keep_their_own_games(adaptation):
    """Hare hunters, in the second half of the games, end them sooner than random players do."""
    script = load_script("hop_onestep")
    torch.manual_seed(1)
    agent = script.Agent(script.GridGame("msh-4x4-4h1s"), script.resolved(script.Args(plan_update="none")))
    generator = torch.Generator().manual_seed(1)
    companies = [adaptation.company(agent.game, [kind], 16, 200, generator) for kind in ("random", "nh")]
    _, last = adaptation.long_match(agent, companies, 200, generator)
    assert last.shape == (200, 32)
    assert last[:, 16:].sum() > 1.3 * last[:, :16].sum()

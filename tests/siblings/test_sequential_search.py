"""The batched search against one tree, one node, one call at a time (benchmarks/sequential_search.py)."""

import importlib
import itertools
import sys

import pytest
import torch

from siblings.conftest import ROOT
from siblings.test_planner import decisions, joint_actions, situations

GAMES = ["msh-3x3-3p-2h1s", "msh-4x4-4h1s", "msg-3x3-4p-3d"]


@pytest.fixture
def search(script):
    """The module of the sequential search."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        module = importlib.import_module("sequential_search")
    finally:
        sys.path.pop(0)
    assert module.script is script
    return module


@pytest.mark.parametrize("env_id", [*GAMES, "msg", "msh-3x3-2p-1h2s", "msh-2x2-1p-1h1s"])
def test_plain_game_has_the_rules_of_the_grid_game(script, search, env_id):
    game, state = situations(script, env_id)
    state = state._replace(players=state.players.clone())
    state.players[::7, 0] = -1
    generator, likely = torch.Generator().manual_seed(3), joint_actions(script, game, state, 1)[:, 0]
    anything = torch.randint(game.num_actions, likely.shape, generator=generator)  # illegal actions too
    plain, mask = search.PlainGame(game), game.action_mask(state)
    for actions in (likely, anything):
        after, reward, terminated, truncated = game.step(state, actions)
        assert reward.any() and (terminated | truncated).any()
        for b in range(len(state.time)):
            position = plain.position(state.rows(slice(b, b + 1)))
            assert plain.mask(position) == mask[b].tolist()
            then, rewards, over, cut = plain.step(position, actions[b].tolist())
            assert then == plain.position(after.rows(slice(b, b + 1)))
            assert rewards == pytest.approx(reward[b].tolist(), abs=1e-5)
            assert (over, cut) == (bool(terminated[b]), bool(truncated[b]))


SETTINGS = {
    "plain": {},
    "noise at the root": {},
    "discount": {"gamma": 0.6},
    "shallow": {"max_depth": 2},
    "no goals": {"goal": "none"},
    "true goals": {"goal": "oracle"},
    "goals inferred again": {"goal_refresh": 2},
    "prosocial": {"prosocial": 0.4},
    "uniform co-players": {"co_player_model": "uniform"},
    "prior matters little": {"puct_c": 0.1},
    "prior decides": {"puct_c": 20.0},
}


def inputs(script, agent, state, seed=0):
    """The arguments of Agent.plan before the generator, at `state`; with any memories and goals."""
    generator, mask = torch.Generator().manual_seed(seed), agent.game.action_mask(state)
    memory = script.Memory(*(torch.rand(x.shape, generator=generator) for x in agent.moa.initial_memory(len(mask))))
    oracle = None
    if agent.args.goal == "oracle":
        oracle = torch.randn(*mask.shape[:2], agent.moa.goal_size, generator=generator)
    with torch.no_grad():
        own, others = agent.relative(state)
        goals = agent.infer(memory, own, others, oracle)
        joined, total = agent.with_goals(others, goals[0])
        prior = script.masked(agent.actor(own, joined, total), mask).log_softmax(-1)
        value = agent.critic(own, joined, total).squeeze(-1)
    seats = torch.zeros_like(value, dtype=torch.bool)
    seats[decisions(agent.game, state)] = True
    return state, mask, memory, seats, goals, prior, value


CASES = [(GAMES[0], setting) for setting in SETTINGS]
CASES += itertools.product([*GAMES[1:], "msh-3x3-1p-3h1s"], ["plain", "noise at the root"])


@pytest.mark.parametrize("env_id, setting", CASES)
def test_both_searches_make_the_same_visits(script, search, lively, env_id, setting):
    options = {"num_simulations": 24, "num_goal_samples": 2, "puct_c": 1.25, **SETTINGS[setting]}
    agent = lively(env_id=env_id, **options).train(setting == "noise at the root")
    game, state = situations(script, env_id, batch=6, steps=4)
    assert (state.players < 0).any() or game.family == "msg" or game.num_players == 1
    given = inputs(script, agent, state)
    q, visits = agent.plan(*given, torch.Generator().manual_seed(5))
    expected_q, expected = search.plan(agent, *given, torch.Generator().manual_seed(5))
    seats = given[3]
    same = (visits == expected).all(-1)
    assert (expected[seats].sum(-1) == 2 * options["num_simulations"]).all()
    close = torch.isclose(q, expected_q, rtol=1e-4, atol=1e-5).all(-1)
    # the batched search rounds to float32 and sums in another order: what is equal but for that may fall the other way,
    # in no more than a hundredth of the trees, of which each decision has two
    assert (same & close)[seats].float().mean() >= 0.98
    assert not visits[~seats].any() and not q[~seats].any()
    if game.num_players == 1:
        return
    other_q, _ = agent.plan(*given, torch.Generator().manual_seed(6))
    assert (other_q[seats] - q[seats]).abs().max() > 1e-3  # the random numbers decide what is found

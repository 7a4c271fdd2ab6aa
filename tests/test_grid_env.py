"""The grid games, and other games of the benchmarks, as PettingZoo environments."""

import json
import warnings

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test
from pettingzoo.utils.conversions import parallel_to_aec

from benchmarks.biased_rps import Biased
from benchmarks.foraging import parallel_env as foraging_env
from benchmarks.grid_env import parallel_env
from run_tools import generator_of

pytestmark = pytest.mark.only("hop_onestep")

STAY = 4
PREY = [5, 3, 15, 12, 10]  # cells of a stag and four hares in a 4 x 4 world


def scene(players, items=PREY, time=0):
    """An environment in the middle of a game, its agents those that have not left."""
    env = parallel_env("msh-4x4-4h1s", "rgb_array")
    env.reset(seed=0)
    env.game_state = type(env.game_state)(*map(torch.tensor, ([players], [items], [time], [0])))
    pairs = zip(env.possible_agents, players, strict=True)
    env.agents = [agent for agent, cell in pairs if cell >= 0]
    return env


def stay(env):
    return dict.fromkeys(env.agents, STAY)


@pytest.mark.parametrize("env_id", ["msh-3x3-4h1s", "msh-2x4-2p-1h1s", "msg-2x3-3p-3d"])
def test_the_published_tests_of_environments(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_api_test(parallel_env(env_id), num_cycles=200)
    parallel_seed_test(lambda: parallel_env(env_id))
    with warnings.catch_warnings(action="ignore"):
        api_test(parallel_to_aec(parallel_env(env_id)), num_cycles=200)


def test_what_is_refused():
    """A refused step is no step."""
    for words in (["garbage"], ["msg-2x2-5d"], ["msh", "human"]):
        with pytest.raises(ValueError, match=words[-1]):
            parallel_env(*words)
    env = parallel_env("msh-4x4-4h1s", "rgb_array")
    for call in (env.render, env.state, lambda: env.step({})):
        with pytest.raises(ResetNeeded, match="call reset first"):
            call()
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=-1)
    observations, infos = env.reset(seed=np.int64(0))
    before = env.state()
    for array in (*observations["player_0"].values(), infos["player_0"]["clock"], env.state()):
        array[:] = 7  # what is given out is a copy
    for action in (-1, 7, 2.5, "up", None):
        with pytest.raises(ValueError, match="player_2"):
            env.step({**stay(env), "player_2": action})
    with pytest.raises(ValueError, match="player_3"):
        env.step(dict.fromkeys(env.agents[:3], STAY))
    assert np.array_equal(env.state(), before)
    _, _, _, _, infos = env.step(stay(env))
    assert infos["player_0"]["clock"].tolist() == [1, 34]
    env = scene([0, -1, -1, -1], time=34)
    env.step({"player_0": STAY, "player_1": 99})  # who has left is not looked at
    assert env.agents == [] and env.step({"player_0": 99}) == ({}, {}, {}, {}, {})


@pytest.mark.parametrize("env_id", ["msh-4h1s", "msg-2x3-3p-3d"])
def test_seeds(script, env_id):
    """Those of the game, of 64 bits; without one a new start, not by the global generator."""
    env = parallel_env(env_id)
    game = script.GridGame(env_id)
    for seed in (0, 7, 2**40):
        generator = generator_of(seed)
        env.reset(seed=seed)
        for _ in range(2):  # the generator goes on
            assert all(map(torch.equal, env.game_state, game.start(1, generator)))
            env.reset()
    starts = []
    for _ in range(4):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        env = parallel_env(env_id)
        env.reset()
        starts.append(str(env.game_state))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(set(starts)) == 4


def test_a_frame_shows_players_items_and_time():
    changes = [{}, {"time": 4}, {"items": [3, 5, 15, 12, 10]}, {"items": [5, 3, 15, 12, -1]}]
    changes += [{"players": [0, 1, 2, 7]}, {"players": [1, 0, 2, 3]}, {"players": [0, 1, 2, -1]}]
    frames = []
    for change in changes:
        frames.append(scene(**{"players": [0, 1, 2, 3], **change}).render())
        assert frames[-1].dtype == np.uint8 and frames[-1].shape == frames[0].shape
    assert len({frame.tobytes() for frame in frames}) == len(changes)


def test_beliefs_are_on_the_picture():
    """Lines as wide as they are likely, from the players that are there."""
    env = scene([0, 3, 12, -1], [5, 10, 15, 1, -1])
    plain = env.game.draw(env.game_state, "title", [])
    for seat, item, shows in ((0, 1, True), (2, 3, True), (3, 1, False)):
        pictures = [plain]
        for belief in (0.5, 1.0):
            beliefs = [[0.0] * 5 for _ in range(4)]
            beliefs[seat][item] = belief
            pictures.append(env.game.draw(env.game_state, "title", beliefs))
        assert len({picture.tobytes() for picture in pictures}) == (3 if shows else 1)


def first_state(game, planes):
    """Fields of the grid state at time 0 that float [B, N, C * H * W] `planes` show."""
    planes = planes[:, 0].unflatten(1, (-1, game.num_cells))  # seat 0 sees players in seat order
    players = planes[:, : game.num_players].argmax(2)
    items = []
    for k, count in enumerate(game.item_counts, game.num_players):
        items.append(planes[:, k].nonzero()[:, 1].view(-1, count))
    zeros = torch.zeros(len(planes), dtype=torch.int64)
    return [players, torch.cat(items, 1), zeros, zeros]


@pytest.mark.parametrize("env_id, horizon", [("msh-3x3-4h1s", 6), ("msg-2x3-3p-3d", 9)])
def test_the_environment_plays_the_game_of_the_script(script, env_id, horizon):
    """Same starts and actions: same observations, rewards, ends, masks and clocks, by player."""
    kwargs = json.dumps({"env_id": env_id, "max_cycles": horizon})
    args = script.Args(env_id="benchmarks.grid_env:parallel_env", env_kwargs=kwargs)
    copies = script.PettingZooGame(args)
    game = script.GridGame(env_id, horizon=horizon)
    assert (copies.num_players, copies.num_actions) == (game.num_players, game.num_actions)
    generator = generator_of(0)
    copied = copies.start(6, generator)
    state = script.GridState(*first_state(game, copies.observe(copied)[..., game.num_actions :]))
    events = []
    for _ in range(120):
        alive = game.alive(state)
        mask = game.action_mask(state)
        assert torch.equal(copies.alive(copied), alive)
        assert torch.equal(copies.action_mask(copied)[alive], mask[alive])
        seen = copies.observe(copied)[..., game.num_actions :]  # behind the mask
        assert torch.equal(seen[alive], game.observe(state).flatten(2)[alive])
        assert torch.equal(copies.clock(copied)[:, 0], game.clock(state)[:, 0])
        weights = mask + 0.1  # a few illegal ones
        weights[..., 5:] += 2.0 * mask[..., 5:]
        actions = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(6, -1)
        state, *expected = game.step(state, actions)
        copied, *results = copies.step(copied, actions)
        assert all(map(torch.equal, results, expected))
        _, terminated, truncated = results
        ended = (terminated | truncated).all(1)
        events.append(torch.stack([terminated.all(1), truncated.any(1), ~alive.all(1)]).any(1))
        if ended.any():
            copied = copies.restart(copied, ended, generator)
            fresh = first_state(game, copies.observe(copied)[ended][..., game.num_actions :])
            for field, value in zip(state, fresh, strict=True):
                field[ended] = value
    assert torch.stack(events).any(0).tolist() == [True, True, env_id.startswith("msh")]


def test_foraging(script):
    """Terminated when all food is loaded, truncated after 50 steps; the script plays it."""
    env = foraging_env("Foraging-5x5-2p-1f-v3")
    parallel_seed_test(lambda: foraging_env("Foraging-5x5-2p-1f-v3"))
    rng = np.random.default_rng(0)
    ends = set()
    for seed in range(30):
        env.reset(seed=seed)
        rewards = []
        while env.agents:
            actions = {agent: int(rng.integers(6)) for agent in env.agents}
            _, reward, terminations, truncations, _ = env.step(actions)
            rewards += reward.values()
        loaded = sum(rewards) == pytest.approx(1.0)
        ends.add((loaded, *terminations.values(), *truncations.values()))
        assert loaded or len(rewards) == 2 * 50
    assert ends == {(True, True, True, False, False), (False, False, False, True, True)}
    game = script.PettingZooGame(script.Args(env_id="benchmarks.foraging:parallel_env"))
    assert (game.num_players, game.num_actions, game.horizon) == (2, 6, 50)


def test_biased_rps():
    """Each row plays its preferred move in two of three steps, for a whole match."""
    player = Biased()
    generator = generator_of(0)
    mask = torch.ones(600, 3).bool()
    half = torch.arange(600) < 300

    def preferred():
        """The move that each row plays most in 60 steps: in two of three of them."""
        actions = torch.stack([player(None, mask, None, generator) for _ in range(60)])
        assert (actions == actions.mode(0).values).float().mean() == pytest.approx(2 / 3, abs=0.02)
        return actions.mode(0).values

    player.start_match(half | True)
    first = preferred()
    assert first.bincount().min() > 150 and torch.equal(first, preferred())
    player.start_match(half)
    player.start_match(half & False)  # before the next step; takes nothing back
    second = preferred()
    assert torch.equal(first[~half], second[~half])
    assert (first == second)[half].float().mean() == pytest.approx(1 / 3, abs=0.1)

"""The grid games, and other games of the benchmarks, as PettingZoo environments."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test
from pettingzoo.utils.conversions import parallel_to_aec

from benchmarks.biased_rps import Biased
from benchmarks.foraging import parallel_env as foraging_env
from benchmarks.grid_env import parallel_env

pytestmark = pytest.mark.only("hop_onestep")

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
ENV_IDS = ["msh-4h1s", "msh-3x3-4h1s", "msh-2x4-2p-1h1s", "msg", "msg-2x3-3p-3d"]
every_game = pytest.mark.parametrize("env_id", ENV_IDS)
PREY = [5, 3, 15, 12, 10]  # cells of a stag and four hares in a 4 x 4 world


def scene(players, items=PREY, time=0, first_hunt=0, env_id="msh-4x4-4h1s", render_mode=None):
    """An environment in the middle of a game, its agents those that have not left."""
    env = parallel_env(env_id, render_mode)
    env.reset(seed=0)
    fields = [[players], [items], [time], [first_hunt]]
    env.game_state = type(env.game_state)(*(torch.tensor(field) for field in fields))
    env.agents = []
    for agent, cell in zip(env.possible_agents, players, strict=True):
        if cell >= 0:
            env.agents.append(agent)
    return env


def random_actions(env, observations, rng):
    """For most agents a legal action, interactions preferred, for some any action."""
    actions = {}
    for agent in env.agents:
        mask = observations[agent]["action_mask"]
        choices = np.flatnonzero(mask) if rng.random() < 0.8 else np.arange(len(mask))
        actions[agent] = int(choices[-1] if rng.random() < 0.4 else rng.choice(choices))
    return actions


def stay(env):
    return dict.fromkeys(env.agents, STAY)


def assert_same(a, b):
    """Equal nested containers of arrays, types included."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    else:
        assert a == b


# ------------------------------------------------------------------------------------------------
# The interface
# ------------------------------------------------------------------------------------------------
@every_game
def test_parallel_api(env_id):
    env = parallel_env(env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            parallel_api_test(env, num_cycles=200)


@every_game
def test_aec_api(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # an observation is a dictionary with a mask, and planes are empty when all have left
        warnings.filterwarnings("ignore", "Observation is not a NumPy array")
        warnings.filterwarnings("ignore", "Observation space for each agent probably should be")
        warnings.filterwarnings("ignore", "Observation numpy array is all zeros")
        for _ in range(3):
            api_test(parallel_to_aec(parallel_env(env_id)), num_cycles=200)


@every_game
def test_pettingzoo_seed_test(env_id):
    parallel_seed_test(lambda: parallel_env(env_id))


@every_game
def test_spaces_agents_and_metadata(env_id):
    env = parallel_env(env_id)
    n = env.game.num_players
    a = env.game.num_actions
    shape = (n + len(env.game.item_names), env.game.height, env.game.width)
    assert env.possible_agents == [f"player_{seat}" for seat in range(n)]
    assert env.agents == []
    assert env.max_cycles == env.game.horizon
    observations, infos = env.reset(seed=3)
    assert env.agents == list(observations) == list(infos) == env.possible_agents
    for agent in env.agents:
        space = env.observation_space(agent)
        assert env.action_space(agent) == spaces.Discrete(a)
        assert space["observation"] == spaces.Box(0.0, 1.0, shape, np.float32)
        assert space["action_mask"].shape == (a,)
        assert observations[agent] in space
        assert observations[agent]["observation"].dtype == np.float32
        mask = observations[agent]["action_mask"]
        assert mask.dtype == np.int8
        assert np.array_equal(infos[agent]["action_mask"], mask)
        assert infos[agent]["clock"].tolist() == [0, env.game.horizon]
        env.action_space(agent).sample(mask=mask)  # takes this mask
    assert env.state_space == spaces.Box(0.0, 1.0, shape, np.float32)
    assert env.state() in env.state_space
    assert len({id(env.action_space(agent)) for agent in env.agents}) == n  # each has its own seed
    assert env.metadata["render_modes"] == ["rgb_array", "ansi"]
    assert str(env) == env.metadata["name"]
    env.close()


def test_before_the_first_reset():
    for mode in (None, "rgb_array", "ansi"):
        env = parallel_env("msh-4x4-4h1s", mode)
        for call in (env.render, env.state, lambda env=env: env.step({})):
            with pytest.raises(ResetNeeded, match="call reset first"):
                call()
        env.reset(seed=0)
        assert env.state().sum((1, 2)).tolist() == [1, 1, 1, 1, 1, 4]
        assert (env.render() is None) == (mode is None)


def test_steps_after_the_end_are_empty():
    env = parallel_env("msg-3x3-2p-2d", max_cycles=3)
    env.reset(seed=0)
    for _ in range(3):
        env.step(stay(env))
    assert env.agents == []
    before = env.state()
    for actions in ({}, {"player_0": STAY, "player_1": 99}):
        assert env.step(actions) == ({}, {}, {}, {}, {})
    assert np.array_equal(env.state(), before)
    observations, _ = env.reset()
    assert env.agents == list(observations) == env.possible_agents


def test_errors():
    for env_id in ("garbage", "msh-0x4", "msg-2x2-5d"):
        with pytest.raises(ValueError, match=env_id):
            parallel_env(env_id)
    for mode in ("human", "rgb", "", "ANSI"):
        with pytest.raises(ValueError, match="unknown render mode"):
            parallel_env("msh", mode)
    env = parallel_env("msh")
    env.reset(seed=0)
    before = env.state()
    for action in (-1, 7, 100, 2.5, np.float32(1), "up", None):
        with pytest.raises(ValueError, match="player_2"):
            env.step({**stay(env), "player_2": action})
    with pytest.raises(ValueError, match="player_3"):
        env.step(dict.fromkeys(env.agents[:3], STAY))
    with pytest.raises(ValueError, match="player_0"):
        env.step({})
    assert np.array_equal(env.state(), before)  # a refused step is no step
    actions = {**stay(env), "player_0": np.int32(STAY), "player_1": np.int64(STAY)}
    _, _, _, _, infos = env.step(actions)
    assert infos["player_0"]["clock"].tolist() == [1, 34]
    env = parallel_env("msg")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="player_0"):  # Markov Snowdrift has one action less
        env.step({**stay(env), "player_0": HARE})


# ------------------------------------------------------------------------------------------------
# Seeds
# ------------------------------------------------------------------------------------------------
def trajectory(env, seed, action_seed, episodes=4):
    """Everything that the environment gives out, in episodes of which the first is seeded."""
    rng = np.random.default_rng(action_seed)
    record = []
    for episode in range(episodes):
        result = env.reset(seed=seed) if episode == 0 else env.reset()
        record.append((result, env.state(), list(env.agents)))
        while env.agents:
            result = env.step(random_actions(env, result[0], rng))
            record.append((result, env.state(), list(env.agents)))
    return record


@every_game
def test_same_seed_same_episodes(env_id):
    env = parallel_env(env_id)
    first = trajectory(env, 5, 6)
    torch.manual_seed(99)  # nothing outside has a say
    assert_same(trajectory(parallel_env(env_id), 5, 6), first)
    assert_same(trajectory(env, 5, 6), first)  # nor has what was played before
    starts = [state.tobytes() for result, state, _ in first if len(result) == 2]
    assert len(starts) == 4
    assert len(set(starts)) > 1  # the generator goes on
    others = [trajectory(env, seed, 6, 1)[0][1].tobytes() for seed in range(6, 12)]
    assert len(set(others)) > 3


def test_numpy_integers_are_seeds_and_negative_numbers_are_not():
    env = parallel_env("msh")
    env.reset(seed=5)
    expected = env.state()
    for seed in (np.int64(5), np.uint8(5)):
        env.reset(seed=seed)
        assert np.array_equal(env.state(), expected)
    for seed in (-1, np.int64(-3), 2**64):
        with pytest.raises(ValueError, match="seed"):
            env.reset(seed=seed)
    env.reset(seed=2**64 - 1)


def test_without_a_seed_entropy_is_fresh():
    states = []
    before = torch.get_rng_state()
    for _ in range(4):
        torch.manual_seed(0)
        env = parallel_env("msh-4h1s")
        for _ in range(2):
            env.reset()
            states.append(env.state().tobytes())
    assert len(set(states)) == 8
    torch.manual_seed(0)
    state = torch.get_rng_state()
    env.reset(seed=1)
    env.step(stay(env))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.set_rng_state(before)


def test_a_copy_goes_on_alike():
    env = parallel_env("msh-3x3-4h1s")
    observations, _ = env.reset(seed=2)
    twin = copy.deepcopy(env)
    actions = random_actions(env, observations, np.random.default_rng(0))
    assert_same(twin.step(actions), env.step(actions))
    assert_same(twin.reset(), env.reset())


# ------------------------------------------------------------------------------------------------
# Rules
# ------------------------------------------------------------------------------------------------
def test_players_that_leave():
    env = scene([0, 5, 1, 5])
    actions = {"player_0": STAY, "player_1": STAG, "player_2": UP, "player_3": STAG}
    observations, rewards, terminations, truncations, infos = env.step(actions)
    assert list(rewards.values()) == [0.0, 5.0, 0.0, 5.0]
    assert list(terminations.values()) == [False, True, False, True]
    assert set(truncations.values()) == {False}
    assert env.agents == ["player_0", "player_2"]
    last = observations["player_1"]  # own plane and that of player 3 are empty
    assert last["observation"].sum((1, 2)).tolist() == [0, 1, 0, 1, 0, 4]
    assert last["action_mask"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert infos["player_1"]["clock"].tolist() == [1, 5]
    for steps_left in (4, 3, 2, 1, 0):
        results = env.step({**stay(env), "player_1": 99})  # one that has left is not asked
        assert [list(result) for result in results] == [["player_0", "player_2"]] * 5
        assert results[4]["player_0"]["clock"].tolist() == [6 - steps_left, steps_left]
        assert results[0]["player_0"]["observation"].sum((1, 2)).tolist() == [1, 0, 1, 0, 0, 4]
        assert set(results[2].values()) == {steps_left == 0}
        assert set(results[3].values()) == {False}
    assert env.agents == []


def test_truncation():
    env = parallel_env("msg-3x3-2p-2d")
    env.reset(seed=0)
    for time in range(1, 51):
        _, rewards, terminations, truncations, infos = env.step(stay(env))
        assert set(truncations.values()) == {time == 50}
        assert set(terminations.values()) == {False}
        assert infos["player_1"]["clock"].tolist() == [time, 50 - time]
        assert set(rewards.values()) == {0.0}
    assert env.agents == []
    env = scene([0, 3, 0, 0], time=34)  # one leaves in the step in which the horizon ends the game
    _, _, terminations, truncations, _ = env.step({**stay(env), "player_1": HARE})
    assert list(terminations.values()) == [False, True, False, False]
    assert list(truncations.values()) == [True, False, True, True]
    assert env.agents == []
    env = scene([0, 3, 0, 0], time=34, first_hunt=30)  # the countdown ends with the horizon
    _, _, terminations, truncations, _ = env.step(stay(env))
    assert set(terminations.values()) == {True}
    assert set(truncations.values()) == {False}


def test_illegal_actions_count_as_stay():
    env = scene([0, 3, 5, 15])
    before = env.state()
    actions = {"player_0": UP, "player_1": STAG, "player_2": HARE, "player_3": DOWN}
    _, rewards, _, _, infos = env.step(actions)
    assert np.array_equal(env.state(), before)
    assert set(rewards.values()) == {0.0}
    assert infos["player_0"]["clock"].tolist() == [1, 34]


def test_what_is_given_out_is_a_copy():
    env = parallel_env("msh-4x4-4h1s")
    observations, infos = env.reset(seed=0)
    before = env.state()
    others = [observations["player_1"], infos["player_1"], infos["player_0"]["action_mask"]]
    kept = copy.deepcopy(others)
    observations["player_0"]["observation"][:] = 7
    observations["player_0"]["action_mask"][:] = 7
    infos["player_0"]["clock"][:] = 7
    env.state()[:] = 7
    assert np.array_equal(env.state(), before)
    assert_same(others, kept)
    assert env.agents is not env.possible_agents
    _, _, _, _, infos = env.step(stay(env))
    assert infos["player_0"]["clock"].tolist() == [1, 34]


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------
@every_game
def test_frames(env_id):
    env = parallel_env(env_id, "rgb_array")
    rng = np.random.default_rng(0)
    observations, _ = env.reset(seed=0)
    frames = [env.render()]
    assert np.array_equal(env.render(), frames[0])  # the same state, the same picture
    while env.agents:
        observations, *_ = env.step(random_actions(env, observations, rng))
        frames.append(env.render())
    for frame in frames:
        assert type(frame) is np.ndarray
        assert frame.dtype == np.uint8
        assert frame.shape == frames[0].shape
        assert frame.ndim == 3
        assert frame.shape[2] == 3
    assert len({frame.tobytes() for frame in frames}) == len(frames)  # the time is on the picture


def test_a_frame_shows_players_items_and_time():
    scenes = [
        scene([0, 1, 2, 3], render_mode="rgb_array"),
        scene([0, 1, 2, 7], render_mode="rgb_array"),
        scene([1, 0, 2, 3], render_mode="rgb_array"),  # other players on the same cells
        scene([0, 1, 2, -1], render_mode="rgb_array"),
        scene([0, 1, 2, 3], [3, 5, 15, 12, 10], render_mode="rgb_array"),  # stag and hare exchanged
        scene([0, 1, 2, 3], [5, 3, 15, 12, -1], render_mode="rgb_array"),
        scene([0, 1, 2, 3], time=4, render_mode="rgb_array"),
    ]
    assert len({env.render().tobytes() for env in scenes}) == len(scenes)


def test_beliefs_are_on_the_picture():
    """Lines as wide as they are likely, from the players that are there."""
    env = scene([0, 3, 12, -1], [5, 10, 15, 1, -1])
    state = env.game_state
    plain = env.game.draw(state, "title", [])
    for seat, item, shows in ((0, 1, True), (2, 3, True), (3, 1, False)):
        beliefs = [[0.0] * 5 for _ in range(4)]
        beliefs[seat][item] = 0.5
        picture = env.game.draw(state, "title", beliefs)
        assert picture.shape == plain.shape
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, plain) != shows
        beliefs[seat][item] = 1.0
        wider = env.game.draw(state, "title", beliefs)
        assert np.array_equal(wider, picture) != shows


def test_text():
    env = scene([0, 5, 5, -1], [5, 3, 15, 12, -1], 4, 2, render_mode="ansi")
    lines = env.render().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["0", ".", ".", "H"],
        [".", "S1,2", ".", "."],
        [".", ".", ".", "."],
        ["H", ".", ".", "H"],
    ]
    assert {line.rstrip().rfind(" ") for line in lines[:4]} == {14}  # columns are aligned
    assert lines[4:] == ["time 4, 3 steps left, players that left: 3"]
    env = scene([1, 1, 7, 9], [1, 4, 15, 12, 10, 11], env_id="msg-4x4", render_mode="ansi")
    cells = ". D0,1 . . D . . 2 . 3 D D D . . D".split()
    assert env.render().split() == [*cells, "time", "0,", "50", "steps", "left"]


# ------------------------------------------------------------------------------------------------
# Agreement with the game
# ------------------------------------------------------------------------------------------------
def first_state(game, planes):
    """Fields of the grid state at time 0 that float [B, N, C * H * W] `planes` show."""
    planes = planes[:, 0].unflatten(1, (-1, game.num_cells))  # seat 0 sees players in seat order
    assert planes.sum(2).tolist() == [[1] * game.num_players + game.item_counts] * len(planes)
    players = planes[:, : game.num_players].argmax(2)
    items = []
    for k, count in enumerate(game.item_counts, game.num_players):
        items.append(planes[:, k].nonzero()[:, 1].view(-1, count))
    zeros = torch.zeros(len(planes), dtype=torch.int64)
    return [players, torch.cat(items, 1), zeros, zeros]


EVERYTHING = {"departure", "termination", "truncation", "truncation after departure"}
HORIZONS = [
    ("msh-3x3-4h1s", None, {"departure", "termination"}),
    ("msh-3x3-4h1s", 4, EVERYTHING),
    ("msh-2x4-2p-1h1s", 6, EVERYTHING),
    ("msh-2x2-6p-2h2s", None, {"departure", "termination"}),
    ("msg-2x3-3p-3d", None, {"termination"}),
    ("msg", 12, {"truncation"}),
    ("msg-2x2-2p-1d", 3, {"termination", "truncation"}),
]


@pytest.mark.parametrize(("env_id", "horizon", "expected"), HORIZONS)
def test_the_environment_plays_the_game_of_the_script(script, env_id, horizon, expected):
    """Same starts and actions: same observations, rewards, ends, masks and clocks, by player."""
    kwargs = json.dumps({"env_id": env_id, "max_cycles": horizon})
    args = script.Args(env_id="benchmarks.grid_env:parallel_env", env_kwargs=kwargs)
    copies = script.PettingZooGame(args)
    game = script.GridGame(env_id, horizon=horizon)
    assert copies.horizon == game.horizon
    assert (copies.num_players, copies.num_actions) == (game.num_players, game.num_actions)
    generator = torch.Generator().manual_seed(0)
    copied = copies.start(6, generator)
    state = script.GridState(*first_state(game, copies.observe(copied)[..., game.num_actions :]))
    starts = set()
    events = set()
    left = torch.zeros(6, dtype=torch.bool)
    for _ in range(120):
        alive = game.alive(state)
        mask = game.action_mask(state)
        clock = game.clock(state)
        assert torch.equal(copies.alive(copied), alive)
        assert torch.equal(copies.action_mask(copied)[alive], mask[alive])
        planes = game.observe(state).flatten(2)
        seen = copies.observe(copied)[..., game.num_actions :]  # behind the mask
        assert torch.equal(seen[alive], planes[alive])
        assert torch.equal(copies.clock(copied)[:, 0], clock[:, 0])
        before_hunt = state.first_hunt == 0  # afterwards the environment's infos alone tell the end
        assert torch.equal(copies.clock(copied)[before_hunt], clock[before_hunt])
        weights = mask + 0.1  # a few illegal ones
        weights[..., 5:] += 2.0 * mask[..., 5:]
        actions = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(6, -1)
        state, reward, terminated, truncated = game.step(state, actions)
        copied, *results = copies.step(copied, actions)
        assert torch.equal(results[0], reward)
        assert torch.equal(results[1], terminated)
        assert torch.equal(results[2], truncated)
        ended = (terminated | truncated).all(1)
        departed = (terminated & alive).any(1) & ~ended
        events |= {"departure"} if departed.any() else set()
        events |= {"termination"} if terminated.all(1).any() else set()
        events |= {"truncation"} if truncated.any() else set()
        events |= {"truncation after departure"} if (truncated.any(1) & left).any() else set()
        left = (left | departed) & ~ended
        if ended.any():
            copied = copies.restart(copied, ended, generator)
            fresh = first_state(game, copies.observe(copied)[ended][..., game.num_actions :])
            for field, value in zip(state, fresh, strict=True):
                field[ended] = value
            starts.add(str(fresh))
    assert events == expected
    assert len(starts) > 2


@pytest.mark.parametrize("env_id", ["msh-4h1s", "msg-2x3-3p-3d"])
def test_seeds_are_those_of_the_game(script, env_id):
    env = parallel_env(env_id)
    game = script.GridGame(env_id)
    for seed in (0, 7, 2**40):
        env.reset(seed=seed)
        expected = game.start(1, torch.Generator().manual_seed(seed))
        assert all(map(torch.equal, env.game_state, expected))


def learning_curve(script, **options):
    """Mean returns of a run, by iteration; NaN where no episode ended."""
    curve = []

    def watch(**inside):
        curve.append(inside["metrics"].get("charts/episodic_return", math.nan))

    script.train(script.Args(**options), watch)
    return curve


def test_training_on_the_environment_reaches_what_the_game_does(script, tmp_path, monkeypatch):
    """Two players and a stag on four cells, where random play gets 0.6 of 5."""
    monkeypatch.chdir(tmp_path)
    options = {"co_players": "self", "goal": "none", "plan_update": "none", "gamma": 0.95}
    options |= {"num_envs": 16, "num_steps": 32, "total_timesteps": 6144, "hidden_size": 32}
    options |= {"learning_rate": 3e-3, "num_minibatches": 4, "reward_scale": 0.3}
    env_id = "msh-2x2-2p-0h1s"
    wrapped = {"env_id": "benchmarks.grid_env:parallel_env"}
    wrapped["env_kwargs"] = json.dumps({"env_id": env_id})
    for game in ({"env_id": env_id}, wrapped):
        curve = learning_curve(script, **game, **options)
        assert np.nanmean(curve[1:3]) < 2.5
        assert np.mean(curve[-3:]) > 4.5


# ------------------------------------------------------------------------------------------------
# Other games
# ------------------------------------------------------------------------------------------------
def test_foraging():
    env = foraging_env("Foraging-5x5-2p-1f-v3")
    assert env.max_cycles == 50
    parallel_seed_test(lambda: foraging_env("Foraging-5x5-2p-1f-v3"))
    rng = np.random.default_rng(0)
    ends = set()
    for seed in range(30):
        env.reset(seed=seed)
        total = 0.0
        length = 0
        while env.agents:
            actions = {agent: int(rng.integers(6)) for agent in env.agents}
            _, rewards, terminations, truncations, _ = env.step(actions)
            total += sum(rewards.values())
            length += 1
        assert set(terminations.values()) != set(truncations.values())
        terminated = terminations["player_0"]
        assert terminated == (total == pytest.approx(1.0))  # all food is loaded
        assert terminated or (length == 50 and total == 0.0)
        ends.add(terminated)
        assert env.step({}) == ({}, {}, {}, {}, {})
    assert ends == {True, False}
    parallel_api_test(env)


def test_the_script_plays_foraging(script):
    kwargs = json.dumps({"id": "Foraging-6x6-3p-2f-coop-v3"})
    args = script.Args(env_id="benchmarks.foraging:parallel_env", env_kwargs=kwargs)
    game = script.PettingZooGame(args)
    assert (game.num_players, game.num_actions, game.horizon) == (3, 6, 50)
    generator = torch.Generator().manual_seed(0)
    state = game.start(2, generator)
    assert game.observe(state).shape == (2, 3, 15)
    idle = torch.zeros(2, 3, dtype=torch.int64)
    for step in range(1, 51):
        state, _, terminated, truncated = game.step(state, idle)
        assert not terminated.any()
        assert bool(truncated.all()) == (step == 50)


def test_biased_rps():
    player = Biased()
    generator = torch.Generator().manual_seed(0)
    rows = 600
    mask = torch.ones(rows, 3, dtype=torch.bool)
    everywhere = torch.ones(rows, dtype=torch.bool)

    def preferred():
        """The move that each row plays most in 60 steps, and the share of the moves that are it."""
        actions = torch.stack([player(None, mask, None, generator) for _ in range(60)])
        counts = torch.stack([(actions == move).sum(0) for move in range(3)])
        assert counts.sum() == 60 * rows
        return counts.argmax(0), counts.max(0).values.sum() / counts.sum()

    player.start_match(everywhere)
    first, share = preferred()
    assert share == pytest.approx(0.5 + 0.5 / 3, abs=0.02)
    assert first.bincount().min() > rows / 4  # each move is preferred by a third of the rows
    again, _ = preferred()
    assert torch.equal(first, again)  # for the whole match
    half = torch.arange(rows) < rows // 2
    player.start_match(half)
    player.start_match(~everywhere)  # before the next step; takes nothing back
    second, _ = preferred()
    assert torch.equal(first[~half], second[~half])
    same = (first == second)[half].float().mean()
    assert same == pytest.approx(1 / 3, abs=0.1)


def test_the_script_trains_with_biased_rps(script, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    co_player = "benchmarks.biased_rps:Biased"
    args = small(env_id="pettingzoo.classic.rps_v2", co_players=co_player)
    metrics = script.train(args)
    own = metrics["charts/episodic_return"]
    assert metrics[f"returns/{co_player}"] == pytest.approx(-own)  # a zero-sum game

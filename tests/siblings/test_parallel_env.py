"""The games as a PettingZoo ParallelEnv, and the pictures of them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import api_test, parallel_api_test
from pettingzoo.utils.conversions import parallel_to_aec

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
ENV_IDS = ["msh-4h1s", "msh-3x3-4h1s", "msh-2x4-2p-1h1s", "msg", "msg-2x3-3p-3d"]
every_game = pytest.mark.parametrize("env_id", ENV_IDS)
PREY = [5, 3, 15, 12, 10]  # cells of a stag and four hares in a 4 x 4 world


def scene(script, players, items=PREY, time=0, first_hunt=0, env_id="msh-4x4-4h1s", render_mode=None):
    """An environment in the middle of a game, its agents those that have not left."""
    env = script.parallel_env(env_id, render_mode)
    env.reset(seed=0)
    env.game_state = script.GameState(*(torch.tensor(x) for x in ([players], [items], [time], [first_hunt])))
    env.agents = [agent for agent, cell in zip(env.possible_agents, players, strict=True) if cell >= 0]
    return env


def random_actions(env, observations, rng):
    """For most agents a legal action, interactions preferred, for some any action."""
    actions = {}
    for agent in env.agents:
        mask = observations[agent]["action_mask"]
        legal = np.flatnonzero(mask) if rng.random() < 0.8 else np.arange(len(mask))
        actions[agent] = int(legal[-1] if rng.random() < 0.4 else rng.choice(legal))
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
        assert a.dtype == b.dtype and np.array_equal(a, b)
    else:
        assert a == b


# ---------------------------------------------------------------------------------------------------------------------
# The interface
# ---------------------------------------------------------------------------------------------------------------------
@every_game
def test_parallel_api(script, env_id):
    env = script.parallel_env(env_id)
    assert isinstance(env, ParallelEnv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            parallel_api_test(env, num_cycles=200)


@every_game
def test_aec_api(script, env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Observation is not a NumPy array")  # it is a dictionary with a mask
        warnings.filterwarnings("ignore", "Observation space for each agent probably should be")
        warnings.filterwarnings("ignore", "Observation numpy array is all zeros")  # all players and all prey are gone
        for _ in range(5):
            api_test(parallel_to_aec(script.parallel_env(env_id)), num_cycles=200)


@every_game
def test_spaces_agents_and_metadata(script, env_id):
    env = script.parallel_env(env_id)
    game = script.GridGame(env_id)
    n, a, shape = game.num_players, game.num_actions, tuple(game.obs_shape)
    assert env.possible_agents == [f"player_{seat}" for seat in range(n)]
    assert env.agents == [] and env.max_num_agents == n
    observations, infos = env.reset(seed=3)
    assert env.agents == list(observations) == list(infos) == env.possible_agents
    for agent in env.agents:
        space = env.observation_space(agent)
        assert env.action_space(agent) == spaces.Discrete(a) and env.action_space(agent) is env.action_space(agent)
        assert space["observation"] == spaces.Box(0.0, 1.0, shape, np.float32)
        assert space["action_mask"].shape == (a,) and space["action_mask"].dtype == np.int8
        assert space is env.observation_space(agent) and observations[agent] in space
        assert observations[agent]["observation"].dtype == np.float32
        assert observations[agent]["action_mask"].dtype == np.int8
        assert np.array_equal(infos[agent]["action_mask"], observations[agent]["action_mask"])
        assert infos[agent]["clock"].tolist() == [0, game.horizon]
        env.action_space(agent).sample(mask=observations[agent]["action_mask"])  # takes this mask
    assert env.state_space == spaces.Box(0.0, 1.0, shape, np.float32) and env.state() in env.state_space
    assert len({id(env.action_space(agent)) for agent in env.agents}) == n  # each can be seeded by itself
    assert env.metadata["render_modes"] == ["rgb_array", "ansi"] and env.metadata["render_fps"] > 0
    assert str(env) == env.metadata["name"]
    env.close()


def test_defaults(script):
    env = script.parallel_env()
    env.reset(seed=0)
    assert env.render_mode is None and env.render() is None
    assert env.state().shape == (6, 8, 8) and env.num_agents == 4
    assert env.state().sum((1, 2)).tolist() == [1, 1, 1, 1, 1, 4]


def test_errors(script):
    for env_id in ("garbage", "msh-0x4", "msg-2x2-5d"):
        with pytest.raises(script.UsageError):
            script.parallel_env(env_id)
    for mode in ("human", "rgb", "", "ANSI"):
        with pytest.raises(script.UsageError):
            script.parallel_env("msh", mode)
    env = script.parallel_env("msh")
    with pytest.raises(RuntimeError):
        env.step({})  # never reset
    env.reset(seed=0)
    before = env.state()
    for action in (-1, 7, 100, 2.5, np.float32(1), "up", None):
        with pytest.raises(ValueError, match="player_2"):
            env.step({**stay(env), "player_2": action})
    with pytest.raises(ValueError, match="player_3"):
        env.step({agent: STAY for agent in env.agents[:3]})
    assert np.array_equal(env.state(), before)  # a refused step is no step
    _, _, _, _, infos = env.step({**stay(env), "player_0": np.int32(STAY), "player_1": np.int64(STAY)})
    assert infos["player_0"]["clock"].tolist() == [1, 34]
    env = script.parallel_env("msg")
    env.reset(seed=0)
    with pytest.raises(ValueError):  # Markov Snowdrift has one action less
        env.step({**stay(env), "player_0": 6})


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------
def trajectory(env, seed, action_seed, episodes=4):
    """Everything that the environment gives out, in several episodes of which the first is seeded."""
    rng, record = np.random.default_rng(action_seed), []
    for episode in range(episodes):
        result = env.reset(seed=seed) if episode == 0 else env.reset()
        record.append((result, env.state(), list(env.agents)))
        while env.agents:
            result = env.step(random_actions(env, result[0], rng))
            record.append((result, env.state(), list(env.agents)))
    return record


@every_game
def test_same_seed_same_episodes(script, env_id):
    env = script.parallel_env(env_id)
    first = trajectory(env, 5, 6)
    torch.manual_seed(99)  # nothing outside has a say
    assert_same(trajectory(script.parallel_env(env_id), 5, 6), first)
    assert_same(trajectory(env, 5, 6), first)  # nor has what was played before
    starts = [env_state for result, env_state, _ in first if len(result) == 2]
    assert len(starts) == 4
    assert not all(np.array_equal(starts[0], start) for start in starts[1:])  # the generator goes on
    others = [trajectory(env, seed, 6, 1)[0][1] for seed in range(6, 12)]
    assert not any(np.array_equal(a, b) for a, b in zip(others[:3], others[3:], strict=True))


def test_without_a_seed_entropy_is_fresh(script):
    states = []
    before = torch.get_rng_state()
    for _ in range(4):
        torch.manual_seed(0)
        env = script.parallel_env("msh-4h1s")
        for _ in range(2):
            env.reset()
            states.append(env.state().tobytes())
    assert len(set(states)) == 8
    torch.manual_seed(0)
    state = torch.get_rng_state()
    env.reset(seed=1)
    env.step(stay(env))
    assert torch.equal(torch.get_rng_state(), state)  # and the global generator is left alone
    torch.set_rng_state(before)


def test_a_copy_goes_on_alike(script):
    env = script.parallel_env("msh-3x3-4h1s")
    observations, _ = env.reset(seed=2)
    twin = copy.deepcopy(env)
    actions = random_actions(env, observations, np.random.default_rng(0))
    assert_same(twin.step(actions), env.step(actions))
    assert_same(twin.reset(), env.reset())


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the game
# ---------------------------------------------------------------------------------------------------------------------
@every_game
def test_episodes_are_those_of_the_game(script, env_id):
    env, game, rng = script.parallel_env(env_id), script.GridGame(env_id), np.random.default_rng(1)
    kinds = np.split(np.arange(game.num_items), np.cumsum(game.item_counts)[:-1])
    departures = 0
    for seed in range(6):
        observations, infos = env.reset(seed=seed)
        state = game.initial_state(1, torch.Generator().manual_seed(seed))
        over, agents = False, list(env.possible_agents)
        while True:
            planes, masks, clock = game.observe(state)[0], game.action_mask(state)[0], game.clock(state)[0]
            assert list(observations) == list(infos) == agents
            for agent in agents:
                seat = env.possible_agents.index(agent)
                assert np.array_equal(observations[agent]["observation"], planes[seat].numpy())
                assert np.array_equal(observations[agent]["action_mask"], masks[seat].numpy())
                assert np.array_equal(infos[agent]["action_mask"], masks[seat].numpy())
                assert np.array_equal(infos[agent]["clock"], clock.numpy())
            expected = np.zeros(game.obs_shape, np.float32).reshape(game.obs_shape[0], -1)
            for plane, cell in enumerate(state.players[0].tolist()):
                expected[plane, [cell] if cell >= 0 else []] = 1
            for plane, kind in enumerate(kinds, game.num_players):
                expected[plane, [cell for cell in state.items[0, kind].tolist() if cell >= 0]] = 1
            assert np.array_equal(env.state(), expected.reshape(game.obs_shape)) and env.state().dtype == np.float32
            if over:
                assert env.agents == []
                break
            agents = list(env.agents)
            actions = random_actions(env, observations, rng)
            played = [actions.get(agent, STAY) for agent in env.possible_agents]
            state, reward, terminated, truncated = game.step(state, torch.tensor([played]))
            over = bool(terminated | truncated)
            observations, rewards, terminations, truncations, infos = env.step(actions)
            assert list(rewards) == list(terminations) == list(truncations) == agents
            for agent in agents:
                seat = env.possible_agents.index(agent)
                left = bool(state.players[0, seat] < 0)
                assert rewards[agent] == float(reward[0, seat]) and type(rewards[agent]) is float
                assert terminations[agent] is (left or bool(terminated))
                assert truncations[agent] is (bool(truncated) and not left)
                departures += left and not over
            assert env.agents == [agent for agent in agents if not (terminations[agent] or truncations[agent])]
    assert departures > 0 or not env_id.startswith("msh-3x3")


def test_players_that_leave(script):
    env = scene(script, [0, 5, 1, 5])
    observations, rewards, terminations, truncations, infos = env.step(
        {"player_0": STAY, "player_1": STAG, "player_2": UP, "player_3": STAG}
    )
    assert rewards == {"player_0": 0.0, "player_1": 5.0, "player_2": 0.0, "player_3": 5.0}
    assert terminations == {"player_0": False, "player_1": True, "player_2": False, "player_3": True}
    assert not any(truncations.values()) and env.agents == ["player_0", "player_2"]
    last = observations["player_1"]  # own plane and that of player 3 are empty; players 2 and 0 are seen, and the hares
    assert last["observation"].sum((1, 2)).tolist() == [0, 1, 0, 1, 0, 4]
    assert last["action_mask"].tolist() == [0, 0, 0, 0, 1, 0, 0] and infos["player_1"]["clock"].tolist() == [1, 5]
    for steps_left in (4, 3, 2, 1, 0):
        results = env.step({**stay(env), "player_1": 99})  # what is asked of one that has left is not looked at
        assert all(list(result) == ["player_0", "player_2"] for result in results)
        assert results[4]["player_0"]["clock"].tolist() == [6 - steps_left, steps_left]
        assert results[0]["player_0"]["observation"].sum((1, 2)).tolist() == [1, 0, 1, 0, 0, 4]
        assert set(results[2].values()) == {steps_left == 0} and set(results[3].values()) == {False}
    assert env.agents == []
    with pytest.raises(RuntimeError):
        env.step({})
    observations, _ = env.reset()
    assert env.agents == list(observations) == env.possible_agents


def test_truncation(script):
    env = script.parallel_env("msg-3x3-2p-2d")
    env.reset(seed=0)
    for time in range(1, 51):
        _, rewards, terminations, truncations, infos = env.step(stay(env))
        assert set(truncations.values()) == {time == 50} and set(terminations.values()) == {False}
        assert infos["player_1"]["clock"].tolist() == [time, 50 - time] and set(rewards.values()) == {0.0}
    assert env.agents == []
    env = scene(script, [0, 3, 0, 0], time=34)  # one leaves in the step in which the horizon cuts the others off
    _, _, terminations, truncations, _ = env.step({**stay(env), "player_1": HARE})
    assert list(terminations.values()) == [False, True, False, False]
    assert list(truncations.values()) == [True, False, True, True] and env.agents == []
    env = scene(script, [0, 3, 0, 0], time=34, first_hunt=30)  # the countdown ends with the horizon: a termination
    _, _, terminations, truncations, _ = env.step(stay(env))
    assert set(terminations.values()) == {True} and set(truncations.values()) == {False}


def test_illegal_actions_count_as_stay(script):
    env = scene(script, [0, 3, 5, 15])
    before = env.state()
    _, rewards, _, _, infos = env.step({"player_0": UP, "player_1": STAG, "player_2": HARE, "player_3": DOWN})
    assert np.array_equal(env.state(), before) and set(rewards.values()) == {0.0}
    assert infos["player_0"]["clock"].tolist() == [1, 34]


def test_what_is_given_out_is_a_copy(script):
    env = script.parallel_env("msh-4x4-4h1s")
    observations, infos = env.reset(seed=0)
    before = env.state()
    kept = copy.deepcopy([observations["player_1"], infos["player_1"], infos["player_0"]["action_mask"]])
    observations["player_0"]["observation"][:] = 7
    observations["player_0"]["action_mask"][:] = 7
    infos["player_0"]["clock"][:] = 7
    env.state()[:] = 7
    assert np.array_equal(env.state(), before)
    assert_same([observations["player_1"], infos["player_1"], infos["player_0"]["action_mask"]], kept)
    assert env.agents is not env.possible_agents
    _, _, _, _, infos = env.step(stay(env))
    assert infos["player_0"]["clock"].tolist() == [1, 34]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def colour_count(frame, colour):
    """Number of pixels that have just this colour, given as #RRGGBB."""
    return int((frame == [int(colour[k : k + 2], 16) for k in (1, 3, 5)]).all(2).sum())


@every_game
def test_frames(script, env_id):
    env = script.parallel_env(env_id, "rgb_array")
    rng, (observations, _) = np.random.default_rng(0), env.reset(seed=0)
    frames = [env.render()]
    assert np.array_equal(env.render(), frames[0])  # the same state, the same picture
    while env.agents:
        observations, *_ = env.step(random_actions(env, observations, rng))
        frames.append(env.render())
    for frame in frames:
        assert type(frame) is np.ndarray and frame.dtype == np.uint8
        assert frame.shape == frames[0].shape and frame.ndim == 3 and frame.shape[2] == 3
    assert len({frame.tobytes() for frame in frames}) == len(frames)  # time is on the picture


def test_frame_shows_place_time_and_title(script):
    game = script.GridGame("msh-4x4-4h1s")

    def frame(players=(0, 1, 2, 3), items=PREY, time=3, first_hunt=0, **more):
        fields = [torch.tensor(x) for x in ([list(players)], [list(items)], [time], [first_hunt])]
        return script.render_frame(game, script.GameState(*fields), **more)

    base = frame()
    others = [
        frame((0, 1, 2, 7)),
        frame((1, 0, 2, 3)),  # other players on the same cells
        frame(items=[3, 5, 15, 12, 10]),  # the stag where a hare was
        frame(items=[5, 3, 15, 12, -1]),
        frame(time=4),
        frame(first_hunt=3),  # fewer steps left
        frame(title="a title"),
        frame(title="another title"),
        frame((0, 1, 2, -1)),
    ]
    assert len({x.tobytes() for x in [base, *others]}) == 10 and {x.shape for x in others} == {base.shape}


@pytest.mark.parametrize("players", [[9, 9, 9, 9], [5, 5, 5, 5], [5, 5, 0, -1], [9, 9, 9, -1], [-1] * 4, [0, 1, 2, 3]])
def test_every_player_and_item_is_seen(script, players):
    env = scene(script, players, render_mode="rgb_array", first_hunt=1, time=1)
    frame = env.render()
    assert len(set(script.PLAYER_COLOURS)) == 8
    for colour in script.PLAYER_COLOURS[:4]:
        assert colour_count(frame, colour) > 100
    for colour in script.PLAYER_COLOURS[4:]:
        assert colour_count(frame, colour) == 0
    stag, hare, drift = (script.ITEM_LOOKS[name][-1] for name in ("stag", "hare", "drift"))
    assert colour_count(frame, stag) > 1000 and colour_count(frame, hare) > 4000 and colour_count(frame, drift) == 0
    gone = scene(script, players, [-1] * 5, render_mode="rgb_array").render()
    assert colour_count(gone, stag) == colour_count(gone, hare) == 0


def test_beliefs(script):
    game = script.GridGame("msh-4x4-4h1s")
    grid = np.s_[60:, :390]  # below the titles, left of the panel
    none = [0.0] * 5 + [1.0]

    def frame(row_1, players=(0, 12, 2, 8), items=(5, 3, 15, 10, -1), focal=2, row_2=none):
        fields = [torch.tensor(x) for x in ([list(players)], [list(items)], [7], [3])]
        probs = np.array([none, row_1, row_2, none])
        return script.render_frame(game, script.GameState(*fields), {"focal": focal, "probs": probs}, "title")

    def line_pixels(row_1, **more):
        return int((frame(row_1, **more)[grid] != frame(none, **more)[grid]).any(2).sum())

    to_hare_1, to_gone = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0] * 4 + [1.0, 0.0]
    base = frame(none)
    assert base.dtype == np.uint8 and base.shape == frame(to_hare_1, players=(0, -1, -1, -1), items=[-1] * 5).shape
    colour = script.PLAYER_COLOURS[1]
    assert line_pixels(to_hare_1) > 300  # along the last row, which is free between them
    assert colour_count(frame(to_hare_1)[grid], colour) > colour_count(base[grid], colour) + 300
    thin = [0.1, 0.1, 0.4, 0.1, 0.0, 0.3]
    assert 0 < line_pixels(thin) < line_pixels(to_hare_1)
    assert line_pixels([0.1, 0.1, 0.3, 0.1, 0.0, 0.4]) == 0  # most likely none
    assert line_pixels(to_gone) == 0  # nothing to point at
    assert line_pixels(to_hare_1, players=(0, -1, 2, 8)) == 0  # nor anybody to point from
    assert line_pixels(to_hare_1, focal=1) == 0  # the focal player holds no belief about itself
    assert np.array_equal(frame(none, row_2=to_hare_1), base)
    assert not np.array_equal(frame(none, focal=0)[grid], base[grid])  # who is focal is marked on the grid
    panel = np.s_[:, 440:]
    panels = [frame(row)[panel] for row in (none, to_hare_1, to_gone, thin, [0.2] * 5 + [0.0])]
    assert len({x.tobytes() for x in panels}) == 5
    bars = [colour_count(frame([p, 0, 0, 0, 0, 0])[panel], colour) for p in (0.0, 0.25, 0.5, 1.0)]
    assert bars[3] - bars[0] > 800  # their lengths are the probabilities
    assert [(bar - bars[0]) / (bars[3] - bars[0]) for bar in bars] == pytest.approx([0.0, 0.25, 0.5, 1.0], abs=0.05)
    plain = script.GameState(*(torch.tensor(x) for x in ([[0, 12, 2, 8]], [[5, 3, 15, 10, -1]], [7], [3])))
    assert script.render_frame(game, plain).shape[1] < base.shape[1]


@every_game
def test_frames_with_beliefs_keep_their_size(script, env_id):
    env = script.parallel_env(env_id)
    n, columns = env.game.num_players, env.game.num_items + 1
    rng, (observations, _) = np.random.default_rng(0), env.reset(seed=0)
    shapes = set()
    while True:
        beliefs = {"focal": n - 1, "probs": rng.dirichlet(np.ones(columns), n)}
        shapes.add(script.render_frame(env.game, env.game_state, beliefs, "title" * len(shapes)).shape)
        if not env.agents:
            break
        observations, *_ = env.step(random_actions(env, observations, rng))
    assert len(shapes) == 1


def test_text(script):
    env = scene(script, [0, 5, 5, -1], [5, 3, 15, 12, -1], 4, 2, render_mode="ansi")
    lines = env.render().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["0", ".", ".", "H"],
        [".", "S1,2", ".", "."],
        [".", ".", ".", "."],
        ["H", ".", ".", "H"],
    ]
    assert len({line.rstrip().rfind(" ") for line in lines[:4]}) == 1  # columns stand below each other
    assert lines[4:] == ["time 4, 3 steps left, players that left: 3"]
    env = scene(script, [1, 1, 7, 9], [1, 4, 15, 12, 10, 11], env_id="msg-4x4", render_mode="ansi")
    assert env.render().split() == [
        *(".", "D0,1", ".", ".", "D", ".", ".", "2", ".", "3", "D", "D", "D", ".", ".", "D"),
        *("time", "0,", "50", "steps", "left"),
    ]

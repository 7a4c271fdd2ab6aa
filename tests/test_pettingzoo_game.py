"""PettingZooGame on small environments of this module, on two published ones, and its errors."""

import gc
import itertools
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from conftest import SCRIPTS

pytestmark = pytest.mark.only("hop_onestep")

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).stem


# ------------------------------------------------------------------------------------------------
# Environments
# ------------------------------------------------------------------------------------------------
class Small(ParallelEnv):
    """Two agents that see (time, a number drawn in this episode, own last action); rewards are the
    numbers of the actions; truncated after `length` steps. Subclasses change one thing each."""

    metadata = {"name": "small"}
    seeds = []  # of all episodes of this process
    actions_seen = []  # dicts, of all steps of this process

    def __init__(self, length=6):
        self.length = length
        self.max_cycles = length
        self.possible_agents = ["red", "blue"]
        self.views = dict.fromkeys(self.possible_agents, spaces.Box(-99.0, 99.0, (3,)))
        self.choices = dict.fromkeys(self.possible_agents, spaces.Discrete(3))

    def observation_space(self, agent):
        return self.views[agent]

    def action_space(self, agent):
        return self.choices[agent]

    def observe(self, agent):
        return np.array([self.time, self.number, self.last.get(agent, -1)], np.float32)

    def info(self, agent):
        return {}

    def reset(self, seed=None, options=None):
        Small.seeds.append(seed)
        self.random = np.random.default_rng(seed)
        self.number = self.random.integers(50)
        self.time = 0
        self.last = {}
        self.agents = list(self.possible_agents)
        observations = {agent: self.observe(agent) for agent in self.agents}
        infos = {agent: self.info(agent) for agent in self.agents}
        return observations, infos

    def ends(self, agent):
        """Termination, truncation."""
        return False, self.time >= self.length

    def step(self, actions):
        assert set(actions) == set(self.agents)
        for agent, action in actions.items():
            assert self.action_space(agent).contains(action), (agent, action)
            mask = self.info(agent).get("action_mask")
            assert mask is None or mask[action - self.action_space(agent).start]
        Small.actions_seen.append(dict(actions))
        self.time += 1
        self.last = dict(actions)
        terminations = {agent: bool(self.ends(agent)[0]) for agent in self.agents}
        truncations = {agent: bool(self.ends(agent)[1]) for agent in self.agents}
        rewards = {agent: float(actions[agent]) for agent in self.agents}
        observations = {agent: self.observe(agent) for agent in self.agents}
        infos = {agent: self.info(agent) for agent in self.agents}
        self.agents = [a for a in self.agents if not (terminations[a] or truncations[a])]
        return observations, rewards, terminations, truncations, infos


class Mixed(Small):
    """Agents with observations and actions of every kind, two of them with action masks."""

    def __init__(self, length=6):
        super().__init__(length)
        self.possible_agents = ["walker", "flyer", "swimmer", "digger"]
        inner = spaces.Dict({"deep": spaces.Box(-9.0, 9.0, (2, 2)), "count": spaces.Discrete(3)})
        self.views = {
            "walker": spaces.Dict(
                {"observation": spaces.Box(-9.0, 9.0, (2,)), "action_mask": spaces.MultiBinary(4)}
            ),
            "flyer": spaces.MultiBinary(3),
            "swimmer": spaces.Dict({"inner": inner, "flag": spaces.MultiBinary(1)}),
            "digger": spaces.Discrete(5),
        }
        self.choices = {
            "walker": spaces.Discrete(4),
            "flyer": spaces.Discrete(2, start=5),
            "swimmer": spaces.Discrete(3),
            "digger": spaces.Discrete(2, start=-1),
        }

    def mask(self, agent):
        if agent == "walker":
            return np.array([self.time % 2, 1, 0, 1], np.int8)
        return np.array([0, 1, self.time < 3], np.int8)

    def info(self, agent):
        return {"action_mask": self.mask(agent)} if agent == "swimmer" else {}

    def observe(self, agent):
        t = self.time
        if agent == "walker":
            return {"observation": np.array([t, -t], np.float32), "action_mask": self.mask(agent)}
        if agent == "flyer":
            return np.array([t % 2, 1, 0], np.int8)
        if agent == "swimmer":
            deep = np.array([[t, 1], [2, 3]], np.float32)
            return {"flag": np.array([1], np.int8), "inner": {"deep": deep, "count": t % 3}}
        return t % 5


MIXED_AT_1 = [  # flattened: of a Dict the parts by name, of a Discrete a one-hot
    [1, 1, 0, 1, 1, -1, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 1, 1, 2, 3],
    [0, 1, 0, 0, 0, 0, 0, 0],
]


class Leaving(Small):
    """`done` is terminated after two steps, `cut` truncated after four, `last` after `length`."""

    def __init__(self, length=6):
        super().__init__(length)
        self.possible_agents = ["done", "cut", "last"]
        self.views = dict.fromkeys(self.possible_agents, spaces.Box(-99.0, 99.0, (3,)))
        self.choices = dict.fromkeys(self.possible_agents, spaces.Discrete(3))

    def ends(self, agent):
        if agent == "done":
            return self.time == 2, False
        return False, self.time == (4 if agent == "cut" else self.length)


class Won(Small):
    """Terminated after `length` steps, and truncated in the same step."""

    def ends(self, agent):
        return self.time >= self.length, self.time >= self.length


class Endless(Small):
    """Does not say how long an episode lasts at most, and has none."""

    def __init__(self):
        super().__init__()
        del self.max_cycles

    def ends(self, agent):
        return False, False


class Eight(Small):
    def __init__(self, length=6):
        super().__init__(length)
        self.possible_agents = [f"agent_{k}" for k in range(8)]
        self.views = dict.fromkeys(self.possible_agents, spaces.Box(-99.0, 99.0, (3,)))
        self.choices = dict.fromkeys(self.possible_agents, spaces.Discrete(3))


class Broken(Small):
    """Raises where it is told to."""

    def __init__(self, where="nowhere", length=6, after=0):
        super().__init__(length)
        self.where = where
        self.after = after
        self.fail("init")

    def fail(self, where):
        worker = multiprocessing.parent_process() is not None
        if self.where == where or self.where == f"{where} of a worker" and worker:
            self.after -= 1
            if self.after < 0:
                raise RuntimeError(f"the cat\nsat on the {where} key")

    def reset(self, seed=None, options=None):
        self.fail("reset")
        return super().reset(seed, options)

    def step(self, actions):
        self.fail("step")
        return super().step(actions)


class Continuous(Small):
    def action_space(self, agent):
        return spaces.Box(-1.0, 1.0, (2,))


class Images(Small):
    def observation_space(self, agent):
        return spaces.Box(0, 255, (84, 84, 3), np.uint8)


class Graphs(Small):
    def observation_space(self, agent):
        return spaces.Sequence(spaces.Discrete(3))


class Empty(Small):
    def __init__(self):
        super().__init__()
        self.possible_agents = []


class Imitator:
    """A co-player: the highest legal action; counts matches that start."""

    made = []

    def __init__(self):
        self.started = []
        self.shapes = []
        Imitator.made.append(self)

    def start_match(self, which):
        self.started.append(which.clone())

    def __call__(self, observation, action_mask, clock, generator):
        self.shapes.append((observation.shape, action_mask.shape, clock.shape))
        return action_mask.int().cumsum(1).argmax(1)


number = 3  # not an environment


# ------------------------------------------------------------------------------------------------
# Help
# ------------------------------------------------------------------------------------------------
def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs are written elsewhere; this module and the scripts can be imported by workers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def make(script, small):
    """Makes the game of an environment of this module."""

    def made(name, kwargs=None, **options):
        env_kwargs = json.dumps(kwargs or {})
        args = small(env_id=f"{HERE}:{name}", env_kwargs=env_kwargs, **options)
        return script.PettingZooGame(args)

    return made


def environments():
    """This module as PettingZooGame imports it: not the one that pytest runs, perhaps."""
    return __import__(HERE)


def first_actions(game, state):
    return game.action_mask(state).int().argmax(2)


def random_actions(game, state, generator):
    weight = torch.rand(game.action_mask(state).shape, generator=generator)
    return (weight * game.action_mask(state)).argmax(2)


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# ------------------------------------------------------------------------------------------------
# Spaces, masks and actions
# ------------------------------------------------------------------------------------------------
def test_spaces_of_every_kind(make):
    game = make("Mixed")
    assert game.num_players == 4
    assert game.num_actions == 4
    state = game.start(2, generator_of(0))
    state, *_ = game.step(state, random_actions(game, state, generator_of(1)))
    assert game.observe(state).tolist() == [MIXED_AT_1] * 2
    own, others = game.features(state)
    assert own.shape == (2, 4, game.own_size)
    assert others.shape == (2, 4, 3, game.other_size)
    assert own.dtype == others.dtype == torch.float32
    assert torch.isfinite(own).all()
    for i in range(4):
        for slot in range(3):
            j = (i + 1 + slot) % 4
            assert int(game.others[i, slot]) == j
            assert torch.equal(others[:, i, slot], own[:, j, -game.other_size :])
    distinct = own[0, :, -4:]  # agents of different kinds are told apart
    assert torch.equal(distinct, torch.eye(4))
    alike = make("Small").start(1, generator_of(0))
    assert torch.equal(*make("Small").features(alike)[0][0, :, -2:])


def test_masks_and_numbers_of_actions(make):
    """The environment itself asserts that it gets actions of its own spaces, legal ones."""
    game = make("Mixed")
    state = game.start(3, generator_of(0))
    generator = generator_of(1)
    environments().Small.actions_seen.clear()
    played = set()
    for t in range(24):
        step = t % 6
        walker = [step % 2 == 1, True, False, True]
        flyer = [True, True, False, False]
        swimmer = [False, True, step < 3, False]
        assert game.action_mask(state).tolist() == [[walker, flyer, swimmer, flyer]] * 3
        actions = random_actions(game, state, generator)
        state, reward, _, truncated = game.step(state, actions)
        seen = environments().Small.actions_seen[-3:]
        start = torch.tensor([0, 5, 0, -1])
        assert torch.equal(reward, (actions + start).float())
        for b in range(3):
            assert list(seen[b].values()) == (actions[b] + start).tolist()
            played.update(seen[b].items())
        if truncated.all():
            state = game.restart(state, truncated.all(1), generator)
    walker = [("walker", action) for action in (0, 1, 3)]
    flyer = [("flyer", action) for action in (5, 6)]
    swimmer = [("swimmer", action) for action in (1, 2)]
    digger = [("digger", action) for action in (-1, 0)]
    assert played == {*walker, *flyer, *swimmer, *digger}


def test_features_are_scaled_observations(make):
    """sign(x) log(1 + |x|), so that large numbers neither vanish nor dominate."""
    game = make("Small")
    state = game.start(3, generator_of(0))
    actions = torch.tensor([[2, 1], [0, 2], [1, 0]])
    state, *_ = game.step(state, actions)
    own, _ = game.features(state)
    for b, n in itertools.product(range(3), range(2)):
        seen = [1.0, float(state.observation[b, n, 1]), float(actions[b, n])]
        assert game.observe(state)[b, n].tolist() == seen
        view = own[b, n, 8:11].tolist()
        assert view == pytest.approx([math.log1p(number) for number in seen])
    state = game.start(3, generator_of(0))
    own, _ = game.features(state)
    assert own[0, 0, 10] == pytest.approx(-math.log(2.0))  # no last action: -1


@pytest.mark.parametrize("length, steps", [(1, 5), (6, 72)])
def test_scale_of_rewards(script, small, length, steps):
    """1 over the spread of a player's rewards in the first rollout, or over the largest one; a run
    that goes on keeps it, and one that is given is taken."""
    seen = []

    def watch(args, storage, rows, **others):
        reward = torch.stack(storage["reward"])
        seen.append((args.reward_scale, reward.sum(0).std(correction=0), reward.abs().max()))

    kwargs = json.dumps({"length": length})
    options = {"env_id": f"{HERE}:Small", "env_kwargs": kwargs, "num_steps": steps}
    args = small(**options, total_timesteps=8 * steps)
    path = script.train(args, watch)["run"]
    scale, spread, largest = seen[0]
    assert (spread > largest) == (length == 6)
    assert scale == pytest.approx(1.0 / float(spread.maximum(largest)))
    assert seen[1][0] == scale
    words = ["--resume", path, "--total-timesteps", str(12 * steps)]
    script.train(script.parse_arguments(words), watch)
    given = small(**options, total_timesteps=4 * steps, reward_scale=0.3)
    script.train(given, watch)
    assert [one[0] for one in seen] == [scale] * 3 + [0.3]


# ------------------------------------------------------------------------------------------------
# Ends
# ------------------------------------------------------------------------------------------------
def test_players_that_leave(make):
    """One is terminated while others go on, one truncated alone, the last truncated at the end."""
    game = make("Leaving")
    assert game.horizon == 6
    state = game.start(2, generator_of(0))
    full_own, _ = game.features(state)
    for t in range(1, 7):
        actions = torch.full((2, 3), 2).where(game.action_mask(state)[..., 2], 0)
        playing_before = game.alive(state)[0].tolist()
        state, reward, terminated, truncated = game.step(state, actions)
        assert reward[0].tolist() == [2.0 * playing for playing in playing_before]
        assert terminated[0].tolist() == [t >= 2, t > 4, False]
        assert truncated[0].tolist() == [False, t == 4, t == 6]
        alive = [t < 2, t < 4, t < 6]
        assert game.alive(state)[0].tolist() == alive
        for n in range(3):
            legal = game.action_mask(state)[0, n].tolist()
            assert legal == ([True] * 3 if alive[n] else [True, False, False])
        own, others = game.features(state)
        bootstraps = [False, t == 4, t == 6]  # their last observation is that V reads
        for n in range(3):
            visible = alive[n] or bootstraps[n]
            assert own[0, n, 8:].any() == visible
            for i in range(3):
                if i != n:
                    assert others[0, i, (n - i - 1) % 3].any() == visible
        for field in (reward, terminated, truncated, own):
            assert torch.equal(field[0, :, ...], field[1, :, ...]) or field is own
        assert (terminated | truncated).all() == (t == 6)
        assert game.clock(state).tolist() == [[t, 6 - t]] * 2
    state = game.restart(state, torch.tensor([True, False]), generator_of(1))
    assert game.alive(state).tolist() == [[True] * 3, [False] * 3]
    assert game.clock(state).tolist() == [[0, 6], [6, 0]]
    own, _ = game.features(state)
    assert (own[0] != 0).sum() == pytest.approx((full_own[0] != 0).sum(), abs=3)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_restart_leaves_the_other_games_as_they_were(make, steps):
    """Also the step in which a player leaves: its last observation stays away."""
    game = make("Leaving")
    state = game.start(2, generator_of(0))
    for _ in range(steps):
        state, *_ = game.step(state, first_actions(game, state))
    assert state.observation[:, 0].isnan().all()
    assert state.observation[:, 1].isfinite().all()
    after = game.restart(state, torch.tensor([True, False]), generator_of(1))
    assert_same_tensors([field[1] for field in after], [field[1] for field in state])
    assert after.observation[0].isfinite().all() and after.playing[0].all()
    assert after.time.tolist() == [0, steps]


def test_termination_comes_before_truncation(make):
    game = make("Won", {"length": 3})
    state = game.start(1, generator_of(0))
    for t in range(1, 4):
        state, _, terminated, truncated = game.step(state, first_actions(game, state))
        assert terminated.tolist() == [[t == 3] * 2]
        assert not truncated.any()
    assert not game.alive(state).any()


def test_a_shorter_horizon_truncates_who_still_plays(make):
    game = make("Leaving", horizon=3)
    assert game.horizon == 3
    state = game.start(2, generator_of(0))
    for t in range(1, 4):
        state, _, terminated, truncated = game.step(state, first_actions(game, state))
        assert terminated[0].tolist() == [t >= 2, False, False]
        assert truncated[0].tolist() == [False, t == 3, t == 3]
    state = game.restart(state, torch.tensor([True, True]), generator_of(1))
    assert game.alive(state).all()
    state, _, terminated, truncated = game.step(state, first_actions(game, state))
    assert not (terminated | truncated).any()


def test_horizon(script, make):
    assert make("Small", {"length": 11}).horizon == 11  # as the environment says
    assert make("Small", {"length": 11}, horizon=4).horizon == 4
    assert make("Endless", horizon=17).horizon == 17
    with pytest.raises(script.UsageError) as error:
        make("Endless")
    assert_one_line(error, "--horizon", f"{HERE}:Endless")


def test_truncation_bootstraps_and_termination_does_not(script, small):
    """In training: V of the last state for who is truncated, 0 for who left or is terminated."""
    seen = []

    def watch(storage, **others):
        seen.append(storage)

    args = small(env_id=f"{HERE}:Leaving", num_steps=12, total_timesteps=48)
    script.train(args, watch)
    assert len(seen) == 1
    for t in range(12):
        step = {name: values[t] for name, values in seen[0].items()}
        phase = t % 6  # steps done before
        assert step["alive"].tolist() == [[phase < 2, phase < 4, True]] * 4
        assert torch.equal(step["learner"], step["alive"])
        assert step["goes_on"].tolist() == [[phase < 1, phase < 3, phase < 5]] * 4
        bootstraps = [False, phase == 3, phase == 5]
        assert (step["final_value"] != 0).tolist() == [bootstraps] * 4
        assert not step["reward"][~step["alive"]].any()


# ------------------------------------------------------------------------------------------------
# Seeds and workers
# ------------------------------------------------------------------------------------------------
def test_every_episode_has_a_seed_of_the_generator(make):
    seeds = environments().Small.seeds
    game = make("Small", {"length": 2})

    def play(seed):
        seeds.clear()
        generator = generator_of(seed)
        state = game.start(3, generator)
        numbers = [state.observation[:, 0, 1].tolist()]
        for _ in range(8):
            state, _, terminated, truncated = game.step(state, first_actions(game, state))
            ended = (terminated | truncated).all(1)
            if ended.any():
                state = game.restart(state, ended, generator)
                numbers.append(state.observation[:, 0, 1].tolist())
        return list(seeds), numbers

    first = play(5)
    assert len(first[0]) == 15
    assert len(set(first[0])) == 15
    assert play(5) == first
    assert play(6) != first
    assert all(type(seed) is int for seed in first[0])


def trajectory(game, batch=5, steps=20):
    """All tensors of some steps of random play."""
    generator = generator_of(2)
    state = game.start(batch, generator)
    tensors = list(state)
    for _ in range(steps):
        actions = random_actions(game, state, generator)
        state, *results = game.step(state, actions)
        ended = (results[1] | results[2]).all(1)
        tensors += [*state, *results, *game.features(state)]
        state = game.restart(state, ended, generator)
    return tensors


def assert_same_tensors(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-123.0), b.nan_to_num(-123.0))


def children():
    """Processes started by this one that still run, after some time to end."""
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return multiprocessing.active_children()


def test_workers_change_nothing_and_are_shut_down(script, small):
    """A whole run: the same figures and weights bit for bit, and no process left behind."""
    results = []
    for workers in (0, 2):
        name = f"{HERE}:Leaving"
        args = small(env_id=name, env_workers=workers, num_envs=5, total_timesteps=160, seed=3)
        args = script.dataclasses.replace(args, plan_update="offset")
        metrics = script.train(args)
        assert children() == []
        weights = script.load_checkpoint(metrics.pop("run"))["agent"]
        metrics.pop("charts/SPS")
        results.append((metrics, weights))
    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1].values(), results[1][1].values())


def test_a_game_with_workers_can_be_started_again(make):
    """With another number of copies."""
    game = make("Mixed", env_workers=1)
    for batch in (5, 3):
        plain = trajectory(make("Mixed"), batch)
        assert_same_tensors(plain, trajectory(game, batch))
    del game
    assert children() == []


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["init", "reset", "init of a worker", "reset of a worker"])
def test_what_the_environment_raises_is_one_line_that_names_it(script, small, where):
    kwargs = json.dumps({"where": where})
    with pytest.raises(script.UsageError) as error:
        script.train(small(env_id=f"{HERE}:Broken", env_kwargs=kwargs, env_workers="of" in where))
    text = f"the cat sat on the {where.split()[0]} key"
    assert_one_line(error, f"{HERE}:Broken", "RuntimeError", text)
    assert not Path("runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_fails_during_the_run(script, small, workers):
    """One line, a checkpoint, and no process left."""
    kwargs = json.dumps({"where": "step", "after": 150})
    name = f"{HERE}:Broken"
    options = {"num_envs": 1, "num_steps": 100, "total_timesteps": 2000, "env_workers": workers}
    with pytest.raises(script.UsageError) as error:
        script.train(small(env_id=name, env_kwargs=kwargs, **options))
    assert_one_line(error, name, "RuntimeError", "the cat sat on the step key")
    del error  # it holds the run
    gc.collect()
    assert children() == []
    (run,) = Path("runs").iterdir()
    assert script.load_checkpoint(run)["args"]["env_id"] == name


@pytest.mark.parametrize(
    "name, word",
    [
        (f"{HERE}:Continuous", "Discrete"),
        (f"{HERE}:Images", "4096"),
        (f"{HERE}:Graphs", "Graphs"),
        (f"{HERE}:Empty", "Empty: needs agents"),
        (f"{HERE}:nobody", "nobody"),
        (f"{HERE}:number", "number"),
        (f"{HERE}:", HERE),
        ("no_such_module:env", "no_such_module"),
        ("no.such.module", "no.such.module"),
        ("json.decoder", "json.decoder"),
        (":Small", ":Small"),
    ],
)
def test_environments_that_cannot_be_used(script, small, name, word):
    with pytest.raises(script.UsageError) as error:
        script.train(small(env_id=name))
    assert_one_line(error, word)
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["{", "[1]", "3", "null", '"length"', '{"depth": 3}', "length=3"])
def test_bad_arguments_of_the_environment(script, small, text):
    with pytest.raises(script.UsageError) as error:
        script.train(small(env_id=f"{HERE}:Small", env_kwargs=text))
    assert_one_line(error)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"goal": "oracle"}, "oracle"),
        ({"co_players": "ns"}, "ns"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": -3}, "horizon"),
        ({"env_workers": -1}, "workers"),
    ],
)
def test_what_such_an_environment_cannot_do(script, small, options, word):
    with pytest.raises(script.UsageError) as error:
        script.train(small(env_id=f"{HERE}:Small", **options))
    assert_one_line(error, word)
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------
def learn(script, args, parts):
    """Metrics of a run in which each of the `parts` of the agent goes on learning."""
    snapshots = []

    def watch(agent, **others):
        snapshots.append({name: value.clone() for name, value in agent.state_dict().items()})

    metrics = script.train(args, watch)
    first = snapshots[0]
    last = snapshots[-1]
    for part in parts:
        names = [name for name in first if name.startswith(f"{part}.")]
        assert any(not torch.equal(first[name], last[name]) for name in names), part
    for name, value in metrics.items():
        assert name == "run" or math.isfinite(value), name
    return metrics


def test_eight_agents_learn(script, small):
    args = small(env_id=f"{HERE}:Eight", plan_update="offset", co_players="self,random")
    metrics = learn(script, args, ["actor", "critic", "moa", "transition"])
    assert metrics["charts/episodic_length"] == 6
    seats = [name for name in metrics if name.startswith("returns/seat_")]
    assert len(seats) > 4


def test_a_reward_for_an_action_is_learnt(script, small):
    """The return of an episode of 6 steps rises from 6 (random play) towards 12."""
    options = {"num_envs": 16, "num_steps": 24, "total_timesteps": 24 * 16 * 12, "hidden_size": 32}
    args = small(env_id=f"{HERE}:Small", learning_rate=3e-3, **options)
    returns = []

    def watch(metrics, **others):
        returns.append(metrics["charts/episodic_return"])

    script.train(args, watch)
    assert returns[0] == pytest.approx(6.0, abs=1.0)
    assert returns[-1] > 9.0


@pytest.mark.parametrize("plan_update", ["none", "offset", "hop"])
def test_simple_tag(script, small, plan_update):
    kwargs = json.dumps({"max_cycles": 8})
    args = small(env_id="mpe2.simple_tag_v3", env_kwargs=kwargs, plan_update=plan_update)
    parts = ["actor", "critic", "moa"] + ["transition"] * (plan_update != "none")
    metrics = learn(script, args, parts)
    assert metrics["charts/episodic_length"] == 8
    result = script.evaluate(metrics["run"], "self", episodes=3, num_envs=2, match_episodes=2)
    assert len(result["focal_returns"]) == 3
    assert all(math.isfinite(value) for value in result["focal_returns"])


@pytest.mark.only(*SCRIPTS)
def test_any_script_trains_without_a_planner(script, small):
    """What `--plan-update none` leaves: PPO, goals and the MOA."""
    args = small(env_id=f"{HERE}:Leaving", plan_update="none", co_players="self,random")
    metrics = learn(script, args, ["actor", "critic", "moa"])
    assert metrics["charts/episodic_length"] == 6
    run = metrics["run"]
    options = {"episodes": 3, "num_envs": 2, "match_episodes": 2}
    for company in ("self", "random", run):
        assert len(script.evaluate(run, company, **options)["focal_returns"]) == 3
    resumed = script.parse_arguments(["--resume", run, "--total-timesteps", "192"])
    script.train(resumed)
    assert script.load_checkpoint(run)["progress"][0] == 192


@pytest.mark.only("hop_mcts")
def test_a_search_on_top_of_a_plain_run_is_refused(script, small):
    run = script.train(small(env_id=f"{HERE}:Leaving", plan_update="none"))["run"]
    with pytest.raises(script.UsageError) as error:
        script.evaluate(run, "self", episodes=2, plan_update="offset")
    assert_one_line(error, "tree search", "hop_onestep.py")


def test_rock_paper_scissors_with_a_class_of_co_player(script, small):
    """The co-player always plays the last action: paper's best answer earns 1 a step."""
    environments().Imitator.made.clear()
    options = {"num_envs": 8, "num_steps": 30, "total_timesteps": 8 * 30 * 8, "gamma": 0.1}
    kwargs = json.dumps({"max_cycles": 10})
    name = f"{HERE}:Imitator"
    args = small(env_id="pettingzoo.classic.rps_v2", env_kwargs=kwargs, co_players=name, **options)
    returns = []

    def watch(metrics, **others):
        returns.append(metrics["charts/episodic_return"])

    metrics = script.train(script.dataclasses.replace(args, learning_rate=5e-3), watch)
    assert returns[-1] > returns[0] + 2
    assert metrics[f"returns/{name}"] == pytest.approx(-metrics["charts/episodic_return"])
    shapes = environments().Imitator.made[0].shapes
    assert shapes[0] == ((16, 4), (16, 3), (16, 2))
    assert all(shape == shapes[0] for shape in shapes)

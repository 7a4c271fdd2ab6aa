"""PettingZooGame on small environments of this module, on two published ones, and its errors."""

import gc
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from mpe2.simple_spread_v3 import env as in_turns  # noqa: F401
from pettingzoo import ParallelEnv

from conftest import SCRIPTS
from run_tools import assert_equal, generator_of, networks

pytestmark = pytest.mark.only("hop_onestep")

HERE = Path(__file__).stem
BAD = [  # environment, its arguments, other options, a part of the message
    ("Broken", {"where": "init"}, {}, "Broken.*RuntimeError: the cat sat on the init key"),
    ("Broken", {"where": "reset"}, {}, "Broken.*RuntimeError: the cat sat on the reset key"),
    ("Broken", {"where": "init of a worker"}, {"env_workers": 1}, "the cat sat on the init key"),
    ("Small", {"actions": [2]}, {}, "Discrete"),
    ("Small", {"length": None}, {}, "--horizon"),
    ("Small", {"views": [84, 84, 3]}, {}, "4096"),
    ("Small", {"agents": []}, {}, "needs ParallelEnv"),
    ("in_turns", {}, {}, "needs ParallelEnv"),
    ("Small", {}, {"env_kwargs": "length=3"}, "length=3"),
]


class Small(ParallelEnv):
    """Agents that see (time, a number drawn in this episode, own last action); rewards are the
    numbers of the actions; truncated after `length` steps. Subclasses change one thing each."""

    metadata = {"name": "small"}
    seeds = []  # of all episodes of this process

    def __init__(self, length=6, agents=("red", "blue"), views=(3,), actions=None):
        self.length = length
        self.max_cycles = length
        self.possible_agents = list(agents)
        self.views = dict.fromkeys(agents, spaces.Box(-99.0, 99.0, views))
        choice = spaces.Box(0.0, 1.0, actions) if actions else spaces.Discrete(3)
        self.choices = dict.fromkeys(agents, choice)

    def observation_space(self, agent):
        return self.views[agent]

    def action_space(self, agent):
        return self.choices[agent]

    def observe(self, agent):
        return np.array([self.time, self.number, self.last.get(agent, -1)], np.float32)

    def info(self, agent):
        return {}

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.number = np.random.default_rng(seed).integers(50)
        self.time = 0
        self.last = {}
        self.agents = list(self.possible_agents)
        observations = {agent: self.observe(agent) for agent in self.agents}
        return observations, {agent: self.info(agent) for agent in self.agents}

    def ends(self, agent):
        """Termination, truncation."""
        return False, self.time >= self.length

    def step(self, actions):
        assert set(actions) == set(self.agents)
        for agent, action in actions.items():
            assert self.action_space(agent).contains(action), (agent, action)
            mask = self.info(agent).get("action_mask")
            assert mask is None or mask[action - self.action_space(agent).start]
        self.time += 1
        self.last = dict(actions)
        terminations = {agent: self.ends(agent)[0] for agent in self.agents}
        truncations = {agent: self.ends(agent)[1] for agent in self.agents}
        rewards = {agent: float(actions[agent]) for agent in self.agents}
        observations = {agent: self.observe(agent) for agent in self.agents}
        infos = {agent: self.info(agent) for agent in self.agents}
        self.agents = [a for a in self.agents if not (terminations[a] or truncations[a])]
        return observations, rewards, terminations, truncations, infos


class Mixed(Small):
    """Agents with different observations and actions, and a mask in the observation or in infos."""

    def __init__(self):
        super().__init__(agents=["walker", "digger"])
        walker = {"observation": spaces.Box(-9.0, 9.0, (2,)), "action_mask": spaces.MultiBinary(4)}
        self.views = {"walker": spaces.Dict(walker), "digger": spaces.Discrete(5)}
        self.choices = {"walker": spaces.Discrete(4), "digger": spaces.Discrete(3, start=-1)}

    def info(self, agent):
        return {"action_mask": np.array([0, 1, self.time < 3])} if agent == "digger" else {}

    def observe(self, agent):
        if agent == "digger":
            return self.time % 5
        mask = np.array([self.time % 2, 1, 0, 1], np.int8)
        return {"observation": np.array([self.time, -1], np.float32), "action_mask": mask}


class Leaving(Small):
    """`done` is terminated after 2 steps (and truncated: no matter), `cut` truncated after 4."""

    def __init__(self, length=6):
        super().__init__(length, ["done", "cut", "last"])

    def ends(self, agent):
        if agent == "done":
            return self.time == 2, self.time == 2
        return False, self.time == (4 if agent == "cut" else self.length)


class Broken(Small):
    """Raises where it is told to."""

    def __init__(self, where, after=0):
        super().__init__()
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


class Imitator:
    """A co-player: the highest legal action."""

    shapes = []

    def __call__(self, observation, action_mask, clock, generator):
        self.shapes.append((observation.shape, action_mask.shape, clock.shape))
        return action_mask.int().cumsum(1).argmax(1)


@pytest.fixture
def make(script, small):
    """Makes the game of an environment of this module."""

    def made(name, kwargs=None, **options):
        options |= {"env_id": f"{HERE}:{name}", "env_kwargs": json.dumps(kwargs or {})}
        return script.PettingZooGame(small(**options))

    return made


def last_actions(game, state):
    """The highest legal action of each player."""
    return game.action_mask(state).int().cumsum(2).argmax(2)


def test_observations_masks_and_actions(make):
    """The environment itself asserts that it gets actions of its own spaces, legal ones. Views are
    flattened, padded and scaled by sign(x) log(1 + |x|), and kinds of agents told apart."""
    game = make("Mixed")
    assert (game.num_players, game.num_actions) == (2, 4)
    state = game.start(3, generator_of(0))
    for t in range(6):
        walker = [t % 2 == 1, True, False, True]
        digger = [False, True, t < 3, False]
        assert game.action_mask(state).tolist() == [[walker, digger]] * 3
        seen = torch.zeros(2, 6)  # of a Dict the parts by name, of a Discrete a one-hot
        seen[0] = torch.tensor([*walker, t, -1])
        seen[1, t % 5] = 1.0
        assert torch.equal(game.observe(state), seen.expand(3, 2, 6))
        own, others = game.features(state)
        scaled = torch.cat([seen.sign() * (1 + seen.abs()).log(), torch.eye(2)], 1).expand(3, 2, 8)
        torch.testing.assert_close(own[:, :, 8:], scaled)
        torch.testing.assert_close(others[:, :, 0], scaled.flip(1))  # co-players' views
        assert own.shape[2] == game.own_size and others.shape[3] == game.other_size
        state, reward, *_ = game.step(state, last_actions(game, state))
        assert reward.tolist() == [[3.0, float(t < 3)]] * 3  # the digger's actions begin at -1
    game = make("Leaving")
    own, others = game.features(game.start(1, generator_of(0)))
    assert own[0, :, -3:].tolist() == [[1.0, 0.0, 0.0]] * 3  # alike
    for i in range(3):
        assert torch.equal(others[0, i], own[0, [(i + 1) % 3, (i + 2) % 3], 8:])  # cyclic order


@pytest.mark.parametrize("length, steps", [(1, 5), (6, 72)])
def test_scale_of_rewards(script, small, typed, length, steps):
    """1 over the spread of a player's first rewards, or over the largest; kept by `--resume`."""
    seen = []

    def watch(args, storage, **others):
        reward = torch.stack(storage["reward"])
        seen.append((args.reward_scale, reward.sum(0).std(correction=0), reward.abs().max()))

    options = {"env_id": f"{HERE}:Small", "env_kwargs": f'{{"length": {length}}}'}
    options["num_steps"] = steps
    path = script.train(small(**options, total_timesteps=8 * steps), watch)["run"]
    scale, spread, largest = seen[0]
    assert (spread > largest) == (length == 6)
    assert scale == pytest.approx(1.0 / float(spread.maximum(largest)))
    script.train(typed(resume=path, total_timesteps=12 * steps), watch)
    assert [one[0] for one in seen] == [scale] * 3


def test_players_that_leave(make):
    """One is terminated early, one truncated early; a restart leaves another game as it was."""
    game = make("Leaving")
    state = game.start(2, generator_of(0))
    for t in range(1, 7):
        playing = game.alive(state)
        state, reward, terminated, truncated = game.step(state, last_actions(game, state))
        alive = [t < 2, t < 4, t < 6]
        bootstraps = [False, t == 4, t == 6]  # their last observation is what V reads
        assert torch.equal(reward, 2.0 * playing)
        assert terminated.tolist() == [[t >= 2, t > 4, False]] * 2
        assert truncated.tolist() == [bootstraps] * 2
        assert game.alive(state).tolist() == [alive] * 2
        legal = [[True] * 3 if there else [True, False, False] for there in alive]
        assert game.action_mask(state).tolist() == [legal] * 2
        own, others = game.features(state)
        seen = torch.tensor(alive) | torch.tensor(bootstraps)
        assert torch.equal(own[0, :, 8:].any(1), seen)
        assert torch.equal(others[0].any(2), seen[game.others])
        assert game.clock(state).tolist() == [[t, 6 - t]] * 2
    for steps in (2, 3, 4):
        state = game.start(2, generator_of(0))
        for _ in range(steps):
            state, *_ = game.step(state, last_actions(game, state))
        after = game.restart(state, torch.tensor([True, False]), generator_of(1))
        assert_equal([field[1] for field in after], [field[1] for field in state])
        assert game.alive(after)[0].all() and after.observation[0].isfinite().all()
        assert game.clock(after).tolist() == [[0, 6], [steps, 6 - steps]]


def test_horizon(make):
    """Past it, who still plays is truncated."""
    game = make("Leaving", horizon=3)
    state = game.start(1, generator_of(0))
    for t in range(1, 4):
        state, _, terminated, truncated = game.step(state, last_actions(game, state))
        assert terminated[0].tolist() == [t >= 2, False, False]
        assert truncated[0].tolist() == [False, t == 3, t == 3]


def test_truncation_bootstraps_and_termination_does_not(script, small):
    """In training: V of the last state for who is truncated, 0 for who left or is terminated."""
    seen = []
    args = small(env_id=f"{HERE}:Leaving", num_steps=12, total_timesteps=48)
    script.train(args, lambda storage, **others: seen.append(storage))
    for t in range(12):
        step = {name: values[t] for name, values in seen[0].items()}
        phase = t % 6  # steps done before
        assert step["learner"].tolist() == [[phase < 2, phase < 4, True]] * 4
        assert step["goes_on"].tolist() == [[phase < 1, phase < 3, phase < 5]] * 4
        assert (step["final_value"] != 0).tolist() == [[False, phase == 3, phase == 5]] * 4
        assert not step["reward"][~step["learner"]].any()


def test_every_episode_has_a_seed_of_the_generator(make):
    game = make("Small")
    played = []
    for seed in (5, 5, 6):  # a game can be started again
        Small.seeds.clear()
        generator = generator_of(seed)
        states = [game.start(3, generator)]
        for _ in range(4):
            states.append(game.restart(states[-1], torch.ones(3).bool(), generator))
        played.append((list(Small.seeds), [state.observation.tolist() for state in states]))
    assert len(played[0][0]) == len(set(played[0][0])) == 15
    assert played[0] == played[1] != played[2]


def children():
    """Processes started by this one that still run, after some time to end."""
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return multiprocessing.active_children()


def test_workers_change_nothing_and_are_shut_down(script, small):
    """A whole run: the same weights bit for bit, and no process left behind."""
    weights = []
    for workers in (0, 2):
        options = {"env_workers": workers, "num_envs": 5, "total_timesteps": 160}
        path = script.train(small(env_id=f"{HERE}:Leaving", **options))["run"]
        assert children() == []
        weights.append(script.load_checkpoint(path)["agent"])
    assert_equal(*weights)


def test_an_environment_that_fails_during_the_run(script, small):
    """One line, a checkpoint, and no process left."""
    options = {"num_envs": 1, "num_steps": 100, "total_timesteps": 2000, "env_workers": 1}
    options |= {"env_id": f"{HERE}:Broken", "env_kwargs": '{"where": "step", "after": 150}'}
    with pytest.raises(script.UsageError, match=f"{HERE}:Broken.*the cat sat on the step key"):
        script.train(small(**options))
    gc.collect()
    assert children() == []
    (run,) = Path("runs").iterdir()
    assert script.load_checkpoint(run)["args"]["env_id"] == f"{HERE}:Broken"


@pytest.mark.parametrize("name, kwargs, options, message", BAD)
def test_what_cannot_be_used(script, small, name, kwargs, options, message):
    """One line, before anything is written."""
    named = {"env_id": f"{HERE}:{name}", "env_kwargs": json.dumps(kwargs), **options}
    with pytest.raises(script.UsageError, match=f"^.*{message}.*$"):  # `.` is no line break
        script.train(small(**named))
    assert not Path("runs").exists()


@pytest.mark.only(*SCRIPTS)
def test_any_script_trains_on_simple_tag(script, small, typed):
    """Without a planner, which all can: PPO, goals and the MOA; the run is played, and goes on,
    also within a match. A class is among the co-players: it sees a row for each seat."""
    Imitator.shapes.clear()
    options = {"env_id": "mpe2.simple_tag_v3", "env_kwargs": '{"max_cycles": 7}'}
    args = small(**options, plan_update="none", co_players=f"self,random,{HERE}:Imitator")
    weights = []
    metrics = script.train(args, lambda agent, **others: weights.append(networks(agent)))
    assert metrics["charts/episodic_length"] == 7
    assert set(Imitator.shapes) == {((16, 16), (16, 5), (16, 2))}
    for part in ("actor", "critic", "moa"):
        assert not torch.equal(weights[0][part], weights[-1][part])
    run = metrics["run"]
    result = script.evaluate(run, run, episodes=3, num_envs=2, match_episodes=2)
    assert all(math.isfinite(value) for value in result["focal_returns"])
    if script.SCRIPT == "hop_mcts":
        with pytest.raises(script.UsageError, match="tree search.*hop_onestep.py"):
            script.evaluate(run, "self", episodes=2, plan_update="offset")
    script.train(typed(resume=run, total_timesteps=192))
    content = script.load_checkpoint(run)
    assert content["progress"][0] == 192
    now, _, _, ring = content["buffer"]
    steps = torch.arange(now).unsqueeze(1)
    assert torch.equal(steps - ring["episode"][:now], ring["time"][:now])  # the broken one is over
    assert (ring["match"][32] == 32).all() and (ring["match"][31] < 32).all()
    mode = "none" if script.SCRIPT == "hop_mcts" else None
    args = typed(init=run, total_timesteps=200, plan_update=mode)
    assert script.train(args)["charts/episodic_length"] == 7


def test_the_best_answer_is_learnt_in_rock_paper_scissors(script, small):
    """The co-player always plays the last action: what beats it earns 1 a step."""
    options = {"num_envs": 8, "num_steps": 30, "total_timesteps": 8 * 30 * 8, "gamma": 0.1}
    options |= {"env_kwargs": '{"max_cycles": 10}', "learning_rate": 5e-3}
    name = f"{HERE}:Imitator"
    args = small(env_id="pettingzoo.classic.rps_v2", co_players=name, **options)
    curve = []
    script.train(args, lambda metrics, **others: curve.append(metrics))
    own = [metrics["charts/episodic_return"] for metrics in curve]
    assert own[-1] > own[0] + 2
    assert curve[-1][f"returns/{name}"] == pytest.approx(-own[-1])

"""The grid games as PettingZoo environments, for other libraries and to test the scripts.

    python hop_onestep.py --env-id benchmarks.grid_env:parallel_env \\
        --env-kwargs '{"env_id": "msh-4x4-4h1s"}'

    from benchmarks.grid_env import parallel_env
    env = parallel_env("msh-4x4-4h1s", render_mode="rgb_array")

Trained this way a script reads flattened planes in place of relative cells, and not the countdown
that the clock in the infos tells: it learns more slowly than on the same game by its own id.
"""

import operator
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from pettingzoo import ParallelEnv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts

from hop_onestep import STAY, GridGame, GridState, UsageError


class GridParallelEnv(ParallelEnv):
    """One GridGame as a PettingZoo ParallelEnv, its agents `player_0` .. `player_{N-1}`, by seat.

    Observations are {"observation": float32 [C, H, W], "action_mask": int8 [A]}; infos hold
    "action_mask" again and "clock", int64 [2]: steps done, steps left. A player that leaves the
    game is terminated in that step. An illegal action counts as STAY; one for an agent that is not
    in the game is not looked at. `max_cycles` is the horizon, by default the game's. Raises
    UsageError (a ValueError) for an unknown game or render mode, ValueError for a bad seed, a
    missing action or one outside the action space, ResetNeeded before the first `reset`."""

    metadata = {"name": "hop_grid_v0", "render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, env_id="msh-4h1s", render_mode=None, max_cycles: int | None = None):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UsageError(f"unknown render mode {render_mode!r}: rgb_array or None")
        self.env_id = env_id
        self.render_mode = render_mode
        self.game = GridGame(env_id, horizon=max_cycles)
        self.max_cycles = self.game.horizon
        self.game_state = None  # GridState of one game; None before the first reset
        self.generator = torch.Generator()
        self.generator.seed()  # fresh entropy, until reset is given a seed
        self.possible_agents = [f"player_{seat}" for seat in range(self.game.num_players)]
        self.agents = []
        num_actions = self.game.num_actions
        num_planes = self.game.num_players + len(self.game.item_names)
        shape = (num_planes, self.game.height, self.game.width)
        self.state_space = spaces.Box(0.0, 1.0, shape, np.float32)
        mask = spaces.MultiBinary(num_actions)
        view = spaces.Dict({"observation": self.state_space, "action_mask": mask})
        self.observation_spaces = {agent: deepcopy(view) for agent in self.possible_agents}
        self.action_spaces = {agent: spaces.Discrete(num_actions) for agent in self.possible_agents}
        self.observation_space = self.observation_spaces.__getitem__  # of an agent
        self.action_space = self.action_spaces.__getitem__

    def present(self) -> GridState:
        """The state of the game. Raises ResetNeeded."""
        if self.game_state is None:
            raise ResetNeeded("no game has begun: call reset first")
        return self.game_state

    def by_agent(self, values) -> dict:
        """One of `values`, by seat, for each agent that is in the game."""
        return {x: value for x, value in zip(self.possible_agents, values) if x in self.agents}

    def views(self) -> tuple[dict, dict]:
        """Observations and infos of the agents that are in the game."""
        planes = self.game.observe(self.game_state)[0].numpy()  # [N, C, H, W]
        mask = self.game.action_mask(self.game_state)[0].to(torch.int8).numpy()  # [N, A]
        clock = self.game.clock(self.game_state)[0].numpy()  # [2]
        seen = [{"observation": x, "action_mask": y} for x, y in zip(planes, mask)]
        told = [{"action_mask": y.copy(), "clock": clock.copy()} for y in mask]
        return self.by_agent(seen), self.by_agent(told)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Observations and infos of a new game. A `seed` settles this game and those after it."""
        if seed is not None:
            if not 0 <= seed < 2**64:
                raise ValueError(f"a seed lies in 0..2**64 - 1, not {seed}")
            self.generator.manual_seed(operator.index(seed))
        self.game_state = self.game.start(1, self.generator)
        self.agents = self.possible_agents[:]
        return self.views()

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        """Observations, rewards, terminations, truncations and infos of the agents that took part
        in the step; empty ones when the game is over."""
        state = self.present()
        if not self.agents:
            return {}, {}, {}, {}, {}
        played = [STAY] * len(self.possible_agents)
        for agent in self.agents:
            action = actions.get(agent)
            space = self.action_space(agent)
            if not space.contains(action):
                raise ValueError(f"{agent}: action {action!r} is not in {space}")
            played[self.possible_agents.index(agent)] = int(action)
        self.game_state, *outcome = self.game.step(state, torch.tensor([played]))
        rewards, terminations, truncations = (self.by_agent(x[0].tolist()) for x in outcome)
        observations, infos = self.views()
        self.agents = [x for x in self.agents if not (terminations[x] or truncations[x])]
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        """float32 [C, H, W]: a plane for each player, by seat, then one for each kind of item."""
        return self.game.observe(self.present())[0, 0].numpy()  # seat 0's view is in seat order

    def render(self) -> np.ndarray | None:
        """uint8 [H', W', 3], or None without render mode."""
        state = self.present()
        if self.render_mode is None:
            return None
        title = f"{self.env_id}, step {int(state.time[0])}"
        return np.array(self.game.draw(state, title, []))


parallel_env = GridParallelEnv  # the name that PettingZoo's own environments have

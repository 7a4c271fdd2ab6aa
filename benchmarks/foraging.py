"""Level-based foraging (the package lbforaging) as a PettingZoo environment.

    python hop_onestep.py --env-id benchmarks.foraging:parallel_env \\
        --env-kwargs '{"id": "Foraging-5x5-2p-1f-coop-v3"}'

Ids are Foraging-{S}x{S}-{P}p-{F}f[-coop][-2s]-v3: S 5 to 19 rows and columns, P 2 to 9 players,
F 1 to 4 foods; with `-coop` a food takes the levels of the three weakest players together (or of
the two that there are), with `-2s` players see two cells far. An action that is not possible counts
as NONE. Rewards are shares of all food, 1 for the whole.
"""

import gymnasium
import lbforaging  # noqa: F401, registers the ids
from pettingzoo import ParallelEnv


class ForagingParallelEnv(ParallelEnv):
    """A foraging environment as a ParallelEnv, its agents `player_0` .. `player_{N-1}`.

    The package calls every end a termination. Here an episode is terminated when no food is left,
    and truncated at the limit of 50 steps when some is. All agents end together."""

    metadata = {"name": "foraging_v3", "render_modes": [], "is_parallelizable": True}
    render_mode = None

    def __init__(self, id: str = "Foraging-5x5-2p-1f-coop-v3"):
        self.env = gymnasium.make(id, disable_env_checker=True).unwrapped
        self.max_cycles = self.env.spec.kwargs["max_episode_steps"]
        self.possible_agents = [f"player_{seat}" for seat in range(self.env.n_agents)]
        self.agents = []
        self.observation_spaces = self.by_agent(self.env.observation_space)
        self.action_spaces = self.by_agent(self.env.action_space)
        self.observation_space = self.observation_spaces.__getitem__  # of an agent
        self.action_space = self.action_spaces.__getitem__

    def by_agent(self, values) -> dict:
        """One of `values` for each agent, in seat order."""
        return dict(zip(self.possible_agents, values, strict=True))

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        observations, _ = self.env.reset(seed=seed)
        self.agents = self.possible_agents[:]
        return self.by_agent(observations), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        """What PettingZoo's `step` returns; empty dicts when the episode is over."""
        if not self.agents:
            return {}, {}, {}, {}, {}
        joint = [int(actions[agent]) for agent in self.agents]
        observations, rewards, over, _, _ = self.env.step(joint)
        cleared = not self.env.field.any()
        terminations = dict.fromkeys(self.agents, bool(over and cleared))
        truncations = dict.fromkeys(self.agents, bool(over and not cleared))
        infos = {agent: {} for agent in self.agents}
        if over:
            self.agents = []
        rewards = self.by_agent([float(reward) for reward in rewards])
        return self.by_agent(observations), rewards, terminations, truncations, infos


parallel_env = ForagingParallelEnv

"""HOP+ with tree search: opponent modelling with inferred goals in mixed-motive games.

A learner plays among co-players whose goals it infers, one for every seat, from what that seat did
in this *match* (several episodes with the same co-players in the same seats). A model of other
agents (MOA) predicts their actions from the goal, z of a VAE; a tree search on exact steps of the
game scores each own action, and PPO learns around it or imitates it.

    python hop_mcts.py --num-envs 16                         # train on the small stag hunt
    python hop_mcts.py --env-id msg --co-players self        # self-play on the snowdrift game
    python hop_mcts.py --num-simulations 50 --max-depth 10   # search longer, but less deep
    python hop_mcts.py --evaluate runs/NAME --co-players ns  # play with three stag hunters
    python hop_mcts.py --init runs/NAME --co-players nh      # go on learning within one match

One iteration of `train`; what a player thinks is in `Player.act`:

    repeat num_steps times, in B games at once:                          # ROLLOUT
        q_phi(z | h_j), mean z_j, for every seat j                       # goals, from the match
        K trees, each with its own z_j^k ~ q_phi; num_simulations times in each:   # planner
            from the root down by PUCT with the prior pi_theta, to an action not yet tried
            step(s, a_i, a_-i), a_j ~ pi_hat(. | o_j, t, z_j^k) drawn once a node  # MOA
            r + gamma (r' + .. gamma V) back up the path
        Q(a_i) = mean over k of the root's Q(a_i)
        a_i ~ exp(log pi_theta(. | o_i, z_-i) + beta Q)                  # hop: exp(beta Q) alone
        h_j <- h_j + (o_j, a_j);  o, r <- step(a)
    MOA: -log pi_hat(a_j | o_j, t, z_j) + alpha KL(q_phi || N(0, I)) + subgoal, on whole matches
    PPO: clipped loss on the policy that acted, V towards lambda-returns
         (hop: pi_theta towards exp(beta Q) by cross-entropy, V towards E Q and the soft return)
    beta = plan_beta times how right Q has been, the slope of (return - V) on it, in 0..1; --init: 1

A co-player is `self`; a scripted name (msh: ns, nh, random; msg: cleaner, exploiter, random; each
also with -noisy; elsewhere: random); a checkpoint or its run's folder, or a folder of runs, for all
of them; or `package.module:name`, a callable or class `(observation [R, ..], action_mask [R, A],
clock [R, 2], generator) -> actions [R]`, R = B * N rows, one for each seat of each game, those that
it does not play included. Its `start_match(which [R] bool)`, if any, is called as matches start.

Papers: HOP (Huang et al., ICML 2024, arXiv 2406.08002), OMG (Yu et al., NeurIPS 2024), PPO
(1707.06347), GAE (1506.02438), SAC (1801.01290). Shapes in comments: B games, N players/seats, A
actions, X own and Y co-players' features, Z goal, E + 1 memory, K samples, M items, T steps of a
rollout, C steps in the buffer, L steps of a match, R rows, D decisions; tables: S + 1 cells, the
last is none, F features of a pair of cells."""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from glob import glob
from math import ceil, inf, isfinite, nan
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Generator, Tensor, arange, cat, nn, no_grad, stack, tensor, where, zeros_like
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem


@dataclasses.dataclass
class Args:
    # run
    exp_name: str = SCRIPT  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of everything random
    torch_deterministic: bool = True  # use torch's deterministic algorithms
    cuda: bool = False  # run on the GPU
    compile: bool = False  # compile the PPO loss with torch.compile
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "hop-plus"  # W&B project
    wandb_entity: str | None = None  # W&B team
    capture_video: bool = False  # at the end, write episode.gif: a match's last episode, beliefs
    checkpoint_every: int = 50  # write checkpoint.pt every so many iterations, and every minute
    resume: str | None = None  # run to go on with, bit for bit; schedules follow the new length
    init: str | None = None  # run whose weights and options to start from, with fresh optimisers
    profile: bool = False  # profile three iterations: a table by label, and trace.json
    evaluate: str | None = None  # run to play instead of training
    eval_episodes: int = 200  # episodes of --evaluate
    # game and co-players
    env_id: str = "msh-4x4-4h1s"  # msh[-HxW][-Np][-KhMs], msg[-HxW][-Np][-Dd], package.module[:f]
    env_kwargs: str = "{}"  # arguments of a PettingZoo environment, as JSON
    env_workers: int = 0  # processes that step PettingZoo environments; 0: this one
    horizon: int | None = None  # most steps of an episode (default: by game)
    co_players: str | None = None  # co-player, or a comma list to draw from (default: by game)
    match_episodes: int = 10  # episodes of a match: the same co-players in the same seats
    snapshot_every: int = 0  # iterations after which the learner as it is joins the co-players
    prosocial: float = 0.0  # share of all players' mean reward in the learner's, beside its own
    # PPO
    total_timesteps: int = 500_000  # game steps of the run, over all parallel games
    num_envs: int = 64  # parallel games
    num_steps: int = 32  # steps in each game an iteration
    learning_rate: float = 1e-3  # of policy and value (Adam)
    anneal: bool = True  # let PPO's learning rate and entropy bonus fall linearly over the run
    gamma: float | None = None  # discount (default: by game)
    gae_lambda: float = 0.95  # lambda of the advantage estimates
    update_epochs: int = 4  # passes over each rollout
    num_minibatches: int = 4  # minibatches a pass
    clip_coef: float = 0.2  # PPO's clipping
    ent_coef: float = 0.02  # entropy bonus at the start; annealed to a tenth
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient clipping
    hidden_size: int = 64  # width of all networks
    reward_scale: float | None = None  # factor on rewards in learning (default: by game)
    # goals and MOA
    goal: Literal["inferred", "none", "oracle"] = "inferred"  # from play, zero, scripts' truth
    goal_size: int = 8  # dimensions of a goal
    moa_alpha: float = 0.01  # weight of KL(q(z|h) || N(0, I)) a step
    moa_learning_rate: float = 3e-3  # of the MOA (Adam)
    moa_updates: int = 4  # minibatches for the MOA an iteration
    moa_capacity: int = 200_000  # game steps that the match buffer holds, at least 512 a game
    moa_buffer: Literal["all", "positive"] = "all"  # learn from all episodes, or rewarded ones
    load_moa: str | None = None  # run from which the MOA is taken
    freeze_moa: bool = False  # do not train the MOA
    pretrain_moa_steps: int = 0  # first game steps of the run, which train the goal model alone
    # planner
    plan_update: Literal["offset", "hop", "none"] | None = None  # in the logits, alone, or none
    plan_beta: float | None = None  # weight of the scores, in scaled returns
    plan_until: float | None = None  # share of the run after which plain PPO goes on alone
    # ours: the search
    num_simulations: int = 16  # simulations in each tree
    num_goal_samples: int = 4  # K, trees a decision, each with its own draw of the goals
    puct_c: float = 1.25  # weight of the prior against Q, which is scaled to 0..1
    max_depth: int = 50  # steps that the search looks ahead


FROM_0_TO_1 = "gamma gae_lambda prosocial plan_until inter_om_alpha".split()  # in any script
FROM_0 = "seed env_workers pretrain_moa_steps snapshot_every".split()  # whole, can be 0


class UsageError(ValueError):
    """What the user asked for cannot be done; `main` prints it as one line, with status 2."""


@contextlib.contextmanager
def refused(what):
    """Turns whatever the user's files and code raise inside into a UsageError of one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{what}: {text[:200]}{text[400:] and '..'}{text[200:][-200:]}") from error


def imported(name):
    """What `package.module:attribute` names, modules of the working directory included."""
    sys.path.append(os.getcwd())
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def checked(args, game):
    """`args` with the game's defaults in place of None. Raises UsageError for what cannot be."""
    missing = {name: v for name, v in game.defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **missing)
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = int(type(value) is int and name not in FROM_0)
            high = 1 if name in FROM_0_TO_1 else 8192 if name.endswith("_size") else 10**9
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be {low} to {high}, not {value}")
    loaded = args.load_moa or args.init
    short = args.total_timesteps < args.num_envs * args.num_steps
    problems = {
        "--total-timesteps is less than --num-envs * --num-steps": short,
        "--env-kwargs is for PettingZoo": game.simulates and args.env_kwargs != "{}",
        "--goal oracle is for msh and msg": args.goal == "oracle" and not game.simulates,
        "--freeze-moa needs --load-moa or --init": args.freeze_moa and not loaded,
        "--pretrain-moa-steps needs goals": args.pretrain_moa_steps and args.goal != "inferred",
    }
    for message, wrong in problems.items():
        if wrong:
            raise UsageError(message)
    return args


# ---- Games ---------------------------------------------------------------------------------------
def clock_features(game, state):
    """float32 [B, N, 8]: functions of the steps done and left of an episode. No step begins with
    0 left, so V is never trained there: at the time limit it is read as with 1 left."""
    done, left = game.clock(state).T
    left = left.clamp(min=1)
    functions = [done / game.horizon, left / game.horizon, (-left / 8).exp(), left <= 5]
    functions += [left == 1, left == 2, left == 3, done + left < game.horizon]
    clock = stack([function.float() for function in functions], 1)
    return clock[:, None].expand(-1, game.num_players, -1)


def replaced(state, fresh, ended):
    """`state` with the games of bool [B] `ended` as in `fresh`."""
    return state._make(
        where(ended.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in zip(state, fresh)
    )


def co_player_seats(num_players):
    """int64 [N, N-1]: the co-players of each seat, in cyclic order."""
    seats = arange(num_players)
    return (seats[:, None] + seats[1:]) % num_players


STAY = 4  # the moves are UP, DOWN, LEFT, RIGHT, STAY; interactions follow: STAG, HARE or REMOVE
COUNTDOWN = 5  # steps that Markov Stag-Hunt goes on after the first successful hunt
NOISE = 0.2  # probability of a uniform legal action instead, in the `-noisy` kinds
NEVER = 9999  # the distance of what is gone
SCRIPTED = {  # rank of (stags, hares) or (drifts,): 1 is sought first, 0 not; -1: walks about
    "msh": {"ns": (1, 2), "nh": (0, 1), "random": (0, 0)},
    "msg": {"cleaner": (1,), "exploiter": (-1,), "random": (0,)},
}
RULES = {  # items and how many; for each, players that it takes, and what they split; bonus to all
    "msh": ({"stag": 1, "hare": 4}, [2, 1], [10.0, 1.0], 0.0),
    "msg": ({"drift": 6}, [1], [-4.0], 6.0),
}
DEFAULTS = {  # of the options that are None, by measurements (benchmarks/hop_onestep.md)
    "msh": dict(horizon=35, gamma=0.99, plan_update="hop", plan_beta=25.0, plan_until=0.4),
    "msg": dict(horizon=50, gamma=0.85, plan_update="offset", plan_beta=20.0, plan_until=1.0),
    "other": dict(gamma=0.95, plan_update="offset", plan_beta=5.0, plan_until=1.0),  # ours: plans
}
NUMBER = "[1-9][0-9]?"
GRID_ID = re.compile(
    f"ms[hg](-(?P<height>{NUMBER})x(?P<width>{NUMBER}))?(-(?P<players>{NUMBER})p)?"
    f"(-(?P<hare>0|{NUMBER})h(?P<stag>{NUMBER})s|-(?P<drift>{NUMBER})d)?"
)


class GridState(NamedTuple):
    """B parallel games; int64. Everything that changes while a game is played, nothing else."""

    players: Tensor  # [B, N] cell row * W + col; -1 once the player has left
    items: Tensor  # [B, M] cell, stags before hares; -1 once gone
    time: Tensor  # [B] steps done
    first_hunt: Tensor  # [B] step number of the first successful hunt; 0 before it, and in msg


class GridGame:
    """Markov Stag-Hunt (`msh`) or Markov Snowdrift (`msg`) of HOP (Huang et al. 2024), as pure
    batched functions. Ids are `msh[-HxW][-Np][-KhMs]` (K hares, M stags; `msh` is
    `msh-8x8-4p-4h1s`) and `msg[-HxW][-Np][-Dd]` (D drifts; `msg` is `msg-8x8-4p-6d`). Players act
    at once; an action is read against the state before the step. UsageError for any other id."""

    simulates = True  # `step` works from any state
    state_type = GridState

    def __init__(self, env_id, device="cpu", horizon=None):
        match = GRID_ID.fullmatch(env_id)
        self.family = env_id[:3]
        if match is None or match["drift" if self.family == "msh" else "hare"]:
            ids = "msh[-HxW][-Np][-KhMs], msg[-HxW][-Np][-Dd]"
            raise UsageError(f"unknown game {env_id!r}: ids are {ids}, or package.module[:name]")
        self.height = int(match["height"] or 8)
        self.width = int(match["width"] or 8)
        self.num_players = int(match["players"] or 4)
        self.horizon = horizon or DEFAULTS[self.family]["horizon"]
        items, quota, share, self.bonus = RULES[self.family]
        self.item_names = [*items]
        self.item_counts = [int(match[name] or count) for name, count in items.items()]
        if self.family == "msh":
            stags = min(self.item_counts[0], self.num_players // 2)
            best = 10 * stags + min(self.item_counts[1], self.num_players - 2 * stags)
        else:
            best = self.item_counts[0] * (6 * self.num_players - 4)
        self.best_return = best / self.num_players  # highest mean return a player, undiscounted
        self.num_items = sum(self.item_counts)
        self.num_cells = self.height * self.width
        if not self.num_items <= self.num_cells <= 1024:
            raise UsageError(f"bad game {env_id!r}: at most 1024 cells, and one for each item")
        self.device = torch.device(device)
        with self.device:
            self.make_tables(tensor(quota), tensor(share))

    def make_tables(self, quota, share):
        """What rules and features look up, and the rest of the interface. Tables by cell have a
        last row, reached by index -1, for who has left and what is gone."""
        width = self.width
        kinds = len(quota)
        self.num_actions = 5 + kinds
        self.others = co_player_seats(self.num_players)  # [N, N-1]
        self.item_kind = arange(kinds).repeat_interleave(tensor(self.item_counts))  # [M]
        self.item_action = 5 + self.item_kind  # [M] the action that takes it
        self.quota = quota[self.item_kind]  # [M]
        self.share = share[self.item_kind]  # [M]
        self.kinds = SCRIPTED[self.family]
        self.rank = tensor([*self.kinds.values(), [0] * kinds])  # last: who is not scripted
        noisy = [f"{kind}-noisy" for kind in self.kinds if kind != "random"]
        self.defaults = {
            **DEFAULTS[self.family],
            "co_players": ",".join(["self", *self.kinds, *noisy]),
            "reward_scale": 3.0 / (self.best_return or 1.0),
            "horizon": self.horizon,
        }
        cell = arange(self.num_cells)
        row = cell // width
        col = cell % width
        inside = [row > 0, row < self.height - 1, col > 0, col < width - 1, row >= 0]
        self.legal_moves = F.pad(stack(inside, 1), (0, 0, 0, 1))  # bool [S + 1, 5]
        self.legal_moves[-1, STAY] = True
        change = self.legal_moves * tensor([-width, width, -1, 1, 0])  # illegal moves are STAY
        start = F.pad(cell, (0, 1), value=-1)[:, None]
        self.next_cell = start + F.pad(change, (0, kinds))  # int64 [S + 1, A]
        down = (row - row[:, None]).float()  # [own, other], as all functions of the way there
        right = (col - col[:, None]).float()
        distance = down.abs() + right.abs()
        near = (-distance / 1.5).exp()
        far = (-distance / 4.0).exp()
        functions = [distance >= 0, distance == 0, distance == 1, distance == 2]
        functions += [down == 0, right == 0, near, far]
        for part in (down, right, down.abs(), right.abs(), distance):
            functions.append(part / max(self.height, width))
        for way in (down < 0, down > 0, right < 0, right > 0):
            functions += [way * near, way * far]
        relative = stack([function.float() for function in functions], 2)
        self.relative = F.pad(relative, (0, 0, 0, 1, 0, 1))  # [S + 1, S + 1, F]; gone: zero
        self.distance = F.pad(distance, (0, 1, 0, 1), value=NEVER)  # [S + 1, S + 1]
        self.subgoal_size = len(functions)  # F
        self.own_size = 13 + kinds * self.subgoal_size  # X
        self.other_size = (1 + kinds) * self.subgoal_size  # Y
        self.oracle_size = len(self.rank) + 2 + self.subgoal_size

    def start(self, batch, generator):
        """`batch` new games: players on any cells, items on distinct cells, all uniform."""
        players = uniform((batch, self.num_players), generator) * self.num_cells
        order = uniform((batch, self.num_cells), generator).argsort(1)
        time = zeros_like(order[:, 0])
        return GridState(players.long(), order[:, : self.num_items], time, time)

    def restart(self, state, ended, generator):
        """`state` with the games of bool [B] `ended` begun anew."""
        return replaced(state, self.start(len(ended), generator), ended)

    def on_item(self, state):
        """bool [B, N, M]: the player stands on the item."""
        items = state.items.masked_fill(state.items < 0, NEVER)
        return state.players[:, :, None] == items[:, None]

    def step(self, state, actions):
        """Next state, reward float32 [B, N], terminated and truncated bool [B, N] for `actions`
        int64 [B, N]. Draws and resets nothing; illegal actions count as STAY."""
        hits = self.on_item(state) & (actions[:, :, None] == self.item_action)  # [B, N, M]
        takers = hits.sum(1, True)  # [B, 1, M]
        taken = takers >= self.quota
        wins = hits & taken
        reward = (wins * self.share / takers.clamp(min=1) + taken * self.bonus).sum(2)
        items = state.items.masked_fill(taken[:, 0], -1)
        players = self.next_cell[state.players, actions]
        time = state.time + 1
        first_hunt = state.first_hunt
        over = (items < 0).all(1)  # [B]
        if self.family == "msh":
            players = players.masked_fill(wins.any(2), -1)
            first_hunt = where((first_hunt == 0) & taken[:, 0].any(1), time, first_hunt)
            over |= (players < 0).all(1) | (first_hunt > 0) & (time >= first_hunt + COUNTDOWN)
        terminated = over[:, None] | (players < 0)
        truncated = (time >= self.horizon)[:, None] & ~terminated
        return GridState(players, items, time, first_hunt), reward, terminated, truncated

    def alive(self, state):
        """bool [B, N]: the player has not left."""
        return state.players >= 0

    def clock(self, state):
        """int64 [B, 2]: steps done, steps left until the game must end (countdown included)."""
        end = where(state.first_hunt > 0, state.first_hunt + COUNTDOWN, self.horizon)
        return stack([state.time, end.clamp(max=self.horizon) - state.time], 1)

    def action_mask(self, state):
        """bool [B, N, A]: legal actions; STAY alone for a player that has left."""
        kinds = self.on_item(state).split(self.item_counts, 2)
        return cat([self.legal_moves[state.players], *(kind.any(2, True) for kind in kinds)], 2)

    def idle(self, mask):
        """int64 [..]: what an illegal action counts as, for bool `mask` [.., A]."""
        return mask[..., STAY] * STAY

    def observe(self, state):
        """float32 [B, N, planes, H, W]: own plane, players i+1, i+2, .. mod N, kinds of items."""
        cells = cat([state.players, state.items], 1) + 1  # 0: gone
        planes = F.one_hot(cells, self.num_cells + 1)[:, :, 1:].float()
        planes = planes.unflatten(2, (self.height, self.width))  # [B, N + M, H, W]
        players, *kinds = planes.split([self.num_players, *self.item_counts], 1)
        kinds = [kind.sum(1, True) for kind in kinds]
        return stack([cat([players.roll(-i, 1), *kinds], 1) for i in range(self.num_players)], 1)

    def features(self, state):
        """Own features [B, N, X] (clock, legal moves, items) and co-players' [B, N, N-1, Y] (where
        they are, and items from there). Who has left, what is gone, adds zero."""
        cells = state.players[:, :, None]
        kinds = self.relative[cells, state.items[:, None]].split(self.item_counts, 2)
        seen = cat([kind.sum(2) for kind in kinds], 2)
        own = cat([clock_features(self, state), self.legal_moves[state.players], seen], 2)
        near = self.relative[cells, state.players[:, self.others]]
        return own, cat([near, seen[:, self.others]], 3)

    def reached(self, state, actions, after):
        """int64 [B, N]: the subgoal, an item, that each player reached in this step; else -1."""
        hits = self.on_item(state) & (actions[:, :, None] == self.item_action)
        wins = hits & (after.items < 0)[:, None]
        return where(wins.any(2), wins.int().argmax(2), -1)

    def subgoals(self, state):
        """What players can go for, the items: features [B, N, M, F], and bool [B, N, M] there."""
        relative = self.relative[state.players[:, :, None], state.items[:, None]]
        return relative, (state.items >= 0)[:, None].expand(relative.shape[:3])

    def scripted_actions(self, state, mask, kind, noisy, target, generator):
        """Actions [B, N] and targets [B, N] (item, -1 none) of scripted players at every seat.
        `kind` int64 [B, N] indexes `kinds` (past its end: acts at random), `noisy` bool [B, N];
        `target` is the last one, kept while there. Nearest: by Manhattan distance, ties uniform."""
        rank = self.rank[kind]  # [B, N, kinds of items]
        walks = (rank < 0).any(2)
        acts_at_random = (rank == 0).all(2) | (state.players < 0)
        rank = rank[:, :, self.item_kind]  # [B, N, M]
        distance = self.distance[state.players[:, :, None], state.items[:, None]]
        cost = NEVER * rank + distance + 0.5 * uniform(distance.shape, generator)
        cost = cost.masked_fill((rank <= 0) | (state.items < 0)[:, None], inf)
        least, nearest = cost.min(2)
        kept = (target >= 0) & (state.items.gather(1, target.clamp(min=0)) >= 0)
        target = where(kept, target, where(least.isfinite(), nearest, -1))
        item = target.clamp(min=0)
        goal = state.items.gather(1, item)[:, :, None]  # [B, N, 1] cell
        actions = arange(self.num_actions, device=self.device)
        reach = self.distance[self.next_cell[state.players], goal]  # [B, N, A]
        closer = reach < reach[..., STAY, None]
        take = (state.players[:, :, None] == goal) & (self.item_action[item][:, :, None] == actions)
        allowed = (closer | take) & (target >= 0)[:, :, None]
        allowed[..., STAY] |= ~allowed.any(2)
        allowed = where(walks[:, :, None], mask & (actions <= STAY), allowed)
        noise = noisy & (uniform(kind.shape, generator) < NOISE)
        allowed = where((noise | acts_at_random)[:, :, None], mask, allowed)
        return random_actions(allowed, generator), target

    def oracle(self, state, kind, noisy, target):
        """float32 [B, N, ..]: the truth about scripted players: kind, noise, place of target."""
        item = state.items.gather(1, target.clamp(min=0)).masked_fill(target < 0, -1)
        flags = stack([noisy, item >= 0], 2)
        return cat([F.one_hot(kind, len(self.rank)), flags, self.relative[state.players, item]], 2)

    def draw(self, state, title, beliefs):
        """Picture uint8 [.., .., 3] of the first game, with a line from each player to each item,
        as wide as it is likely to be its next: `beliefs`, a list of lists [N, M], or empty."""
        canvas = FigureCanvasAgg(Figure())
        axes = canvas.figure.add_subplot(xlim=(-1, self.width), ylim=(self.height, -1), title=title)
        cells = cat([state.players[0], state.items[0]])
        y = cells // self.width
        x = cells % self.width + arange(len(cells)) % 4 * 0.2  # who shares a cell: side by side
        names = [*range(self.num_players), *(self.item_names[kind] for kind in self.item_kind)]
        for k in (cells >= 0).nonzero()[:, 0].flip(0).tolist():  # items below players
            colour = f"C{k}" if k < self.num_players else "grey"
            axes.text(x[k], y[k], names[k], color="white", backgroundcolor=colour, ha="center")
            for m, belief in enumerate(beliefs[k] if k < len(beliefs) else ()):
                ends = [k, self.num_players + m]
                axes.plot(x[ends], y[ends], colour, linewidth=5 * belief)
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


class ParallelState(NamedTuple):
    """What B copies of a PettingZoo environment, which lie in the game, returned last."""

    observation: Tensor  # float32 [B, N, O] flattened and padded; NaN where a player has none
    mask: Tensor  # bool [B, N, A] legal actions; the first alone for a player that is not there
    playing: Tensor  # bool [B, N] the player is there
    time: Tensor  # int64 [B] steps done


class Copies:
    """Copies of a PettingZoo environment in one process, stepped one after another. What they
    return lies in `seen` [copies, N, O + A + 4]: observation (flattened, padded; NaN for who has
    none), legal actions, who plays, reward, termination, truncation."""

    def __init__(self, make, kwargs, count):
        self.envs = [imported(make)(**kwargs) for _ in range(count)]
        env = self.envs[0]
        self.agents = list(env.possible_agents)
        self.views = [env.observation_space(agent) for agent in self.agents]
        self.actions = [env.action_space(agent) for agent in self.agents]
        size = max(map(spaces.flatdim, self.views), default=9999)
        discrete = all(isinstance(space, spaces.Discrete) for space in self.actions)
        if size > 4096 or not discrete or hasattr(env, "agent_iter"):
            raise UsageError(f"{make}: needs ParallelEnv, Discrete actions, <= 4096 numbers seen")
        self.sizes = [size, max(int(space.n) for space in self.actions), 4]
        self.seen = np.zeros((count, len(self.agents), sum(self.sizes)), np.float32)

    def read(self, k, observations, infos, *outcome):
        """Takes in what copy `k` returned."""
        size = self.sizes[0]
        self.seen[k] = 0.0
        for n, agent in enumerate(self.agents):
            row = self.seen[k, n]
            playing = agent in self.envs[k].agents
            row[:size] = nan
            row[-4:] = [playing, *(part.get(agent, 0) for part in outcome)]
            if agent in observations:
                view = observations[agent]
                told = {**infos.get(agent, {}), **(view if isinstance(view, dict) else {})}
                legal = told.get("action_mask", True)
                flat = spaces.flatten(self.views[n], view)
                row[:size] = np.pad(flat, (0, size - len(flat)))
                row[size : size + self.actions[n].n] = np.multiply(legal, playing)
            row[size] += not row[size:-4].any()  # nobody has no legal action

    def reset(self, which, seeds):
        """Begins copies of bool `which` anew; returns `seen`."""
        for k in which.nonzero()[0]:
            self.read(k, *self.envs[k].reset(seed=int(seeds[k])), {}, {}, {})
        return self.seen

    def step(self, actions):
        """Plays int64 [copies, N]; returns `seen`."""
        for k, env in enumerate(self.envs):
            seats = zip(self.agents, self.actions, actions[k])
            chosen = {agent: space.start + x for agent, space, x in seats if agent in env.agents}
            observations, *outcome, infos = env.step(chosen)
            self.read(k, observations, infos, *outcome)
        return self.seen

    def render(self):
        """Picture uint8 [.., .., 3] of the first copy."""
        return np.array(self.envs[0].render())


BaseManager.register("Copies", Copies)  # for other processes


class PettingZooGame:
    """Any PettingZoo ParallelEnv with Discrete actions: B copies, here or in worker processes.

    Observations are flattened, padded to one size and scaled by sign(x) log(1 + |x|); kinds of
    agents (by their spaces) are told apart by a one-hot. Co-players' observations count as seen.
    Raises UsageError, also for what the environment raises."""

    simulates = False
    state_type = ParallelState
    num_items = 0
    item_kind = []
    item_counts = [0]
    subgoal_size = 1
    kinds = ["random"]

    def __init__(self, args, device="cpu"):
        self.name = args.env_id
        self.make = self.name if ":" in self.name else f"{self.name}:parallel_env"
        self.device = torch.device(device)
        self.workers = args.env_workers
        with refused(f"cannot make {self.name} with {args.env_kwargs}"):
            self.kwargs = json.loads(args.env_kwargs)
            copies = Copies(self.make, self.kwargs, 1)
            self.horizon = args.horizon or getattr(copies.envs[0].unwrapped, "max_cycles", None)
        if not self.horizon:
            raise UsageError(f"--horizon: {self.name} does not tell how long an episode can last")
        self.num_players = len(copies.agents)
        self.sizes = copies.sizes
        size, self.num_actions, _ = copies.sizes
        self.others = co_player_seats(self.num_players).to(device)  # [N, N-1]
        looks = [str(look) for look in zip(copies.views, copies.actions)]
        kind = tensor([looks.index(look) for look in looks], device=device)
        self.kind = F.one_hot(kind, self.num_players).float()  # [N, N] first agent alike
        self.other_size = size + self.num_players
        self.own_size = 8 + self.other_size
        self.defaults = {**DEFAULTS["other"], "horizon": self.horizon, "co_players": "self"}

    def start(self, batch, generator):
        """Makes `batch` copies and begins an episode in each."""
        self.parts = []  # Copies, or proxies of those in other processes
        for part in np.array_split(range(batch), min(self.workers, batch) or 1):
            copies = Copies
            if self.workers:
                manager = BaseManager(ctx=multiprocessing.get_context("spawn"))
                manager.start()
                copies = manager.Copies
            with refused(f"cannot make {self.name}"):
                self.parts.append(copies(self.make, self.kwargs, len(part)))
        self.pool = ThreadPoolExecutor(len(self.parts))
        return self.reset(torch.ones(batch, device=self.device).bool(), generator)

    def everywhere(self, method, *arguments):
        """Calls a method of all Copies, side by side; parts [B, N, O], [B, N, A], [B, N, 4]."""
        arrays = [np.array_split(argument.cpu().numpy(), len(self.parts)) for argument in arguments]
        with refused(f"{self.name} failed"):
            seen = self.pool.map(lambda part, *a: getattr(part, method)(*a), self.parts, *arrays)
            return tensor(np.concatenate([*seen]), device=self.device).split(self.sizes, 2)

    def reset(self, which, generator):
        """Begins the games of bool [B] `which` anew, seeded from `generator`; all states."""
        seeds = (uniform(which.shape, generator) * 2**31).long()
        observation, mask, outcome = self.everywhere("reset", which, seeds)
        return ParallelState(observation, mask.bool(), outcome[:, :, 0].bool(), 0 * seeds)

    def restart(self, state, ended, generator):
        """`state` with the games of bool [B] `ended` begun anew."""
        return replaced(state, self.reset(ended, generator), ended)

    def step(self, state, actions):
        """Steps all copies, which must be in `state`; as GridGame.step. Leaving without a flag is
        termination; past the horizon who plays is truncated."""
        observation, mask, outcome = self.everywhere("step", actions)
        playing, _, terminated, truncated = outcome.bool().unbind(2)
        time = state.time + 1
        late = (time >= self.horizon)[:, None] & playing
        truncated = (truncated | late) & ~terminated & state.playing
        terminated = (terminated | ~playing) & ~truncated
        observation = observation.masked_fill(terminated[:, :, None], nan)
        after = ParallelState(observation, mask.bool(), ~terminated & ~truncated, time)
        return after, outcome[:, :, 1] * state.playing, terminated, truncated

    def alive(self, state):
        return state.playing

    def clock(self, state):
        """int64 [B, 2]: steps done, steps left at most."""
        return stack([state.time, self.horizon - state.time], 1)

    def action_mask(self, state):
        return state.mask

    def idle(self, mask):
        """int64 [..]: what an illegal action counts as: the first legal one of `mask` [.., A]."""
        return mask.int().argmax(-1)

    def observe(self, state):
        """float32 [B, N, O]: observations as they are given, flattened, padded with 0."""
        return state.observation.nan_to_num(0.0)

    def features(self, state):
        """Own features [B, N, X] (clock, view) and co-players' views [B, N, N-1, Y]: scaled
        observation, kind of agent. A player that is not there has zeros."""
        present = ~state.observation[..., :1].isnan()
        view = state.observation.nan_to_num(0.0)
        view = cat([view.sign() * view.abs().log1p(), self.kind * present], 2)
        return cat([clock_features(self, state), view], 2), view[:, self.others]

    def reached(self, state, actions, after):
        """int64 [B, N]: no subgoal, -1."""
        return zeros_like(actions) - 1

    def subgoals(self, state):
        """Nothing that a player can go for is known: [B, N, 0, 1] and [B, N, 0]."""
        nothing = state.mask[:, :, :0]
        return nothing[..., None].float(), nothing

    def scripted_actions(self, state, mask, kind, noisy, target, generator):
        """Uniform legal actions [B, N], and the targets as they were."""
        return random_actions(mask, generator), target

    def draw(self, state, title, beliefs):
        """Picture uint8 [.., .., 3] of the first copy."""
        return self.parts[0].render()


def make_game(args, device):
    """The game that `--env-id` names. Raises UsageError."""
    if "." in args.env_id or ":" in args.env_id:
        return PettingZooGame(args, device)
    return GridGame(args.env_id, device, args.horizon)


# ---- Co-players ----------------------------------------------------------------------------------
def runs_in(entry):
    """The runs in a folder of runs, or the entry itself."""
    paths = glob("*/checkpoint.pt", root_dir=entry) if entry else []
    return sorted(f"{Path(entry, path).parent}" for path in paths) or [entry]


class CoPlayers:
    """Who sits where in B parallel matches, and what all seats play. `pool` lists co-players
    (module docstring); a match draws from it: half of the matches one kind at all N-1 seats, half
    seat by seat. With `fixed`, `pool` has N-1 entries and each plays in every match. Seats are
    dealt at random at each match. Kind 0 is `self`, the learner: who makes this sets `agents[0]`
    (without one its seats play any legal action). Raises UsageError."""

    def __init__(self, game, pool, batch, match_episodes, generator, fixed=False):
        self.game = game
        self.match_episodes = match_episodes
        self.generator = generator
        self.fixed = fixed
        if fixed and len(pool) != game.num_players - 1:
            raise UsageError(f"{game.num_players - 1} co-players are wanted, not {len(pool)}")
        entries = list(dict.fromkeys(["self", *pool]))
        self.names = []  # by kind
        self.callables = {}  # by number of the kind
        self.agents = {}  # Players by number of the kind
        with game.device:
            pool = tensor([entries.index(entry) for entry in pool]).long()
        self.script = pool[:0]  # by kind: index in game.kinds (past its end: not scripted)
        self.noisy = self.script.bool()  # by kind
        self.pool = pool[:0]
        for entry in entries:
            self.join(entry, batch)
        self.pool = pool
        self.kind = torch.zeros(batch, game.num_players, device=game.device).long()  # [B, N]
        self.target = self.kind - 1  # [B, N] item that a scripted player walks to
        self.focal = self.kind[:, 0]  # [B] a seat of the learner
        self.episode = self.focal  # [B] number within the match
        self.start_matches(self.episode == 0)

    def join(self, entry, batch):
        """Adds a co-player to the pool, for coming matches, as the next kind."""
        kinds = self.game.kinds
        name = str(entry)
        script = name.removesuffix("-noisy")
        k = len(self.names)
        if k and script not in kinds:
            if os.path.exists(name):
                self.agents[k] = load_player(name, self.game, batch)
            else:
                with refused(f"{name[:100]!r} is no co-player, checkpoint or package.module:name"):
                    player = imported(entry) if isinstance(entry, str) else entry
                    self.callables[k] = player() if isinstance(player, type) else deepcopy(player)
        self.names.append(getattr(entry, "__name__", name))
        self.pool = F.pad(self.pool, (0, 1), value=k)
        self.script = F.pad(self.script, (0, 1), value=[*kinds, script].index(script))
        self.noisy = F.pad(self.noisy, (0, 1), value=name != script)

    def start_matches(self, which):
        """Deals seats and kinds anew in the games of bool [B] `which`."""
        batch, n = self.kind.shape
        seat = uniform((batch, n), self.generator).argsort(1)
        kinds = self.pool.expand(batch, -1)
        if not self.fixed:
            each = (uniform((batch, n - 1), self.generator) * len(self.pool)).long()
            alike = uniform((batch, 1), self.generator) < 0.5
            kinds = self.pool[where(alike, each[:, :1], each)]
        kind = zeros_like(seat).scatter(1, seat[:, 1:], kinds)
        self.focal = where(which, seat[:, 0], self.focal)
        self.kind = where(which[:, None], kind, self.kind)
        self.episode = self.episode.masked_fill(which, 0)
        for k, player in self.callables.items():
            if hasattr(player, "start_match"):
                with refused(f"co-player {self.names[k]!r} failed"):
                    player.start_match((which[:, None] & (self.kind == k)).flatten())

    def scripted(self):
        """[B, N] each: index in `game.kinds` (past its end: not scripted), noise, target."""
        return self.script[self.kind], self.noisy[self.kind], self.target

    def act(self, state, mask):
        """Actions int64 [B, N] of all seats, which agents remember. Raises UsageError."""
        game = self.game
        actions = game.idle(mask)
        if (self.script < len(game.kinds)).any():
            actions, self.target = game.scripted_actions(
                state, mask, *self.scripted(), self.generator
            )
        for k, agent in self.agents.items():
            seats = self.kind == k
            actions = where(seats, agent.act(state, mask, seats, self)["action"], actions)
        for k, player in self.callables.items():
            observation = game.observe(state).flatten(0, 1)
            clock = game.clock(state).repeat_interleave(game.num_players, 0)
            with refused(f"co-player {self.names[k]!r} failed"):
                chosen = player(observation, mask.flatten(0, 1).clone(), clock, self.generator)
                chosen = chosen.to(actions.device).view(actions.shape)
                chosen = where(pick(mask, chosen), chosen, game.idle(mask))
            actions = where(self.kind == k, chosen, actions)
        for agent in self.agents.values():
            agent.remember(actions)
        return actions

    def advance(self, ended):
        """Takes in which games `ended`, bool [B]; returns in which a match ended, and one began."""
        self.target = self.target.masked_fill(ended[:, None], -1)
        self.episode = self.episode + ended
        match_ended = self.episode >= self.match_episodes
        for agent in self.agents.values():
            agent.forget(ended, match_ended)
        if match_ended.any():
            self.start_matches(match_ended)
        return match_ended


# ---- Networks ------------------------------------------------------------------------------------
def layer(inputs, outputs, gain=2.0**0.5):
    """A linear layer with orthogonal weights of the given gain and zero bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class PlayerNetwork(nn.Module):
    """out(relu(hidden(relu(own(x) + goal(g) + mix(sum over co-players of relu(other(y_j)))))))."""

    def __init__(self, own, other, goal, outputs, hidden, gain=0.01):
        super().__init__()
        self.own = layer(own, hidden)
        self.other = layer(other, hidden // 2)
        self.mix = layer(hidden // 2, hidden)
        self.goal = layer(goal, hidden)
        self.hidden = layer(hidden, hidden)
        self.out = layer(hidden, outputs, gain)

    def forward(self, own, others, goal):
        """[.., outputs]; own [.., X], others [.., N-1, Y], goal [.., Z]; leading axes broadcast."""
        others = self.mix(F.relu(self.other(others)).sum(-2))
        return self.out(F.relu(self.hidden(F.relu(self.own(own) + others + self.goal(goal)))))


def masked(logits, mask):
    """`logits` [.., A] with -1e9 where bool `mask` [.., A] is False."""
    return logits.masked_fill(~mask, -1e9)


def pick(values, index):
    """[..]: `values` [.., A] at int64 `index` [..]."""
    return values.gather(-1, index[..., None])[..., 0]


def uniform(shape, generator):
    """float32 `shape`: uniform in [0, 1)."""
    return torch.rand(shape, generator=generator, device=generator.device)


def sample(logits, generator):
    """int64 [..]: draws from softmax(`logits` [.., A]) (Gumbel-max)."""
    noise = uniform(logits.shape, generator).clamp(min=1e-20)
    return (logits - (-noise.log()).log()).argmax(-1)


def random_actions(mask, generator):
    """int64 [..]: uniform over the legal actions of bool `mask` [.., A]."""
    return sample(masked(mask * 1.0, mask), generator)


# ---- Goal model and MOA --------------------------------------------------------------------------
class MOA(nn.Module):
    """Model of other agents: encoder q_phi(z_j | h_j), decoder pi_hat(a_j | o_j, t, z_j), and the
    subgoal's decoder. The encoder reads a *memory* [.., 2, E + 1]: sums over the match, and over
    the episode, of a feature of each (o_j, a_j), the last entry counting them; so it grows by
    steps. The subgoal of j is what it reaches next in the episode: an item, or none (OMG, Yu et al.
    2024); on games that know no subgoals there is no such term."""

    memory_steps = 40  # that a memory counts for at most, so that a long match is like a short one

    def __init__(self, game, args):
        super().__init__()
        hidden = args.hidden_size
        sizes = (game.own_size, game.other_size)
        self.goal_size = game.oracle_size if args.goal == "oracle" else args.goal_size
        self.item_kind = game.item_kind  # [M]
        queries = 1 + len(game.item_counts) * game.subgoal_size
        self.memory_size = hidden + 1  # E + 1
        self.step_feature = layer(sum(sizes) + game.num_actions, hidden, 1.0)
        self.encoder = PlayerNetwork(*sizes, 4 * hidden + 2, 2 * args.goal_size, hidden, 0.1)
        self.decoder = PlayerNetwork(*sizes, self.goal_size, game.num_actions, hidden)
        self.subgoal = PlayerNetwork(*sizes, self.goal_size, queries, hidden)

    def step_features(self, own, views, actions, active):
        """[.., E + 1]: what one step adds to the memory; 0 where bool `active` [..] is False."""
        seen = cat([own, views.sum(-2), F.one_hot(actions, self.decoder.out.out_features)], -1)
        feature = self.step_feature(seen).tanh()
        return F.pad(feature, (0, 1), value=1.0) * active[..., None]

    def subgoal_logits(self, own, views, goal, features, present):
        """[.., M + 1]: logits of what is reached next, from candidates' features [.., M, F] and
        bool [.., M] whether they are there (else -1e9); the last is none."""
        query = self.subgoal(own, views, goal)
        by_kind = query[..., 1:].unflatten(-1, (-1, features.shape[-1]))
        scores = (by_kind[..., self.item_kind, :] * features).sum(-1)
        return cat([masked(scores, present), query[..., :1]], -1)

    def encode(self, memory, own, views):
        """Mean and log standard deviation [.., Z] of q_phi(z | h), by memory and features now."""
        memory = memory * (self.memory_steps / memory[..., -1:].clamp(min=self.memory_steps))
        sums, count = memory.split([memory.shape[-1] - 1, 1], -1)
        scaled = [sums / (1.0 + count), sums / (10.0 + 0.2 * count), count.log1p() / 4.0]
        mean, log_std = self.encoder(own, views, cat(scaled, -1).flatten(-2)).chunk(2, -1)
        return mean, log_std.clamp(-6.0, 2.0)


MOA_MATCHES = 8  # matches in a minibatch of the MOA, each seen whole
MOA_ROWS = 4096  # steps of players in them that it predicts
SUBGOAL_COEF = 0.1  # weight of the subgoal's reconstruction


def moa_loss(agent, batch, pretraining, generator):
    """Loss -log pi_hat + alpha KL(q || N(0, I)) + SUBGOAL_COEF * reconstruction on what a
    MatchBuffer read, and its terms. `pretraining` is without -log pi_hat if subgoals are known."""
    moa = agent.moa
    args = agent.args
    index = batch["weight"].flatten().nonzero()[:, 0]
    index = index[uniform(index.shape, generator).argsort()[:MOA_ROWS]]
    rows = {name: value.flatten(0, 2)[index] for name, value in batch.items()}  # [R, ..]
    seen = (rows["own"], rows["views"])
    goal = rows.get("goals", seen[0].new_zeros(len(index), moa.goal_size))
    kl = tensor(0.0)
    if args.goal == "inferred":
        step = moa.step_features(*map(batch.get, "own views action active".split()))
        before = step.cumsum(1) - step  # [.., L, N, E + 1] sums strictly before each step
        within = before - before.take_along_dim(batch["first"][..., None], 1)
        mean, log_std = moa.encode(stack([before, within], 3).flatten(0, 2)[index], *seen)
        goal = gaussian(mean, log_std, generator)
        kl = (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1).mean() / 2
    nll = F.cross_entropy(masked(moa.decoder(*seen, goal), rows["mask"]), rows["action"])
    logits = moa.subgoal_logits(*seen, goal, rows["features"], rows["present"])
    subgoal = rows["subgoal"] % logits.shape[1]  # -1: none, the last
    recon = (F.cross_entropy(logits, subgoal, reduction="none") * rows["ended"]).mean()
    loss = args.moa_alpha * kl + SUBGOAL_COEF * recon
    if not (pretraining and len(moa.item_kind)):
        loss += nll
    return loss, {"moa/nll": nll, "moa/kl": kl, "moa/recon": recon}


# ---- Match buffer --------------------------------------------------------------------------------
HISTORY = 512  # steps of a match that are read at most
STORED = "action alive reward reached goals".split()  # of a step, beside the state


class MatchBuffer:
    """The last C steps of B games, as one ring. Every step knows when its match and its episode
    began, in steps since the run began. `--moa-buffer positive` learns from a player's episodes
    with reward > 0 alone (as HOP does); the others still serve as history."""

    def __init__(self, game, args):
        self.game = game
        self.positive = args.moa_buffer == "positive"
        self.stored = STORED if args.goal == "oracle" else STORED[:-1]
        self.size = max(args.moa_capacity // args.num_envs, HISTORY)  # C
        self.ring = {}  # by name [C, B, ..]
        self.now = 0  # steps ever added
        self.match_start = arange(args.num_envs, device=game.device) * 0  # [B]
        self.episode_start = self.match_start  # [B]

    def add(self, state, step, ended, match_ended):
        """Adds a `step` from `state`, by name [B, N, ..], and bool [B] what ended with it."""
        values = {name: step[name] for name in self.stored}
        starts = {"match": self.match_start, "episode": self.episode_start}
        for name, value in (state._asdict() | values | starts).items():
            if name not in self.ring:
                self.ring[name] = value.new_zeros(self.size, *value.shape)
            self.ring[name][self.now % self.size] = value
        self.now += 1
        self.episode_start = self.episode_start.masked_fill(ended, self.now)
        self.match_start = self.match_start.masked_fill(match_ended, self.now)

    def sample(self, count, generator):
        """`count` matches or parts of them, with replacement, each as often as it is long."""
        oldest = max(0, self.now - self.size)
        time, game = uniform((2, count), generator)
        time = oldest + (time * (self.now - oldest)).long()
        game = (game * len(self.match_start)).long()
        start = self.ring["match"][time % self.size, game]
        return self.read(game, start.maximum(time - HISTORY + 1).clamp(min=oldest))

    def read(self, number, start):
        """Of matches in the games int64 [R] `number`, L <= HISTORY steps from step [R] `start`:
        tensors [R, L, N, ..] by name."""
        steps = start[:, None] + arange(HISTORY, device=start.device)
        match = self.ring["match"][steps % self.size, number[:, None]]
        inside = (match == match[:, :1]) & (steps < self.now)  # [R, HISTORY]
        length = int(inside.sum(1).max())
        steps = steps[:, :length]
        inside = inside[:, :length, None]
        part = {k: ring[steps % self.size, number[:, None]] for k, ring in self.ring.items()}
        active = part["alive"] & inside
        episode = part["episode"][:, :, None].expand_as(active)
        first = (episode - start[:, None, None]).clamp(0, length - 1)  # of the same episode
        reached = part["reached"].masked_fill(~inside, -1)
        coming = where(reached >= 0, arange(length, device=start.device)[:, None], length - 1)
        coming = coming.flip(1).cummin(1).values.flip(1)
        same = episode.gather(1, coming) == episode
        ended = episode < self.episode_start[number][:, None, None]
        if length == HISTORY:  # what the last episode of a match that is cut reaches is not seen
            ended = ended & (episode != episode[:, -1:])
        weight = active
        if self.positive:
            earned = zeros_like(part["reward"]).scatter_add(1, first, part["reward"] * inside)
            weight = active & (earned.gather(1, first) > 0)
        game = self.game
        state = game.state_type._make(part[k].flatten(0, 1) for k in game.state_type._fields)
        seen = [*game.features(state), game.action_mask(state), *game.subgoals(state)]
        names = "own views mask features present".split()
        return {
            **{name: value.unflatten(0, inside.shape[:2]) for name, value in zip(names, seen)},
            **{name: part[name] for name in self.stored},
            "active": active,  # bool: the step is within the match, the player in the game
            "first": first,  # int64: the first step of the same episode
            "ended": ended,  # bool: the subgoal is known
            "subgoal": where(same, reached.gather(1, coming), -1),  # int64; -1: none
            "weight": weight,  # bool: the step is learnt from
        }


# ---- Agent and planner ---------------------------------------------------------------------------
class Agent(nn.Module):
    """The learned player: its networks."""

    def __init__(self, game, args):
        super().__init__()
        self.game = game
        self.args = args
        self.moa = MOA(game, args)
        goal = self.moa.goal_size
        other = game.other_size + goal
        actions = game.num_actions
        self.actor = PlayerNetwork(game.own_size, other, goal, actions, args.hidden_size)
        self.critic = PlayerNetwork(game.own_size, other, goal, 1, args.hidden_size, 1.0)
        self.exact = True  # ours: no transition network; it learns nothing but the MOA
        if args.plan_update != "none" and not game.simulates:
            others = "hop_onestep.py, hop_ppo_gumbel.py and latent_world_model.py need no simulator"
            raise UsageError(f"tree search is for msh and msg: add --plan-update none; {others}")
        self.register_buffer("plan_slope", tensor(0.0))  # running, of (return - V) on Q_plan
        self.plan_mode = args.plan_update  # "none" after --plan-until
        self.to(game.device)

    def inputs(self, views, goals):
        """What policy and value read beside own features: the co-players' with their goals
        [B, N, N-1, Y + Z], and the sum of these goals [B, N, Z]."""
        theirs = goals[:, self.game.others]
        return cat([views, theirs], -1), theirs.sum(-2)


class Player:
    """An agent that plays B games, with the MOA's memory of the running matches."""

    def __init__(self, agent, batch):
        self.agent = agent
        shape = (batch, agent.game.num_players, 2, agent.moa.memory_size)
        self.memory = torch.zeros(shape, device=agent.game.device)

    def infer(self, state, co_players):
        """Features, own [B, N, X] and co-players' [B, N, N-1, Y]; of every seat the goal [B, N, Z]
        and its log-spread (discrete: its shares), as MOA.encode has them."""
        agent = self.agent
        own, views = agent.game.features(state)
        if agent.args.goal == "inferred":
            return own, views, *agent.moa.encode(self.memory, own, views)
        goals = own.new_zeros(*own.shape[:2], agent.moa.goal_size)
        if agent.args.goal == "oracle":
            goals = agent.game.oracle(state, *co_players.scripted())
        return own, views, goals, zeros_like(goals) - 30.0

    def value(self, state, co_players):
        """V [B, N] of every seat."""
        own, views, goals, _ = self.infer(state, co_players)
        return self.agent.critic(own, *self.agent.inputs(views, goals))[..., 0]

    def act(self, state, mask, seats, co_players):
        """What every seat sees, thinks and does, by name; what counts is that of the learner's
        `seats`, bool [B, N]."""
        agent = self.agent
        alive = agent.game.alive(state)
        with record_function("goal inference"):
            seen = self.infer(state, co_players)
            own, views, goals, _ = seen
        with record_function("policy and value"):
            others, goal = agent.inputs(views, goals)
            value = agent.critic(own, others, goal)[..., 0]
            prior = masked(agent.actor(own, others, goal), mask).log_softmax(-1)
        q_plan = zeros_like(prior)
        offset = q_plan
        if agent.plan_mode != "none":
            with record_function("planner"):
                chosen = (seats & alive).nonzero(as_tuple=True)  # games and seats of D decisions
                q_plan[chosen] = scores(agent, state, seen, chosen, co_players.generator)
                mean = (q_plan * mask).sum(-1, True) / mask.sum(-1, True)
                slope = agent.plan_slope.clamp(0.0, 1.0)
                offset = agent.args.plan_beta * slope * (q_plan - mean) * mask
        logits = offset if agent.plan_mode == "hop" else prior + offset
        policy = masked(logits, mask).log_softmax(-1)
        action = sample(policy, co_players.generator)
        self.decision = {
            "action": action,  # int64 [B, N]
            "log_prob": pick(policy, action),  # [B, N] under the policy that acts
            "value": value,  # [B, N] of returns times reward_scale
            "own": own,  # [B, N, X]
            "views": views,  # [B, N, N-1, Y] co-players' features
            "others": others,  # [B, N, N-1, Y + Z] these and their goals
            "goals": goals,  # [B, N, Z] of every seat
            "goal": goal,  # [B, N, Z] sum of the co-players'
            "mask": mask,  # bool [B, N, A]
            "alive": alive,  # bool [B, N]
            "q_plan": q_plan,  # [B, N, A]; 0 where the planner did not run
            "expected": (policy.exp() * q_plan).sum(-1),  # [B, N] of the policy that acts
            "offset": offset,  # [B, N, A] the planner in the logits
            "prior": prior,  # [B, N, A] log pi_theta
        }
        return self.decision

    def remember(self, actions):
        """Adds the step of the last decision, in which `actions` [B, N] were played."""
        if self.agent.args.goal == "inferred":
            own, views, alive = map(self.decision.get, "own views alive".split())
            step = self.agent.moa.step_features(own, views, actions, alive)
            self.memory = self.memory + step[:, :, None]

    def forget(self, ended, match_ended):
        """Empties the memory of episodes and of matches that ended, bool [B]."""
        over = stack([match_ended, ended], 1)
        self.memory = self.memory.masked_fill(over[:, None, :, None], 0.0)


def gaussian(mean, log_std, generator):
    """float32 [..]: draws by reparametrisation."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + log_std.exp() * noise


# ours: tree search in place of one step
class Tree(NamedTuple):
    """T trees that grow in lock step, as parallel arrays over V = (S + 1) * T nodes: node s * T + t
    is made in tree t by simulation s, and 0..T-1 are the roots."""

    visits: Tensor  # [V, A] how often each action was tried
    total: Tensor  # [V, A] sum of the returns that followed
    prior: Tensor  # [V, A] pi_theta; -1: illegal; all 0 where no path has ended yet
    value: Tensor  # [V] V; 0 once the player has left or the game has terminated
    reward: Tensor  # [V] on the way into the node
    left: Tensor  # int64 [V] steps that may follow
    choice: Tensor  # int64 [V] the action to try next
    follow: Tensor  # int64 [V] the node that it leads to; -1: paths end here
    child: Tensor  # int64 [V, A] the node that each action leads to; -1: none yet


def puct(visits, total, prior, value, root, constant):
    """int64 [R]: what to try next at R nodes (Silver et al. 2017), by Q + c pi sqrt(N) / (1 + n). Q
    is scaled to 0..1 over a node; an action not tried counts as the mean of the node. At a `root`,
    bool [R], every legal action comes once first."""
    count = visits.sum(1, True)
    tried = visits > 0
    mean = (value[:, None] + total.sum(1, True)) / (1.0 + count)
    q = where(tried, total / visits, mean)
    low, high = q.aminmax(dim=1, keepdim=True)
    score = (q - low) / (high - low).clamp(min=1e-8)
    score += constant * prior * count.sqrt() / (1.0 + visits)
    untried = root[:, None] & ~tried & (prior >= 0)
    score = score.masked_fill(untried.any(1, True) & ~untried, -1e8)
    return score.masked_fill(prior < 0, -1e9).argmax(1)


def simulate(tree, roots):
    """Paths of choices from the `roots` [T] down, by levels of nodes [P]; the last node of each."""
    path = []
    leaf = roots.clone()
    nodes = roots
    while len(nodes):
        path.append(nodes)
        leaf[nodes % len(roots)] = nodes
        nodes = tree.follow[nodes]
        nodes = nodes[nodes >= 0]
    return path, leaf


def expand(tree, model, leaf, new):
    """Makes the nodes `new`, a slice of T, by the actions chosen at the nodes `leaf` [T]. Where a
    path ends for the first time, the prior is asked for, and its best action chosen."""
    fresh = leaf[tree.prior[leaf].amax(1) == 0]
    if len(fresh):
        tree.prior[fresh] = model.expand(fresh)
        tree.choice[fresh] = tree.prior[fresh].argmax(1)
    action = tree.choice[leaf]
    tree.reward[new], tree.value[new], goes_on = model.step(leaf, action, new)
    tree.left[new] = goes_on * (tree.left[leaf] - 1)
    tree.child[leaf, action] = arange(new.start, new.stop, device=leaf.device)


def backup(tree, path, new, gamma, constant):
    """Adds the discounted return of every path to the actions on it, and chooses anew there."""
    nodes = cat(path)
    edges = (nodes, tree.choice[nodes])
    rewards = tree.reward[tree.child[edges]].split([*map(len, path)])
    future = tree.value[new].clone()  # [T]
    returns = []
    for level, reward in zip(path[::-1], rewards[::-1]):
        trees = level % len(future)
        returns.append(reward + gamma * future[trees])
        future[trees] = returns[-1]
    tree.total[edges] += cat(returns[::-1])
    tree.visits[edges] += 1.0
    choice = puct(*(x.index_select(0, nodes) for x in tree[:4]), nodes < len(future), constant)
    child = tree.child[nodes, choice]
    tree.choice[nodes] = choice
    tree.follow[nodes] = where((child >= 0) & (tree.left[child] > 0), child, -1)


def search(model, value, args):
    """Q [T, A] of the roots' actions (not tried: the root's mean) and visits [T, A], from V `value`
    [T] of the roots. Of `model`, num_actions, `expand` and `step` are used, as Model has them."""
    count = len(value)
    size = (args.num_simulations + 1) * count
    roots = arange(count, device=value.device)
    numbers = roots.new_zeros(size)  # [V]
    tree = Tree(
        *value.new_zeros(3, size, model.num_actions),
        *value.new_zeros(2, size),
        *stack([numbers + args.max_depth, numbers, numbers - 1]),  # left, choice, follow
        numbers.new_full((size, model.num_actions), -1),
    )
    tree.value[:count] = value
    for start in range(count, size, count or 1):  # with no decision, no simulation
        new = slice(start, start + count)
        path, leaf = simulate(tree, roots)
        expand(tree, model, leaf, new)
        backup(tree, path, new, args.gamma, args.puct_c)
    visits, total = (x[:count] for x in tree[:2])
    mean = (value + total.sum(1)) / (1.0 + args.num_simulations)
    return where(visits > 0, total / visits, mean[:, None]), visits


def row_sums(rows, table):
    """[R, n, H]: sums of the rows int64 [R, n, ..] of a `table` [.., H]."""
    return F.embedding_bag(rows.flatten(0, 1), table, mode="sum").unflatten(0, rows.shape[:2])


class CellNetwork:
    """A PlayerNetwork for the seats `who`, a slice of W, of T trees, which knows the `goal`
    [T, W, Z] and `theirs` [T, W, N-1, ..]. What its first layers see of cells is tabulated by pair
    of cells, for kinds of items and then for players, so that a state costs sums of rows."""

    def __init__(self, network, game, who, goal, theirs):
        sizes = [game.subgoal_size] * len(game.item_counts)
        clock, walls, *items = network.own.weight.T.split([8, 5, *sizes])
        sizes += [sizes[0], theirs.shape[3]]
        near, *seen, weight = network.other.weight.T.split(sizes)
        pairs = game.relative.flatten(0, 1)  # [(S + 1)^2, F]
        self.own = cat([pairs @ item for item in items])
        self.other = cat([*(pairs @ item for item in seen), pairs @ near + network.other.bias])
        self.walls = game.legal_moves.type_as(walls) @ walls + network.own.bias
        self.clock = clock  # [8, H]
        self.goal = network.goal(goal)  # [T, W, H]
        self.theirs = theirs @ weight  # [T, W, N-1, H / 2]
        self.network = network
        self.who = who
        self.others = game.others[who]  # [W, N-1]

    def __call__(self, clock, players, rows, trees):
        """[R, W, outputs] from what Model.look saw of R nodes, in these `trees`."""
        n = players.shape[1]
        items = row_sums(rows[:, :, n:], self.other)  # [R, N, H / 2] what every player sees of them
        near = rows[:, self.who, :n].gather(2, self.others.expand(len(rows), -1, -1))
        seen = F.embedding(near, self.other) + items[:, self.others] + self.theirs[trees]
        first = row_sums(rows[:, self.who, n:], self.own) + self.walls[players[:, self.who]]
        first += (clock @ self.clock)[:, None] + self.goal[trees]
        first += self.network.mix(F.relu(seen).sum(2))
        return self.network.out(F.relu(self.network.hidden(F.relu(first))))


class Model:
    """What T trees search: exact steps of the game, co-players that the MOA plays by the `drawn`
    goals [T, N, Z], pi_theta and V of the player at seat 0, which know the mean `goals` [T, N, Z],
    as in play. Uniform `draws` [V, N] decide what co-players do at a node."""

    def __init__(self, agent, state, goals, drawn, draws):
        self.args = agent.args
        self.game = agent.game
        self.num_actions = self.game.num_actions
        self.draws = draws
        copies = self.args.num_simulations + 1
        self.state = state._make(cat([x] * copies) for x in state)  # [V]
        self.joint = zeros_like(self.state.players)  # [V, N] co-players' actions
        theirs = goals[:, None, 1:]  # [T, 1, N-1, Z]
        me = (self.game, slice(0, 1), theirs.sum(2), theirs)
        self.policy = CellNetwork(agent.actor, *me)
        self.value = CellNetwork(agent.critic, *me)
        co_players = (self.game, slice(1, None), drawn[:, 1:], theirs[..., :0])  # its own z alone
        self.moa = CellNetwork(agent.moa.decoder, *co_players)
        kind = F.pad(self.game.item_kind, (goals.shape[1], 0), value=len(self.game.item_counts))
        self.begins = kind * len(self.game.relative) ** 2  # [N + M] where a kind's rows begin

    def look(self, state):
        """Clock [R, 8], cells of players [R, N] (S: gone), rows of the tables [R, N, N + M]."""
        size = len(self.game.relative)
        players = state.players % size
        cells = cat([players, state.items % size], 1)
        rows = players[:, :, None] * size + (cells + self.begins)[:, None]
        return clock_features(self.game, state)[:, 0], players, rows

    def expand(self, nodes):
        """Prior [R, A] at `nodes` [R], where the co-players choose what they do."""
        trees = nodes % len(self.moa.goal)
        state = self.state._make(x.index_select(0, nodes) for x in self.state)
        mask = self.game.action_mask(state)
        seen = self.look(state)
        logits = masked(self.policy(*seen, trees)[:, 0], mask[:, 0])
        upto = masked(self.moa(*seen, trees), mask[:, 1:]).softmax(2).cumsum(2)
        draw = self.draws.index_select(0, nodes)[:, 1:, None] * upto[..., -1:]
        self.joint[nodes, 1:] = (upto > draw).int().argmax(2)
        return logits.softmax(1).masked_fill(~mask[:, 0], -1.0)

    def step(self, nodes, actions, new):
        """Makes the nodes `new`: reward [T] on the way, V [T], bool [T] the player plays on."""
        joint = self.joint.index_select(0, nodes)
        joint[:, 0] = actions
        state = self.state._make(x.index_select(0, nodes) for x in self.state)
        after, reward, terminated, truncated = self.game.step(state, joint)
        reward = self.args.reward_scale * reward.lerp(reward.mean(1, True), self.args.prosocial)
        for whole, part in zip(self.state, after):
            whole[new] = part
        value = self.value(*self.look(after), slice(None))[:, 0, 0]
        return reward[:, 0], value * ~terminated[:, 0], ~(terminated | truncated)[:, 0]


def scores(agent, state, seen, chosen, generator):
    """[D, A]: mean over K trees, each with its own goals, of Q of every action, of D decisions: the
    games and seats `chosen`, of which Player.infer has `seen` this."""
    own, views, goals, log_std = seen  # ours: tree search
    value = agent.critic(own, *agent.inputs(views, goals))[..., 0]
    games, seat = (x.repeat_interleave(agent.args.num_goal_samples) for x in chosen)
    order = cat([seat[:, None], agent.game.others[seat]], 1)  # [T, N] the player first
    goals = goals[games[:, None], order]
    drawn = gaussian(goals, log_std[games[:, None], order], generator)
    draws = uniform(((agent.args.num_simulations + 1) * len(games), order.shape[1]), generator)
    roots = state._make(x[games] for x in state)
    roots = roots._replace(players=roots.players.gather(1, order))
    q, _ = search(Model(agent, roots, goals, drawn, draws), value[games, seat], agent.args)
    return q.unflatten(0, (-1, agent.args.num_goal_samples)).mean(1)


def calibration(rows):
    """Slope of (return - V) on (Q_plan(a) - E_pi Q_plan) over R rows: how right the planner is."""
    gain = pick(rows["q_plan"], rows["action"]) - rows["expected"]  # no bonus: a soft return has
    return (gain * rows["advantage"]).sum() / gain.square().sum().clamp(min=1e-4)


# ---- PPO -----------------------------------------------------------------------------------------
def generalised_advantages(rewards, values, next_values, goes_on, gamma, gae_lambda):
    """Advantages [T, B, N] of every player by itself (GAE, Schulman et al. 2016, eq. 16); arguments
    [T, B, N]. `next_values`: V of the player's next state; 0 where it was terminated; V of the
    final state if it was truncated. bool `goes_on`: the next row continues the player's episode."""
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += gamma * gae_lambda * goes_on[t] * advantages[t + 1]
    return advantages


def ppo_loss(agent, rows, ent_coef):
    """Loss of a minibatch [R, ..], and its terms. Clipped PPO on the policy that acted: log
    pi_theta plus the planner's stored offset, so that the ratio is exact. Where the planner acts
    alone: cross-entropy towards its policy (HOP, Huang et al. 2024)."""
    args = agent.args
    mask = rows["mask"]
    inputs = (rows["own"], rows["others"], rows["goal"])
    prior = masked(agent.actor(*inputs), mask)
    offset = rows["offset"]
    imitate = agent.plan_mode == "hop"
    log_policy = (prior if imitate else prior + offset).log_softmax(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    value_loss = 0.5 * (agent.critic(*inputs)[..., 0] - rows["return"]).square().mean()
    terms = {"losses/value": value_loss, "losses/entropy": entropy}
    advantage = rows["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    if imitate:
        policy_loss = -(masked(offset, mask).softmax(-1) * log_policy).sum(-1).mean()
        entropy = 0.0
    else:
        ratio = (pick(log_policy, rows["action"]) - rows["log_prob"]).exp()
        clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
        policy_loss = -torch.minimum(advantage * ratio, advantage * clipped).mean()
        terms["losses/approx_kl"] = (ratio - 1.0 - ratio.log()).mean()
    terms["losses/policy"] = policy_loss
    return policy_loss + args.vf_coef * value_loss - ent_coef * entropy, terms


LEARNT = """own others goal mask offset q_plan expected action log_prob advantage
    return""".split()  # of a rollout, what PPO reads


@no_grad()  # ours: with --init, V learns from a whole match
def match_rows(agent, match, last_value, gae_lambda):
    """Rows [R, ..] of the learner of a `match`, by name [T, B, N, ..]; returns by V as it is."""
    value = agent.critic(*map(match.get, LEARNT[:3]))[..., 0]
    following = where(match["goes_on"], cat([value[1:], last_value[None]]), match["final_value"])
    steps = (match["reward"], value, following, match["goes_on"])
    rows = {**match, "return": value + generalised_advantages(*steps, agent.args.gamma, gae_lambda)}
    return {name: row[match["learner"]] for name, row in rows.items()}


def minibatches(rows, epochs, parts, generator):
    """`epochs` passes over `rows`, by name [R, ..], each in `parts` random parts."""
    count = len(next(iter(rows.values())))
    for _ in range(epochs):
        for index in uniform((count,), generator).argsort().tensor_split(parts):
            if len(index):
                yield {name: value.index_select(0, index) for name, value in rows.items()}


def descend(optimizer, group, loss, max_norm, terms, sums):
    """One step of the optimiser on its parameter group `group`, whose gradient is clipped; adds
    `terms` to the lists `sums` by name."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[group]["params"], max_norm)
    optimizer.step()
    for name, term in terms.items():
        sums[name].append(term.detach())


# ---- Checkpoints and evaluation ------------------------------------------------------------------
PLAYED = "plan_update plan_beta num_simulations num_goal_samples puct_c max_depth".split()  # ours:
EVALUATED = ["env_id", "num_envs", "match_episodes", "seed", *PLAYED]  # what `--evaluate` reads
EVALUATE_ALSO = "evaluate eval_episodes co_players capture_video cuda".split()  # and beside that


def checkpoint_path(run):
    """The checkpoint of a run's folder, or the path itself."""
    return f"{run}/checkpoint.pt" if os.path.isdir(run) else f"{run}"


def load_checkpoint(run, device="cpu"):
    """The content of a checkpoint, or of that in a run's folder. Raises UsageError."""
    path = checkpoint_path(run)
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint at {path[:200]!r}")
    with refused(f"{path} is no checkpoint of these scripts"):  # or not whole
        content = torch.load(path, map_location=device, weights_only=True)
        dict(content["args"], **content["played"], of=[content["agent"], content["script"]])
    return content


def load_player(path, game, batch, **play):
    """The agent of a checkpoint, for B games of `game`, with options `play` in place of its own;
    by this script if its networks fit, else by the one beside it that wrote it; UsageError."""
    content = load_checkpoint(path, game.device)
    options = content["args"] | content["played"] | play
    with torch.random.fork_rng(), refused(f"{path} does not fit {SCRIPT} and this game"):
        try:
            agent = Agent(game, Args(**options))
            agent.load_state_dict(content["agent"])
        except (TypeError, RuntimeError):
            if content["script"] == SCRIPT:
                raise
            return importlib.import_module(content["script"]).load_player(path, game, batch, **play)
    never_on = agent.plan_mode != "none" and agent.plan_slope == 0.0
    if never_on and not (agent.exact and agent.args.goal == "inferred"):
        raise UsageError(f"{path} has not learnt what this planner needs: it was never on")
    agent.plan_slope += never_on
    return Player(agent, batch)


@no_grad()
def evaluate(
    checkpoint, co_players, *, env_id=None, episodes=200, num_envs=64, match_episodes=10, seed=1,
    device="cpu", watch=None, **play
):  # fmt: skip
    """Few-shot evaluation: one learned player, at a random seat each match, with N-1 co-players.

    `checkpoint`: its path, or its run's folder. `co_players`: one name, path or callable for all of
    them, or N-1 of them (a list, or separated by commas). `env_id`: by default the game trained on.
    The agent plays as at the end of its training, but for the options `play` (of those in PLAYED).
    Returns undiscounted sums of rewards of `episodes` episodes: `focal_return`, the mean of
    `focal_returns` [episodes] in the order of matches, `co_player_return` (mean), and `by_episode`
    [match_episodes], the focal mean at the k-th episode of a match. `watch(**locals())` sees every
    state, the last of an episode included. Raises UsageError."""
    if min(episodes, num_envs, match_episodes) < 1:
        raise UsageError("--eval-episodes, --num-envs, --match-episodes: at least 1")
    with refused(f"{checkpoint} is a run of other options"):
        args = Args(**load_checkpoint(checkpoint, device)["args"] | play)
    if env_id not in (None, args.env_id):
        args = dataclasses.replace(args, env_id=env_id, horizon=None)
    game = make_game(args, device)
    checked(args, game)
    if watch and not game.simulates:
        game.kwargs["render_mode"] = "rgb_array"
    entries = co_players.split(",") if isinstance(co_players, str) else co_players
    entries = entries if isinstance(entries, list | tuple) else [entries]
    if len(entries) == 1:
        entries = entries * (game.num_players - 1)
    generator = Generator(device).manual_seed(seed)
    batch = min(num_envs, ceil(episodes / match_episodes))
    players = CoPlayers(game, entries, batch, match_episodes, generator, fixed=True)
    player = players.agents[0] = load_player(checkpoint, game, batch, **play)
    state = game.start(batch, generator)
    returns = game.alive(state) * 0.0
    totals = torch.zeros(2, episodes, device=device)  # of the focal player, of the others
    match = arange(batch, device=device)  # number of the running match
    number = match * match_episodes  # of the running episode
    with tqdm(desc=args.env_id, total=episodes, unit="episode") as bar:
        while (number < episodes).any():
            if watch:
                watch(**locals())
            actions = players.act(state, game.action_mask(state))
            state, reward, terminated, truncated = game.step(state, actions)
            returns = returns + reward
            ended = (terminated | truncated).all(1)
            if watch and ended.any():
                watch(**locals())
            own = pick(returns, players.focal)
            company = (returns.sum(1) - own) / max(1, game.num_players - 1)
            counted = ended & (number < episodes)
            totals[:, number[counted]] = stack([own, company])[:, counted]
            bar.update(int(counted.sum()))
            match = match + batch * players.advance(ended)
            number = match * match_episodes + players.episode
            returns = returns.masked_fill(ended[:, None], 0.0)
            state = game.restart(state, ended, generator)
    focal, others = totals
    by_episode = [float(focal[k::match_episodes].mean()) for k in range(match_episodes)]
    return {
        "focal_return": float(focal.mean()),
        "focal_returns": focal.tolist(),
        "co_player_return": float(others.mean()),
        "by_episode": by_episode[:episodes],
    }


def print_evaluation(args):
    """`--evaluate`: plays the checkpoint; prints mean returns, 95 % interval over matches."""
    company = args.co_players or "self"
    unread = dict(vars(args).items() - vars(Args()).items()).keys() - {*EVALUATED, *EVALUATE_ALSO}
    if unread:
        raise UsageError(f"--evaluate reads no --{', --'.join(sorted(unread)).replace('_', '-')}")
    options = {name: getattr(args, name) for name in EVALUATED}
    device = "cuda" if args.cuda else "cpu"
    result = evaluate(args.evaluate, company, episodes=args.eval_episodes, device=device, **options)
    returns = np.array(result["focal_returns"])
    ends = range(args.match_episodes, len(returns), args.match_episodes)
    means = [match.mean() for match in np.split(returns, ends)]
    error = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else inf
    print(f"focal return      {returns.mean():7.3f} +- {1.96 * error:.3f}, {len(returns)} episodes")
    print(f"co-player return  {result['co_player_return']:7.3f} of {company}")
    print(f"by episode of a match {np.round(result['by_episode'], 2)}")
    if args.capture_video:
        record_video(args.evaluate, company, args.match_episodes, **options)


def record_video(run, company, episodes, **play):
    """episode.gif in the run's folder: the last episode of a match, and what is believed of all."""
    frames = []

    def watch(game, player, players, state, returns, number, **rest):
        if number < episodes - 1:
            return
        agent = player.agent
        beliefs = []
        if game.num_items and agent.args.goal == "inferred":
            *seen, _ = player.infer(state, players)
            logits = agent.moa.subgoal_logits(*seen, *game.subgoals(state))
            beliefs = logits[0].softmax(1)[:, :-1].tolist()
        title = f"focal player {int(players.focal)}, others {company}, last episode of a match"
        title += f"\nstep {int(state.time[0])}, rewards {returns[0].tolist()}"
        frames.append(Image.fromarray(game.draw(state, title, beliefs)))

    with refused(f"no video of {run}"):
        play |= {"episodes": episodes, "match_episodes": episodes, "num_envs": 1}
        evaluate(run, company, watch=watch, **play)
        path = Path(checkpoint_path(run)).with_name("episode.gif")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)


# ---- Training ------------------------------------------------------------------------------------
# what may differ from the run that `--resume` goes on with
FREE = """total_timesteps checkpoint_every capture_video profile resume track compile
    wandb_project_name wandb_entity cuda exp_name evaluate eval_episodes env_workers""".split()


def report_profile(folder, profiler):
    """Writes trace.json, and prints the labels: seconds, and shares of the iterations."""
    profiler.export_chrome_trace(f"{folder}/trace.json")
    labels = [event for event in profiler.key_averages() if event.is_user_annotation]
    times = {x.key: x.cpu_time_total for x in labels if x.cpu_time_total}  # 0: that on the GPU
    for name, duration in times.items():
        print(f"{name:20} {duration / 1e6:8.3f} s {duration / max(times.values()):6.1%}")


def train(args, watch=None):
    """The whole run; returns the last metrics, and `run`, its folder. `watch(**locals())` is called
    after every iteration. UsageError before anything is written, or when others' code fails."""
    # ---- SETUP
    device = torch.device("cuda" if args.cuda else "cpu")
    resumes = args.resume is not None
    source = args.resume if resumes else args.init
    content = load_checkpoint(source, device) if source is not None else {}
    game = make_game(args, device)
    args = checked(args, game)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.manual_seed(args.seed)
    generator = Generator(device).manual_seed(args.seed)
    agent = Agent(game, args)
    learnt = {"params": [*agent.actor.parameters(), *agent.critic.parameters()]}
    moa = {"params": agent.moa.parameters(), "lr": args.moa_learning_rate}
    optimizer = torch.optim.Adam([learnt, moa], args.learning_rate, eps=1e-5)  # ours: no model
    match = {}  # ours: with --init, its latest steps
    kept = ceil(2400 / args.num_envs)  # of each game
    reads_moa = args.goal == "inferred" or args.plan_update != "none"
    loss_of = torch.compile(ppo_loss) if args.compile else ppo_loss
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "_")
    folder = f"runs/{name}"
    pool = [run for entry in args.co_players.split(",") for run in runs_in(entry)]
    if resumes:
        folder = f"{Path(checkpoint_path(source)).parent}"
        pool = content.get("pool", pool)  # a folder may have other runs by now
    co_players = CoPlayers(game, pool, args.num_envs, args.match_episodes, generator)
    state = game.start(args.num_envs, generator)
    if co_players.callables:  # copies of them try one step, before anything is written
        CoPlayers(game, pool, args.num_envs, 1, generator).act(state, game.action_mask(state))
    buffer = MatchBuffer(game, args)
    player = Player(agent, args.num_envs)
    co_players.agents = {0: player, **co_players.agents}
    returns = game.alive(state) * 0.0  # [B, N] of running episodes
    per_iteration = args.num_envs * args.num_steps
    global_step = 0
    iteration = 0
    tracking_id = None
    moa_updates = args.moa_updates if reads_moa and not args.freeze_moa else 0
    with refused(f"{source} does not fit this run, or is no whole run of {SCRIPT}.py"):
        if resumes:
            for field, value in vars(args).items():
                if field not in FREE and content["args"][field] != value:
                    option = f"--{field.replace('_', '-')}"
                    raise UsageError(f"--resume: {option} was {content['args'][field]!r} there")
        if content:
            agent.load_state_dict(content["agent"])
            if not resumes:
                agent.plan_slope.fill_(1.0)  # ours: exact; one match is too short to measure it
        two = [deepcopy(agent, {id(x): x for x in (game, agent.moa)}), agent]  # ours: known, learnt
        if resumes:
            global_step, iteration, tracking_id = content["progress"]
            for k in range(0, iteration + 1, args.snapshot_every or 10**9)[1:]:
                co_players.join(f"{folder}/snapshot_{k}.pt", args.num_envs)
            optimizer.load_state_dict(content["optimizer"])
            if content["args"]["cuda"] == args.cuda:
                generator.set_state(content["generator"].cpu())
            torch.set_rng_state(content["torch_generator"].cpu())
            buffer.now, buffer.match_start, buffer.episode_start, buffer.ring = content["buffer"]
            match, learnt_acts, known = content["match"]
            two[0].load_state_dict(known)
            player.agent = two[learnt_acts]
            agent.plan_mode = content["played"]["plan_update"]
            if game.simulates:
                co_players.focal, co_players.kind, co_players.target = content["seats"]
                co_players.episode = content["episode"]
                for k, other in co_players.agents.items():
                    other.memory = content["memory"][k]
                state = state._make(content["state"])
                returns = content["returns"]
            else:
                print("--resume: matches in this environment begin anew")
                buffer.match_start = buffer.episode_start = state.time + buffer.now
    if args.load_moa is not None and not resumes:
        weights = load_checkpoint(args.load_moa, device)["agent"]
        with refused(f"--load-moa: the MOA of {args.load_moa} is of another game, goal or size"):
            agent.moa.load_state_dict({k: weights[f"moa.{k}"] for k in agent.moa.state_dict()})
    tracker = None  # a W&B run
    with refused("--track"):
        if args.track:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=name)
            tracker = wandb.init(**names, id=tracking_id, resume="allow", config=vars(args))
    with refused(f"cannot write {folder}, or another process does"):
        while os.path.exists(folder) and not resumes:
            folder += "+"
        os.makedirs(folder, exist_ok=True)
        lock = open(f"{folder}/.lock", "w")  # noqa: SIM115 (held as long as the run goes)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not resumes:
        Path(folder, "args.json").write_text(json.dumps(vars(args), indent=2))
    writer = SummaryWriter(folder, purge_step=global_step + 1)
    bar = tqdm(desc=args.env_id, total=args.total_timesteps, unit="step", initial=global_step)
    profiler = None
    if args.profile:
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=0, active=3, repeat=1),
            on_trace_ready=lambda profiler: report_profile(folder, profiler),
        )
        profiler.start()
    metrics = {}
    saved = 0.0  # when the last checkpoint was written
    stop = []  # the number of a signal
    handlers = {}

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one ends at once
        print("ends after this iteration, with a checkpoint", file=sys.stderr)

    try:
        with contextlib.suppress(ValueError):  # outside of the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, on_signal)
        while True:
            # ---- CHECKPOINT
            last = stop or global_step + per_iteration > args.total_timesteps
            if last or iteration % args.checkpoint_every == 0 or time.time() > saved + 60:
                checkpoint = {
                    "script": SCRIPT,
                    "args": vars(args),
                    "agent": agent.state_dict(),
                    "progress": [global_step, iteration, tracker.id if tracker else tracking_id],
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "torch_generator": torch.get_rng_state(),
                    "seats": [co_players.focal, co_players.kind, co_players.target],
                    "episode": co_players.episode,
                    "pool": pool,
                    "memory": {k: other.memory for k, other in co_players.agents.items()},
                    "buffer": [buffer.now, buffer.match_start, buffer.episode_start, buffer.ring],
                    "match": [match, player.agent is agent, two[0].state_dict()],
                    "played": {"plan_update": agent.plan_mode},  # options as they are now
                    "state": [*state],
                    "returns": returns,
                }
                torch.save(checkpoint, f"{folder}/.checkpoint.pt")  # whole, then renamed
                os.replace(f"{folder}/.checkpoint.pt", f"{folder}/checkpoint.pt")
                saved = time.time()
            if last:
                break

            # ---- SCHEDULES
            started = time.perf_counter()
            pretraining = global_step < args.pretrain_moa_steps
            done = global_step / args.total_timesteps
            left = 1.0 - done if args.anneal else 1.0
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
            ent_coef = tensor(args.ent_coef * max(left, 0.1))
            if done >= args.plan_until:
                agent.plan_mode = "none"  # and stays off if the run is made longer
            two[0].plan_mode = agent.plan_mode  # ours: from before the match, too

            # ---- ROLLOUT
            storage = defaultdict(list)  # [T, B, N, ..]
            sums = defaultdict(list)  # terms of the losses, by minibatch
            finished = []  # length, kinds and returns of episodes that ended
            with no_grad(), record_function("rollout"):
                for _ in range(args.num_steps):
                    kind = co_players.kind
                    with record_function("players"):
                        actions = co_players.act(state, game.action_mask(state))
                    with record_function("game"):
                        after, reward, terminated, truncated = game.step(state, actions)
                    final_value = zeros_like(reward)
                    if truncated.any():
                        final_value = player.value(after, co_players) * truncated
                    transition = {
                        **player.decision,
                        "action": actions,
                        "other_actions": actions[:, game.others],
                        "reward": reward,
                        "reached": game.reached(state, actions, after),
                        "goes_on": ~(terminated | truncated),
                        "final_value": final_value,
                        "learner": (kind == 0) & game.alive(state),
                    }
                    for name, value in transition.items():
                        storage[name].append(value)
                    ended = (terminated | truncated).all(1)
                    match_ended = co_players.advance(ended)
                    if reads_moa:
                        buffer.add(state, transition, ended, match_ended)
                    returns = returns + reward
                    state = after
                    if ended.any():
                        length = after.time.unsqueeze(1).expand_as(kind)
                        finished.append(stack([length, kind, returns])[:, ended])
                        returns = returns.masked_fill(ended.unsqueeze(1), 0.0)
                        state = game.restart(after, ended, generator)
                rows = {name: stack(values) for name, values in storage.items()}
                if args.reward_scale is None:  # environments: by the first rollout
                    spread = rows["reward"].sum(0).std(correction=0)
                    largest = spread.maximum(rows["reward"].abs().max())
                    args.reward_scale = 1.0 / (float(largest) or 1.0)
                shared = rows["reward"].mean(2, True)
                rows["reward"] = args.reward_scale * rows["reward"].lerp(shared, args.prosocial)
                last_value = player.value(state, co_players)
                following = cat([rows["value"][1:], last_value[None]])
                rows["next_value"] = where(rows["goes_on"], following, rows["final_value"])
            global_step += per_iteration
            iteration += 1

            # ---- MOA
            with record_function("MOA"):
                for _ in range(moa_updates):
                    batch = buffer.sample(MOA_MATCHES, generator)
                    if batch["weight"].any():
                        loss, terms = moa_loss(agent, batch, pretraining, generator)
                        descend(optimizer, 1, loss, 1.0, terms, sums)

            # ---- PPO
            with record_function("PPO"):
                if agent.plan_mode == "hop" and args.plan_beta:  # soft V (SAC, eq. 3)
                    temperature = (1.0 - done / args.plan_until) / args.plan_beta
                    rows["reward"] -= temperature * rows["log_prob"]
                steps = map(rows.get, "reward value next_value goes_on".split())
                rows["advantage"] = generalised_advantages(*steps, args.gamma, args.gae_lambda)
                rows["return"] = rows["advantage"] + rows["value"]
                if args.init:  # ours: by default the whole match
                    rows["v"] = cat([x.critic(*map(rows.get, LEARNT[:3])) for x in two], 3).detach()
                    match = {k: cat([match.get(k, x[:0]), x])[-kept:] for k, x in rows.items()}
                    seen = match_rows(agent, match, last_value, 1.0)
                    error = (seen["v"].T - seen["return"]).square().mean(1)
                    player.agent = two[error.argmin()]  # who has foreseen the match better
                    sums["losses/learnt_less_known"].append(error.diff())
                rows = {name: rows[name][rows["learner"]] for name in LEARNT}  # [R, ..]
                if not (agent.plan_mode == "none" or pretraining or args.init) and len(rows["own"]):
                    slope = calibration(rows)
                    agent.plan_slope.lerp_(slope.clamp(-1.0, 2.0), 0.2)
                    sums["losses/plan_slope"].append(slope)
                    if agent.plan_mode == "hop":  # V towards the mean of both
                        rows["return"] = 0.5 * (rows["return"] + rows["expected"])
                epochs = 0 if pretraining else args.update_epochs
                for part in minibatches(rows, epochs, args.num_minibatches, generator):
                    loss, terms = loss_of(agent, part, ent_coef)
                    descend(optimizer, 0, loss, args.max_grad_norm, terms, sums)
                for _ in range(2 if args.init and epochs else 0):  # ours: V, of the whole match
                    rows = match_rows(agent, match, last_value, 0.8)  # others played most
                    for part in minibatches(rows, 1, ceil(len(rows["return"]) / 64), generator):
                        loss = args.vf_coef * loss_of(agent, part, 0.0)[1]["losses/value"]
                        descend(optimizer, 0, loss, args.max_grad_norm, {}, sums)

            # ---- LOG
            metrics = {name: float(stack(terms).mean()) for name, terms in sums.items()}
            metrics["charts/learning_rate"] = args.learning_rate * left
            metrics["charts/SPS"] = per_iteration / (time.perf_counter() - started)
            metrics["moa/buffer_fill"] = min(1.0, buffer.now / buffer.size)
            if finished:
                lengths, kinds, totals = cat(finished, 1)  # [episodes, N]
                own = totals.masked_fill(kinds != 0, nan)
                seats = {f"returns/seat_{i}": x for i, x in enumerate(own.T)}
                names = {f"returns/{x}": totals[kinds == k] for k, x in enumerate(co_players.names)}
                means = {"charts/episodic_length": lengths, "charts/episodic_return": own}
                for name, values in (means | names | seats).items():
                    if values.isfinite().any():
                        metrics[name] = float(values.nanmean())
            for name, value in metrics.items():
                if not isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {global_step} of {folder}")
                writer.add_scalar(name, value, global_step)
            if tracker:
                tracker.log(metrics, step=global_step)
            if "charts/episodic_return" in metrics:
                bar.set_postfix_str(f"return {metrics['charts/episodic_return']:.2f}")
            bar.update(per_iteration)
            if args.snapshot_every and not iteration % args.snapshot_every:
                path = f"{folder}/snapshot_{iteration}.pt"
                played = {"plan_update": "none"} if "plan_update" in PLAYED else {}
                snapshot = {"script": SCRIPT, "args": vars(args), "played": played}
                torch.save(snapshot | {"agent": agent.state_dict()}, path)
                co_players.join(path, args.num_envs)
            if profiler:
                profiler.step()
            if watch:
                watch(**locals())
    finally:
        bar.close()
        writer.close()
        lock.close()
        if profiler:
            profiler.stop()
        if tracker:
            tracker.finish()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop:
        print(f"stopped at step {global_step}: {folder}")
        raise KeyboardInterrupt if stop[0] == signal.SIGINT else SystemExit(128 + stop[0])
    print(f"done at step {global_step}: {folder}")
    if args.capture_video:
        record_video(folder, pool[-1], 10)  # with the last kind of the list
    return metrics | {"run": folder}


INIT = dict(  # with --init, what is not given: one match in which the learner goes on learning
    resume=None, load_moa=None, pretrain_moa_steps=0, offline=None, num_envs=1, num_steps=100,
    total_timesteps=2400, match_episodes=2400, learning_rate=3e-3, anneal=False, plan_until=1.0,
    plan_update="hop", plan_beta=100.0,  # ours: the search alone acts
)  # fmt: skip


def parse_arguments(arguments):
    """Args from the command line, over the options of a run to resume, start from or play; `--flag
    False` is read as `--no-flag`. Raises UsageError; tyro itself exits with status 2."""
    line = re.sub(r"(?i)--([^\0]+)\0false(?=\0|$)", r"--no-\1", "\0".join(arguments))
    words = re.findall(r"[^\0]+", re.sub(r"(?i)\0true(?=\0|$)", "", line))
    args = tyro.cli(Args, args=words, description=__doc__)
    path = args.evaluate or args.resume or args.init
    if path is None:
        return args
    content = load_checkpoint(path)
    options = content["args"]
    if path == args.init:
        options |= {name: INIT[name] for name in INIT if name in options}
    with refused(f"{path} is a run of other options, of {content['script']}.py"):
        if path == args.evaluate:
            options = {name: options[name] for name in ("env_id", *PLAYED)} | content["played"]
        return tyro.cli(Args, args=words, default=Args(**options), description=__doc__)


def main():
    """Command line: trains, or evaluates with `--evaluate`."""
    try:
        args = parse_arguments(sys.argv[1:])
        if args.cuda and not torch.cuda.is_available():
            raise UsageError("--cuda: no CUDA device is available")
        if args.evaluate is None:
            train(args)
        else:
            print_evaluation(args)
    except (UsageError, FloatingPointError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""HOP+ with a latent world model, and a diffusion model of what all players do next.

A copy of latent_world_model.py in which the planner's joint actions of the co-players come from a
masked diffusion model over the actions [N, H] of all seats in the next H steps, given what is seen
and the inferred goals. Its first step takes the place of the MOA's samples; goals still come from
the MOA. `--co-player-model moa` is the planner of latent_world_model.py.

    python benchmarks/experiments/diffusion_planner.py --num-envs 16
    python benchmarks/experiments/diffusion_planner.py --co-player-model moa  # to compare
    python benchmarks/experiments/diffusion_planner.py --future-steps 8 --denoising-steps 4

The data are *tokens*: actions 0 .. A-1, A for who is no longer there (it has left, or the episode
is over), A + 1 for *masked*. One network, the same for every seat, reads the tokens of all seats,
some of them masked, and tells what each masked one may be:

    TRAINING (on the MOA's batches; states of the match buffer and the H steps that followed):
        t ~ U(0, 1], each token x_jh masked with probability t
        loss = 1/t * sum over masked (j, h) of -log p(x_jh | tokens that are not, o, mean z of all)
    SAMPLING (in place of a_j^k ~ pi_hat, K joint futures at once):
        all masked; S times: draw all, and keep one S-th of them, in random order

With S = 1 tokens are independent; with one step for each token the joint distribution is that of
any-order autoregression. A token that stays masked is summed out, so that the planner, which wants
the first step alone, draws no others. The network is not told t: its best answer does not depend on
it (Ou et al. 2024, theorem 1).

Papers: D3PM (Austin et al., NeurIPS 2021, arXiv 2107.03006, with an absorbing state), MDLM (Sahoo
et al., NeurIPS 2024, arXiv 2406.07524, the bound in continuous time), Ou et al. (ICLR 2025, arXiv
2406.03736), Diffuser (Janner et al., ICML 2022, arXiv 2205.09991), MADiff (Zhu et al., NeurIPS
2024, arXiv 2305.17330); those of latent_world_model.py, which also says what a co-player can be.
Shapes as there; H steps of a future, S denoising steps."""

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
    # ours: the latent model
    plan_samples: int = 8  # K, sampled joint actions of the co-players a decision
    # changed: diffusion
    co_player_model: str = "diffusion"  # predicts co-players: this, moa, or a scripted kind
    # changed: new
    future_steps: int = 4  # H, steps that the diffusion model knows of
    # changed: new
    denoising_steps: int = 2  # S, in which it draws
    td_target: Literal["observed", "model"] = "observed"  # y has V of enc(o'), or of f(enc(o), ..)
    offline: str | None = None  # data set (.npz) to learn from; no game is stepped


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


# changed: --co-player-model diffusion, --future-steps
def checked(args, game):
    """`args` with the game's defaults in place of None. Raises UsageError for what cannot be."""
    defaults = game.defaults | (DEFAULTS["offline"] if args.offline else {})  # ours: offline
    missing = {name: v for name, v in defaults.items() if getattr(args, name) is None}
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
        f"--co-player-model is none of moa, {', '.join(game.kinds)}": args.co_player_model
        not in ("diffusion", "moa", *game.kinds),
        "--future-steps: at most 64": args.future_steps > 64,
        "who learns --offline needs a planner, --plan-until 1, and no --goal oracle": args.offline
        and (args.plan_update == "none" or args.plan_until < 1 or args.goal == "oracle"),
        "--offline does not take --snapshot-every": args.offline and args.snapshot_every,
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
    "other": dict(gamma=0.95, plan_update="offset", plan_beta=5.0, plan_until=1.0),
    "offline": dict(plan_update="hop", plan_until=1.0),  # ours: the planner plays to the end
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


class Recorded(CoPlayers):
    """A data set [T, B, ..] of `--offline`, played over and over in place of the co-players and of
    the game's `start`, `step` and `restart`; the learner thinks at every seat, and acts at none. By
    name: the state's fields, and with `next_` before them the next state's; `action`, `reward`,
    `terminated`, `truncated` [T, B, N], `match_ended` [T, B]; `env_id`, `horizon`. UsageError."""

    def __init__(self, game, args, generator):
        like = game.start(1, generator)._asdict()
        alive = game.alive(game.state_type(**like))
        types = {**like, **{f"next_{name}": field for name, field in like.items()}}
        types |= {"action": alive.long(), "reward": alive.float(), "terminated": alive}
        types |= {"truncated": alive, "match_ended": alive[:, 0]}
        with refused(f"cannot learn from {args.offline}"):
            with np.load(args.offline, allow_pickle=False) as file:
                about = [str(file["env_id"]), file.get("horizon", game.horizon)]
                if about != [args.env_id, game.horizon]:
                    raise UsageError(f"{args.offline} is of {about[0]}, horizon {about[1]}")
                self.data = {k: tensor(file[k]).to(x.device, x.dtype) for k, x in types.items()}
            steps, batch = self.data["match_ended"].shape
            # raises for other sizes
            rows = {k: x.view(steps * batch, *types[k].shape[1:]) for k, x in self.data.items()}
            for prefix in ("next_", ""):
                state = game.state_type._make(rows[prefix + name] for name in like)
                game.subgoals(state)  # raises for cells that are not on the board
            legal = pick(game.action_mask(state), rows["action"])
            on = ~(self.data["terminated"] | self.data["truncated"]).all(2)[:-1]
            pairs = [(self.data[f"next_{k}"][:-1][on], self.data[k][1:][on]) for k in like]
            follow = all(torch.equal(*map(torch.nan_to_num, pair)) for pair in pairs)
            if not (follow and legal.all() and rows["reward"].isfinite().all()):
                raise ValueError("steps that do not follow, illegal actions, or infinite rewards")
            self.data["truncated"][-1] = ~self.data["terminated"][-1]
            self.data["match_ended"][-1] = True
        super().__init__(game, ["random"], batch, 1, generator)
        self.kind = torch.ones_like(self.kind)  # nobody is the learner
        self.names[1] = "recorded"

    def now(self, *names):
        """What the file has, by name, at the step that is kept in place of `episode`."""
        return [self.data[name][self.episode[0]] for name in names]

    def start(self, batch, generator):
        return self.game.state_type._make(self.now(*self.game.state_type._fields))

    def restart(self, state, ended, generator):
        return self.start(len(ended), generator)

    def step(self, state, actions):
        after = self.now(*(f"next_{name}" for name in self.game.state_type._fields))
        return self.game.state_type._make(after), *self.now("reward", "terminated", "truncated")

    def act(self, state, mask):
        """Recorded actions int64 [B, N], of which the learner thinks and which it remembers."""
        (actions,) = self.now("action")
        self.agents[0].act(state, mask, self.kind == 1, self)
        self.agents[0].remember(actions)
        return actions

    def advance(self, ended):
        """As for CoPlayers: which matches ended, bool [B]. Goes on to the next step."""
        (match_ended,) = self.now("match_ended")
        self.agents[0].forget(ended, match_ended)
        self.episode = (self.episode + 1) % len(self.data["action"])
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


# ---- Latent world model --------------------------------------------------------------------------
class LatentModel(nn.Module):
    """zs = enc(o) of player i: a latent [.., L] for itself, and by shared weights one [.., N-1, L]
    for each co-player. f(zs, a_i, a_-i) adds to them what the joint action changes, and fades out
    co-players that leave; an action selects a block of a layer's outputs. dec tells the features of
    zs, and whether the player plays on; r_hat the reward; V the value."""

    def __init__(self, game, goal, size):
        super().__init__()
        self.size = size
        self.num_actions = game.num_actions
        self.other_size = game.other_size
        inputs = (game.own_size, game.other_size + goal)
        self.encoders = nn.ModuleList(
            nn.Sequential(layer(x, size), nn.ReLU(), layer(size, size, 1.0)) for x in inputs
        )
        self.own_decoder = layer(size, game.own_size + 1, 1.0)  # the last: plays on
        self.other_decoder = layer(size, game.other_size, 1.0)
        self.own_blocks = layer(size, self.num_actions * 2 * size, 0.1)
        self.other_blocks = layer(size, self.num_actions * 2 * size, 0.1)
        self.whole = PlayerNetwork(size, size, self.num_actions, 2 * size + 1, size, 0.1)
        self.change = layer(size, size + 1, 0.1)  # the last: stays
        self.value = PlayerNetwork(size, size, goal, 1, size, 1.0)

    def encode(self, own, others):
        """zs of own features [.., X] and co-players' with their goals [.., N-1, Y + Z]."""
        return self.encoders[0](own), self.encoders[1](others)

    def decode(self, own, others):
        """Features [.., X] and [.., N-1, Y] of zs, and whether the player plays on [..]."""
        own = self.own_decoder(own)
        return own[..., :-1], self.other_decoder(others), own[..., -1]

    def forward(self, own, others, action, other_actions):
        """zs' and the reward [..] of zs, actions [..] and [.., N-1]; leading axes broadcast."""
        step, pushed = self.chosen(self.own_blocks(own), action)  # of itself, of co-players
        steps, heard = self.chosen(self.other_blocks(others), other_actions)
        action = F.one_hot(action, self.num_actions).float()
        change, told, reward = self.whole(own, heard, action).split([self.size, self.size, 1], -1)
        others = others + steps + pushed[..., None, :]
        changes, stays = self.change(F.relu(heard + told[..., None, :])).split([self.size, 1], -1)
        others = (others + changes) * (3.0 + stays).sigmoid()
        return own + step + change, others, reward[..., 0]

    def chosen(self, blocks, action):
        """Two parts [.., L] of that of the `blocks` [.., A * 2 L] which `action` [..] selects."""
        blocks = blocks.unflatten(-1, (self.num_actions, -1))
        action = action.expand(torch.broadcast_shapes(action.shape, blocks.shape[:-2]))
        return blocks.take_along_dim(action[..., None, None], -2).squeeze(-2).chunk(2, -1)


LATENT_SIZE = 96  # L
MODEL_COEFS = {"observation": 1.0, "reward": 1.0, "value": 1.0, "consistency": 1.0}  # lo lr lv lc


def model_loss(agent, rows):
    """Weighted sum of the four losses of the latent model on rows [R, ..], and these terms. After
    the player's last step o' counts for nothing; before, it is read with the goals of o. `shift`,
    E_pi Q - Q(a), makes y a target of the planner's policy whatever was played (offline), or one of
    less variance. V is also drawn, at zs', to what it is at enc(o'): the planner reads it there."""
    model = agent.model
    args = agent.args
    goals = rows["others"][..., model.other_size :]
    zs = model.encode(rows["own"], rows["others"])
    after = model.encode(rows["next_own"], cat([rows["next_views"], goals], 2))
    *ahead, reward = model(*zs, rows["action"], rows["other_actions"])
    own, views, plays_on = model.decode(*ahead)
    goes_on = (~rows["terminated"]).float()
    now, then, planned = (model.value(*x, goals.sum(1))[:, 0] for x in (zs, after, ahead))
    target = then if args.td_target == "observed" else planned
    target = rows["reward"] + args.gamma * goes_on * target + rows["shift"]
    seen = (own - rows["next_own"]).square().sum(1)
    seen = seen + (views - rows["next_views"]).square().sum((1, 2))
    apart = [(x - y).square().sum(-1) for x, y in zip(ahead, after)]
    value = (now - target.detach()).square() * rows["valued"]
    terms = {
        "observation": seen * goes_on + (plays_on - goes_on).square(),
        "reward": (reward - rows["reward"]).square(),
        "value": value + (planned - then.detach()).square() * goes_on,
        "consistency": (apart[0] + apart[1].sum(1)) * goes_on,
    }
    terms = {name: term.mean() for name, term in terms.items()}
    loss = sum(MODEL_COEFS[name] * term for name, term in terms.items())
    return loss, {f"model/{name}": term for name, term in terms.items()}


# ---- Diffusion model of futures ------------------------------------------------------------------
# changed: new
def future_tokens(batch, steps, num_actions):
    """int64 [M, L, N, H]: what every seat did in the `steps` from each on, of what a MatchBuffer
    read: its actions; A, it is no longer there; A + 1, not recorded (yet)."""
    inside = batch["active"].any(2, True)  # of the match, and recorded
    played = batch["action"].masked_fill(~batch["active"], num_actions)
    unknown = batch["active"] & ~batch["ended"]  # what follows when no more is recorded
    rest = num_actions + unknown.long()
    tokens = []
    for h in range(steps):
        parts = (played, batch["first"], inside)
        later, first, there = (F.pad(x, (0, 0, 0, h))[:, h:] for x in parts)
        tokens.append(where(there & (first == batch["first"]), later, rest))
    return stack(tokens, 3)


# changed: new
def possible_tokens(mask, steps):
    """bool [.., N, H, A + 1]: what the futures of players that are there may be made of: at the
    first step a legal action, bool `mask` [.., N, A]; later anything."""
    possible = F.pad(mask, (0, 1))[..., None, :]
    return cat([possible, torch.ones_like(possible).repeat_interleave(steps - 1, -2)], -2)


# changed: new
def denoise(agent, own, others, goals, tokens):
    """[.., N, H, A + 1]: logits of what every token is, of seats that see `own` [.., N, X] and
    `others` [.., N, N-1, Y + Z] and have `goals` [.., N, Z], by `tokens` [.., N, H] in which some
    are masked; leading axes are broadcast."""
    plans = F.one_hot(tokens, agent.game.num_actions + 2).flatten(-2).float()
    theirs = plans[..., agent.game.others, :]  # [.., N, N-1, H (A + 2)]
    others = cat([others.expand(*theirs.shape[:-1], -1), theirs], -1)
    plans = cat([goals.expand(*plans.shape[:-1], -1), plans], -1)
    return agent.denoiser(own, others, plans).unflatten(-1, (tokens.shape[-1], -1))


# changed: new
def diffusion_loss(agent, batch, generator):
    """Loss of the denoiser on what a MatchBuffer read, in nats a token: the bound on -log p of all
    seats' futures in continuous time, of linear noise (MDLM, Sahoo et al. 2024). Times t are
    stratified. Who has left is seen and no target; what is not recorded is masked."""
    game = agent.game
    actions = game.num_actions
    moa = agent.moa
    tokens = future_tokens(batch, agent.args.future_steps, actions)
    index = batch["weight"].any(2).flatten().nonzero()[:, 0]
    index = index[uniform(index.shape, generator).argsort()[: MOA_ROWS // game.num_players]]
    rows = {name: x.flatten(0, 1)[index] for name, x in {**batch, "token": tokens}.items()}
    goals = rows.get("goals", rows["own"].new_zeros(*rows["action"].shape, moa.goal_size))
    if agent.args.goal == "inferred":
        with no_grad():
            step = moa.step_features(*map(batch.get, "own views action active".split()))
            before = step.cumsum(1) - step  # as in moa_loss
            within = before - before.take_along_dim(batch["first"][..., None], 1)
            memory = stack([before, within], 3).flatten(0, 1)[index]
            goals, _ = moa.encode(memory, rows["own"], rows["views"])
    token = rows["token"]  # [R, N, H]
    part = arange(len(token), device=token.device) + 1.0
    time = ((part - uniform(part.shape, generator)) / len(token))[:, None, None]  # in (0, 1]
    hidden = (uniform(token.shape, generator) < time) & rows["active"][..., None]
    noisy = token.masked_fill(hidden, actions + 1)
    others, _ = agent.inputs(rows["views"], goals)
    logits = denoise(agent, rows["own"], others, goals, noisy)
    logits = masked(logits, possible_tokens(rows["mask"], token.shape[2]))
    known = (token <= actions) & rows["weight"][..., None]
    nll = -pick(logits.log_softmax(-1), token.clamp(max=actions))
    loss = (nll * (hidden & known) / time).sum() / known.sum()
    return loss, {"diffusion/nll": loss}


# changed: new
def sample_futures(agent, state, seen, steps, generator):
    """int64 [B, K, N, H]: tokens of all seats, those of the first `steps` steps drawn and the rest
    masked, as `seen` by Player.infer. One set of samples serves every own action and observer. In
    random order, one S-th of the tokens at a time; who has left is known to have (A)."""
    game = agent.game
    args = agent.args
    own, views, goals, _ = seen
    others, _ = agent.inputs(views, goals)
    own, others, goals = (x[:, None] for x in (own, others, goals))
    alive = game.alive(state)
    possible = possible_tokens(game.action_mask(state), args.future_steps)[:, None]
    unknown = game.num_actions + 1
    shape = (len(alive), args.plan_samples, *alive.shape[1:], args.future_steps)
    tokens = where(alive, unknown, game.num_actions)[:, None, :, None]
    tokens = tokens.expand(-1, 1, -1, args.future_steps)  # the same in all samples
    turn = uniform((*shape[:2], shape[2] * steps), generator).argsort(2)
    turn = (turn * args.denoising_steps // turn.shape[2]).unflatten(2, (-1, steps))
    turn = F.pad(turn, (0, args.future_steps - steps), value=args.denoising_steps)
    for s in range(args.denoising_steps):
        logits = masked(denoise(agent, own, others, goals, tokens), possible)
        drawn = sample(logits.expand(*shape, -1), generator)
        tokens = where((turn == s) & (tokens == unknown), drawn, tokens)
    return tokens


# ---- Agent and planner ---------------------------------------------------------------------------
class Agent(nn.Module):
    """The learned player: its networks."""

    # changed: the denoiser
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
        self.model = LatentModel(game, goal, LATENT_SIZE)  # ours: the planner's
        plan = args.future_steps * (actions + 2)
        sizes = (game.own_size, other + plan, goal + plan, args.future_steps * (actions + 1))
        self.denoiser = PlayerNetwork(*sizes, 2 * args.hidden_size)
        self.exact = False  # what it plans with is learnt
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


def rule_actions(agent, state, generator):
    """As sample_joint_actions, by the scripted kind --co-player-model at every seat."""
    game = agent.game
    copies = state._make(x.repeat_interleave(agent.args.plan_samples, 0) for x in state)
    mask = game.action_mask(copies)
    zero = zeros_like(mask[..., 0]).long()
    kind = zero + [*game.kinds].index(agent.args.co_player_model)
    actions, _ = game.scripted_actions(copies, mask, kind, zero > 0, zero - 1, generator)
    return actions.unflatten(0, (-1, agent.args.plan_samples))


def sample_joint_actions(agent, mask, seen, generator):
    """int64 [B, K, N]: z_j ~ q, then a_j ~ pi_hat(. | o_j, t, z_j) for every seat, as `seen` by
    Player.infer. One set of samples serves every own action (common random numbers) and every
    observer, since what is inferred of j is the same for all."""
    own, views, mean, log_std = (x[:, :, None] for x in seen)
    goals = gaussian(mean.expand(-1, -1, agent.args.plan_samples, -1), log_std, generator)
    logits = agent.moa.decoder(own, views, goals)
    return sample(masked(logits, mask[:, :, None]), generator).transpose(1, 2)


def outcome(model, own, others, other_actions, action):
    """Reward [..] and next value [..] that the latent model predicts, from own features [.., X],
    co-players' [.., N-1, Y + Z] and actions [.., N-1], and the own action [..]."""
    *ahead, reward = model(*model.encode(own, others), action, other_actions)  # ours: by zs
    plays_on = model.decode(*ahead)[2].clamp(0.0, 1.0)
    value = model.value(*ahead, others[..., model.other_size :].sum(-2))[..., 0]
    return reward, plays_on * value


# changed: joint actions by diffusion
def scores(agent, state, seen, chosen, generator):
    """[D, A]: mean over K joint actions of r + gamma V', for every own action, of D decisions: the
    games and seats `chosen`, of which Player.infer has `seen` this."""
    own, views, goals, _ = seen
    games, seats = chosen
    mask = agent.game.action_mask(state)
    if agent.args.co_player_model == "diffusion":
        joint = sample_futures(agent, state, seen, 1, generator)[..., 0]
        joint = where(joint < mask.shape[2], joint, agent.game.idle(mask)[:, None])
    elif agent.args.co_player_model == "moa":
        joint = sample_joint_actions(agent, mask, seen, generator)
    else:  # ours: a rule
        joint = rule_actions(agent, state, generator)
    joint = joint[games[:, None], :, agent.game.others[seats]].transpose(1, 2)  # [D, K, N-1]
    others, _ = agent.inputs(views, goals)
    seen = (x[chosen][:, None, None] for x in (own, others))
    actions = arange(agent.game.num_actions, device=own.device)
    reward, value = outcome(agent.model, *seen, joint[:, :, None], actions)
    return (reward + agent.args.gamma * value).mean(1)


def calibration(rows):
    """Slope of (return - V) on (Q_plan(a) - E_pi Q_plan) over R rows: how right the planner is."""
    gain = pick(rows["q_plan"], rows["action"]) - rows["expected"]  # no bonus: a soft return has
    return (gain * rows["advantage"]).sum() / gain.square().sum().clamp(min=1e-4)


RESERVOIR = 1024  # surprising transitions of the whole run that are learnt from again
REPLAY = 16_384  # latest transitions that are learnt from
MODEL_LEARNING_RATE = 5e-3  # at the start
MODEL_UPDATES = 32  # minibatches an iteration
MODEL_BATCH = 1024  # rows of each, a quarter of them from the reservoir
TRANSITION = """own others other_actions action reward shift valued terminated next_own
    next_views""".split()  # ours: the next features as well


def surprising(network, rows, reservoir, generator):
    """The reservoir of transitions, by name [RESERVOIR, ..], with those in `rows` [R, ..] offered:
    weighted by the squared error of the reward (A-Res, Efraimidis and Spirakis 2006). Joint hunts
    are too rare at first to be learnt as they come."""
    error = (outcome(network, *map(rows.get, TRANSITION[:4]))[0] - rows["reward"]).square() + 1e-9
    key = uniform(error.shape, generator).clamp(min=1e-20).log() / error
    pool = {k: cat([reservoir.get(k, new[:0]), new]) for k, new in {**rows, "key": key}.items()}
    keep = pool["key"].topk(min(len(pool["key"]), RESERVOIR)).indices
    return {name: value[keep] for name, value in pool.items()}


def model_batch(recent, reservoir, generator):
    """Rows [MODEL_BATCH, ..] drawn from both; V does not learn from the reservoir's."""
    few = MODEL_BATCH // 4
    late = (uniform((MODEL_BATCH - few,), generator) * len(recent["reward"])).long()
    early = (uniform((few,), generator) * len(reservoir["reward"])).long()
    batch = {k: cat([recent[k][late], reservoir[k][early]]) for k in TRANSITION}
    batch["valued"][-few:] = False
    return batch


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
# changed: of the diffusion model
PLAYED = "plan_update plan_beta plan_samples co_player_model denoising_steps".split()
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


# changed: a denoiser that has learnt nothing does not play
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
    models = [of["co_player_model"] for of in (options, content["args"])]
    if agent.plan_mode != "none" and models[0] == "diffusion" != models[1]:
        raise UsageError(f"{path} has not learnt a diffusion model: it was never on")
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


# changed: the diffusion model learns beside the MOA
def train(args, watch=None):
    """The whole run; returns the last metrics, and `run`, its folder. `watch(**locals())` is called
    after every iteration. UsageError before anything is written, or when others' code fails."""
    # ---- SETUP
    device = torch.device("cuda" if args.cuda else "cpu")
    resumes = args.resume is not None
    source = args.resume if resumes else args.init
    content = load_checkpoint(source, device) if source is not None else {}
    game = make_game(args, device)
    if args.offline:
        args.num_envs = 1  # until the file tells
    args = checked(args, game)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.manual_seed(args.seed)
    generator = Generator(device).manual_seed(args.seed)
    agent = Agent(game, args)
    learnt = {"params": [*agent.actor.parameters(), *agent.critic.parameters()]}
    inferring = [*agent.moa.parameters(), *agent.denoiser.parameters()]
    moa = {"params": inferring, "lr": args.moa_learning_rate}
    recent = {}  # transitions to learn from
    model = {"params": agent.model.parameters(), "lr": MODEL_LEARNING_RATE}
    optimizer = torch.optim.Adam([learnt, moa, model], args.learning_rate, eps=1e-5)
    reservoir = {}  # surprising transitions
    reads_moa = args.goal == "inferred" or args.plan_update != "none"
    loss_of = torch.compile(ppo_loss) if args.compile else ppo_loss
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "_")
    folder = f"runs/{name}"
    pool = [run for entry in args.co_players.split(",") for run in runs_in(entry)]
    if resumes:
        folder = f"{Path(checkpoint_path(source)).parent}"
        pool = content.get("pool", pool)  # a folder may have other runs by now
    world = game  # ours: or a file
    if args.offline is None:
        co_players = CoPlayers(game, pool, args.num_envs, args.match_episodes, generator)
    else:
        world = co_players = Recorded(game, args, generator)
        args.num_envs = len(co_players.kind)
        checked(args, game)  # are there enough steps for one iteration?
    state = world.start(args.num_envs, generator)
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
    diffuses = args.co_player_model == "diffusion"
    reads_batches = reads_moa and (diffuses or not args.freeze_moa)
    moa_updates = args.moa_updates if reads_batches else 0
    with refused(f"{source} does not fit this run, or is no whole run of {SCRIPT}.py"):
        if resumes:
            for field, value in vars(args).items():
                if field not in FREE and content["args"][field] != value:
                    option = f"--{field.replace('_', '-')}"
                    raise UsageError(f"--resume: {option} was {content['args'][field]!r} there")
        if content:
            agent.load_state_dict(content["agent"])
        if resumes:
            global_step, iteration, tracking_id = content["progress"]
            for k in range(0, iteration + 1, args.snapshot_every or 10**9)[1:]:
                co_players.join(f"{folder}/snapshot_{k}.pt", args.num_envs)
            optimizer.load_state_dict(content["optimizer"])
            if content["args"]["cuda"] == args.cuda:
                generator.set_state(content["generator"].cpu())
            torch.set_rng_state(content["torch_generator"].cpu())
            buffer.now, buffer.match_start, buffer.episode_start, buffer.ring = content["buffer"]
            recent, reservoir = content["replay"]
            agent.plan_mode = content["played"]["plan_update"]
            if game.simulates or args.offline:
                co_players.focal, co_players.kind, co_players.target = content["seats"]
                co_players.episode = content["episode"]
                for k, other in co_players.agents.items():
                    other.memory = content["memory"][k]
                state = state._make(content["state"])
                returns = content["returns"]
                if args.offline:
                    co_players.now("reward")  # raises where the file has become shorter
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
                    "replay": [recent, reservoir],
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
                        after, reward, terminated, truncated = world.step(state, actions)
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
                        "terminated": terminated,
                    }
                    if agent.plan_mode != "none":
                        transition["next_own"], transition["next_views"] = game.features(after)
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
                        state = world.restart(after, ended, generator)
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

            # ---- MOA AND DIFFUSION MODEL
            futures = diffuses and agent.plan_mode != "none" and not pretraining
            with record_function("MOA"):
                for _ in range(moa_updates):
                    batch = buffer.sample(MOA_MATCHES, generator)
                    if batch["weight"].any() and not args.freeze_moa:
                        loss, terms = moa_loss(agent, batch, pretraining, generator)
                        descend(optimizer, 1, loss, 1.0, terms, sums)
                    if batch["weight"].any() and futures:
                        loss, terms = diffusion_loss(agent, batch, generator)
                        descend(optimizer, 1, loss, 1.0, terms, sums)

            # ---- LATENT MODEL
            with record_function("latent model"):
                temperature = 0.0
                if agent.plan_mode == "hop" and args.plan_beta and not args.offline:
                    temperature = (1.0 - done / args.plan_until) / args.plan_beta
                if agent.plan_mode != "none" and not pretraining:
                    rest = 1.0 - done / args.plan_until if args.anneal else 1.0
                    optimizer.param_groups[2]["lr"] = MODEL_LEARNING_RATE * rest
                    rows["shift"] = rows["expected"] - pick(rows["q_plan"], rows["action"])
                    rows["shift"] -= temperature * rows["log_prob"]
                    rows["valued"] = rows["learner"] | (args.offline is not None)
                    moves = {name: rows[name][rows["alive"]] for name in TRANSITION}
                    with no_grad():
                        reservoir = surprising(agent.model, moves, reservoir, generator)
                    recent = {k: cat([recent.get(k, x[:0]), x])[-REPLAY:] for k, x in moves.items()}
                    for _ in range(MODEL_UPDATES):
                        batch = model_batch(recent, reservoir, generator)
                        loss, terms = model_loss(agent, batch)
                        descend(optimizer, 2, loss, 10.0, terms, sums)
                    if args.offline:
                        agent.plan_slope.fill_(1.0)  # nothing to calibrate it on

            # ---- PPO
            with record_function("PPO"):
                rows["reward"] -= temperature * rows["log_prob"]  # soft V (SAC, eq. 3)
                steps = map(rows.get, "reward value next_value goes_on".split())
                rows["advantage"] = generalised_advantages(*steps, args.gamma, args.gae_lambda)
                rows["return"] = rows["advantage"] + rows["value"]
                rows = {name: rows[name][rows["learner"]] for name in LEARNT}  # [R, ..]
                if agent.plan_mode != "none" and not pretraining and len(rows["return"]):
                    slope = calibration(rows)
                    agent.plan_slope.lerp_(slope.clamp(-1.0, 2.0), 0.2)
                    sums["losses/plan_slope"].append(slope)
                    if agent.plan_mode == "hop":  # V towards the mean of both
                        rows["return"] = 0.5 * (rows["return"] + rows["expected"])
                epochs = 0 if pretraining else args.update_epochs
                for part in minibatches(rows, epochs, args.num_minibatches, generator):
                    loss, terms = loss_of(agent, part, ent_coef)
                    descend(optimizer, 0, loss, args.max_grad_norm, terms, sums)

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
    plan_update="offset",
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

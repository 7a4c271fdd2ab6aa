"""HOP+ with tree search: opponent modelling with inferred goals in mixed-motive grid games, in one file.

A learner plays Markov Stag-Hunt or Markov Snowdrift among co-players whose goals it infers: a VAE's z for every seat,
from what that seat did in this match. A model of other agents (MOA) predicts their actions from z; tree search scores
each own action, in K trees with a draw of the goals each, all trees in lock step; PPO learns around it. Papers: HOP
(Huang et al., ICML 2024, arXiv 2406.08002), AlphaGo Zero for PUCT (Silver et al. 2017), OMG (Yu et al., NeurIPS 2024),
PPO (1707.06347), GAE (1506.02438).

    python hop_mcts.py --num-envs 16                          # train on the small stag hunt
    python hop_mcts.py --env-id msg --co-players self         # self-play on the snowdrift game
    python hop_mcts.py --evaluate runs/NAME --co-players ns   # play a checkpoint with three stag hunters
    diff hop_onestep.py hop_mcts.py                           # what tree search changes

A co-player is `self`; a scripted name (msh: ns, nh, random; msg: cleaner, exploiter, random; each also with -noisy);
a checkpoint, by its path; `package.module:name`, or a callable `(observation [B, C, H, W], action_mask
[B, A], clock [B, 2], generator) -> actions [B]`, one for each of the N-1 co-players (a class is instantiated for each).
If it has a method `start_match(which [B] bool)`, that is called when matches start. Before training, another object (or
copy) of each plays one step of a game that nothing is learnt from.
Shapes in comments: B games, N seats (players), A actions, C planes, K samples, M items, T steps, Z goal, R rows, .."""

import collections
import contextlib
import copy
import dataclasses
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from pettingzoo import ParallelEnv
from PIL import Image, ImageDraw
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# method: options of the search
@dataclasses.dataclass
class Args:
    # common
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of everything random
    torch_deterministic: bool = True  # use torch's deterministic algorithms
    cuda: bool = False  # run on the GPU
    compile: bool = False  # compile the game, the planner and the PPO loss with torch.compile
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "hop-plus"  # W&B project
    wandb_entity: str | None = None  # W&B team
    capture_video: bool = False  # at the end, write episode.gif: one episode, and what the focal player believes
    save_model: bool = False  # at the end, write model.pt: the agent alone, to play (checkpoint.pt is always written)
    checkpoint_every: int = 50  # write checkpoint.pt every so many iterations, besides at the start and at the end
    resume: str | None = None  # folder or checkpoint of a run to go on with; only length and logging may change
    profile: bool = False  # log where the time goes, and print it at the end as a tree
    evaluate: str | None = None  # folder or checkpoint to play instead of training
    eval_episodes: int = 200  # episodes of --evaluate
    # game and co-players
    env_id: str = "msh-4x4-4h1s"  # game: msh[-HxW][-Np][-KhMs] or msg[-HxW][-Np][-Dd]
    co_players: str | None = None  # co-player, or a comma list to draw matches from (default: by game, a mixture)
    match_episodes: int = 10  # episodes of a match: the same co-players in the same seats
    prosocial: float = 0.0  # share of all players' mean reward, until it leaves, in the learner's; the rest is its own
    # PPO
    total_timesteps: int = 500_000  # game steps of the run, over all parallel games
    num_envs: int = 64  # parallel games
    num_steps: int = 64  # steps in each game an iteration
    learning_rate: float = 1e-3  # of policy and value (Adam)
    anneal: bool = True  # let learning rate and entropy bonus fall linearly over the run
    gamma: float | None = None  # discount (default: by game)
    gae_lambda: float = 0.95  # lambda of the advantage estimates
    update_epochs: int = 4  # passes over each rollout
    num_minibatches: int = 8  # minibatches a pass
    norm_adv: bool = True  # normalise advantages by minibatch
    clip_coef: float = 0.2  # PPO's clipping
    ent_coef: float = 0.02  # entropy bonus at the start
    ent_floor: float = 0.1  # share of the entropy bonus that is left at the end, if annealed
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient clipping
    hidden_size: int = 64  # width of policy, value and what the planner learns
    reward_scale: float | None = None  # factor on rewards in learning (default: 3 / the game's best mean return)
    # goals and MOA
    goal: Literal["inferred", "none", "oracle"] = "inferred"  # VAE's z, zero (Direct-OM), or the scripted ones' truth
    goal_size: int = 8  # dimensions of z
    moa_hidden_size: int = 64  # width of the MOA's networks
    moa_learning_rate: float = 3e-3  # of the MOA (Adam)
    moa_alpha: float = 0.01  # weight of KL(q(z|h) || N(0, I)) a step
    subgoal_coef: float = 0.1  # weight of the subgoal's reconstruction
    moa_updates: int = 8  # minibatches for the MOA an iteration
    moa_matches: int = 8  # matches in each
    moa_capacity: int = 1000  # matches that the MOA's buffer holds
    moa_buffer: Literal["all", "positive", "balanced"] = "all"  # which episodes it keeps and how it weighs them
    load_moa: str | None = None  # folder or checkpoint from which the MOA is taken
    freeze_moa: bool = False  # do not train the MOA
    pretrain_moa_steps: int = 0  # game steps played first, besides the run's, to train the VAE alone (subgoal and KL)
    # planner
    plan_update: Literal["offset", "hop", "none"] | None = None  # scores in the logits; instead of them; plain PPO
    plan_beta: float | None = None  # weight of the scores, over their running root mean square (default: by game)
    plan_until: float | None = None  # share of the run after which plain PPO goes on alone (default: by game)
    policy_target: Literal["q", "visits"] = "q"  # with hop, the planner's policy: exp(beta Q_plan), or the visit counts
    co_player_model: Literal["moa", "uniform"] = "moa"  # what co-players do in the search
    num_simulations: int | None = None  # simulations in each tree (default: by game)
    num_goal_samples: int = 4  # trees a decision, each with its own draw of the co-players' goals
    puct_c: float = 1.25  # weight of the prior against Q, which is scaled to 0..1
    max_depth: int = 50  # steps that the search looks ahead
    plan_horizon: Literal["bootstrap", "end"] = "bootstrap"  # in the search, V at the horizon; or nothing follows it
    goal_refresh: int = 0  # with inferred goals, infer them again every so many simulated steps; 0: keep the root's
    dirichlet_alpha: float = 0.3  # concentration of the noise in the root's prior, in training
    dirichlet_fraction: float = 0.25  # share of the noise


# method: simulations
FAMILY_DEFAULTS = {  # of the options that are None, by measurements (README.md)
    "msh": {"gamma": 0.99, "plan_update": "hop", "plan_beta": 2.0, "plan_until": 0.4, "num_simulations": 16},
    "msg": {"gamma": 0.85, "plan_update": "offset", "plan_beta": 1.0, "plan_until": 1.0, "num_simulations": 8},
}
# method: the search's options
NOT_NEGATIVE = [
    "goal_refresh",
    "seed",
    "ent_coef",
    "vf_coef",
    "moa_alpha",
    "subgoal_coef",
    "plan_beta",
    "pretrain_moa_steps",
]
# method: the search's options
SHARES = ["gamma", "gae_lambda", "prosocial", "ent_floor", "plan_until", "dirichlet_fraction"]


def resolved(args: Args) -> Args:
    """`args` with the game's defaults in place of None, checked. Raises UsageError."""
    game = GridGame(args.env_id)
    scripted = SCRIPTED_OF[game.family]
    if game.best_return <= 0:
        raise UsageError(f"nothing can be earned in {game.id}")
    defaults = {**FAMILY_DEFAULTS[game.family], "reward_scale": 3.0 / game.best_return}
    defaults["co_players"] = ",".join(["self", *scripted, *(f"{name}-noisy" for name in scripted if name != "random")])
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    for name, value in dataclasses.asdict(args).items():
        choices, wanted = re.findall(r"'(\w+)'", str(Args.__annotations__[name]).partition("Literal")[2]), ""
        if choices and value not in choices:
            wanted = f"one of {', '.join(choices)}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            low, high = 0 if name in (*SHARES, *NOT_NEGATIVE) else 1e-12, 1 if name in SHARES else 2**62
            wanted = "" if low <= value <= high else "in 0..1" if high == 1 else "positive" if low else "at least 0"
        if wanted:
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, not {value!r}")
    if args.total_timesteps < args.num_envs * args.num_steps:
        raise UsageError("--total-timesteps is less than one iteration (--num-envs times --num-steps)")
    if args.cuda and not torch.cuda.is_available():
        raise UsageError("--cuda: no CUDA device is available")
    if not re.fullmatch(r"[\w.+-]+", args.exp_name):
        raise UsageError(f"--exp-name must be letters, digits and . _ + -, not {args.exp_name!r}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Games
# ---------------------------------------------------------------------------------------------------------------------
UP, DOWN, LEFT, RIGHT, STAY = range(5)  # the moves; interactions (STAG, HARE or REMOVE) follow
COUNTDOWN = 5  # steps that Markov Stag-Hunt goes on after the first successful hunt
COUNT = r"(0|[1-9][0-9]{0,3})"
ITEM_COUNTS = {"msh": rf"{COUNT}h{COUNT}s", "msg": rf"{COUNT}d"}
GAME_IDS = {f: re.compile(rf"{f}(?:-{COUNT}x{COUNT})?(?:-{COUNT}p)?(?:-{items})?") for f, items in ITEM_COUNTS.items()}


class UsageError(ValueError):
    """What the user asked for cannot be done; `main` prints the message as one line and exits with status 2."""


class GameState(NamedTuple):
    """B parallel games; all int64. Everything that changes while a game is played, and nothing else."""

    players: Tensor  # [B, N] cell row * W + col; -1 once the player has left
    items: Tensor  # [B, M] cell, stags before hares; -1 once gone
    time: Tensor  # [B] steps done
    first_hunt: Tensor  # [B] number of the step of the first successful hunt; 0 before it and in `msg`

    def rows(self, index: Tensor) -> "GameState":
        """The games at `index` (int64 [B'] or bool [B]), as a state of B' games."""
        return GameState(*(field[index] for field in self))

    def replaced(self, which: Tensor, other: "GameState") -> "GameState":
        """This state with the games of bool [B] `which` taken from `other`."""
        pairs = zip(self, other, strict=True)
        return GameState(*(torch.where(which.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs))


class GridGame:
    """Markov Stag-Hunt (`msh`) or Markov Snowdrift (`msg`): fixed facts of one game, and pure functions of its state.
    Ids are `msh[-HxW][-Np][-KhMs]` (K hares, M stags; `msh` is `msh-8x8-4p-4h1s`) and `msg[-HxW][-Np][-Dd]` (D drifts;
    `msg` is `msg-8x8-4p-6d`). Games of Huang et al. 2024 (HOP, arXiv 2406.08002). Players act at once; an
    action is read against the state before the step. Raises UsageError for an id that names no game."""

    def __init__(self, env_id: str, device: str | torch.device = "cpu"):
        self.family, match = next(((f, m) for f, r in GAME_IDS.items() if (m := r.fullmatch(env_id))), ("", None))
        if match is None:
            raise UsageError(f"unknown game {env_id!r}: ids are msh[-HxW][-Np][-KhMs] and msg[-HxW][-Np][-Dd]")
        height, width, players, *counts = (None if group is None else int(group) for group in match.groups())
        self.height, self.width, self.num_players = height or 8, width or 8, players or 4
        counts = counts if counts[0] is not None else {"msh": [4, 1], "msg": [6]}[self.family]
        self.item_counts = counts[::-1]  # stags before hares
        self.num_items, self.num_cells = sum(counts), self.height * self.width
        if 0 in (height, width, players) or self.item_counts[0] == 0:
            raise UsageError(f"bad game id {env_id!r}: sides, players, stags and drifts must be at least 1")
        if self.num_items > self.num_cells:
            raise UsageError(f"bad game id {env_id!r}: {self.num_items} items on {self.num_cells} cells")
        if self.num_cells > 4096 or self.num_players > 64:
            raise UsageError(f"bad game id {env_id!r}: at most 4096 cells and 64 players")
        msh = self.family == "msh"
        self.id = f"{self.family}-{self.height}x{self.width}-{self.num_players}p-"  # one spelling a game
        self.id += f"{counts[0]}h{counts[1]}s" if msh else f"{counts[0]}d"
        self.item_names = ["stag", "hare"] if msh else ["drift"]
        self.action_names = ["up", "down", "left", "right", "stay", *(["stag", "hare"] if msh else ["remove"])]
        self.num_actions, self.horizon = len(self.action_names), 35 if msh else 50
        self.obs_shape = (self.num_players + len(self.item_names), self.height, self.width)
        self.device = torch.device(device)
        kind = torch.repeat_interleave(torch.arange(len(self.item_counts)), torch.tensor(self.item_counts))
        self.item_kind = kind.to(device)  # int64 [M]
        self.item_action = self.item_kind + 5  # int64 [M] the action that takes it
        self.quota = (2 - self.item_kind if msh else self.item_kind + 1).to(device)  # int64 [M] players needed
        self.share = torch.tensor([10.0, 1.0] if msh else [-4.0], device=device)[self.item_kind]  # split by the takers
        self.bonus = 0.0 if msh else 6.0  # to every player for every item taken
        cell = torch.arange(self.num_cells, device=device)
        row, col = cell // self.width, cell % self.width
        legal = torch.stack([row > 0, row < self.height - 1, col > 0, col < self.width - 1, row >= 0], 1)
        by = legal * torch.tensor([-self.width, self.width, -1, 1, 0], device=device)  # an illegal move is STAY
        moved = cell[:, None] + F.pad(by, (0, len(self.item_names)))
        # row S of every table is reached by index -1: left or gone
        self.legal_moves = torch.cat([legal, torch.arange(5, device=device)[None] == STAY])  # bool [S + 1, 5]
        self.next_cell = F.pad(moved, (0, 0, 0, 1), value=-1)  # int64 [S + 1, A]
        distance = (row[:, None] - row).abs() + (col[:, None] - col).abs()
        self.distance = F.pad(distance, (0, 1, 0, 1), value=4 * (self.height + self.width))  # int64 [S + 1, S + 1]

    @property
    def best_return(self) -> float:
        """Highest possible mean return per player, over all ways to play together (undiscounted)."""
        if self.family == "msg":
            return self.item_counts[0] * (6.0 - 4.0 / self.num_players)
        stags = range(min(self.item_counts[0], self.num_players // 2) + 1)
        return max(10.0 * s + min(self.item_counts[1], self.num_players - 2 * s) for s in stags) / self.num_players

    def initial_state(self, batch: int, generator: Generator | None = None) -> GameState:
        """A fresh GameState of `batch` games: players on any cells, items on distinct cells, all uniform."""
        players = torch.randint(self.num_cells, (batch, self.num_players), generator=generator, device=self.device)
        order = torch.rand(batch, self.num_cells, generator=generator, device=self.device).argsort(1)
        zeros = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return GameState(players, order[:, : self.num_items], zeros, zeros)

    def hits(self, state: GameState, actions: Tensor) -> Tensor:
        """bool [B, N, M]: player n plays the interaction of item m on its cell, in `actions` int64 [B, N]."""
        on_cell = state.players.unsqueeze(2) == state.items.unsqueeze(1).masked_fill(state.items.unsqueeze(1) < 0, -2)
        return on_cell & (actions.unsqueeze(2) == self.item_action)

    def step(self, state: GameState, actions: Tensor) -> tuple[GameState, Tensor, Tensor, Tensor]:
        """Next state, reward float32 [B, N], terminated bool [B], truncated bool [B] for `actions` int64 [B, N].
        Draws nothing, resets nothing, changes no argument; illegal actions count as STAY. Raises ValueError if an
        action lies outside 0..A-1 (not checked inside torch.compile)."""
        if not torch.compiler.is_compiling() and bool(((actions < 0) | (actions >= self.num_actions)).any()):
            raise ValueError(f"actions must lie in 0..{self.num_actions - 1}")
        hits = self.hits(state, actions)
        takers = hits.sum(1)  # [B, M]
        taken = takers >= self.quota
        wins = hits & taken.unsqueeze(1)
        reward = (wins * (self.share / takers.clamp(min=1)).unsqueeze(1)).sum(2) + self.bonus * taken.sum(
            1, keepdim=True
        )
        items = state.items.masked_fill(taken, -1)
        players, time = self.next_cell[state.players, actions], state.time + 1
        first_hunt, terminated = state.first_hunt, (items < 0).all(1)
        if self.family == "msh":
            players = players.masked_fill(wins.any(2), -1)
            first_hunt = torch.where((first_hunt == 0) & taken.any(1), time, first_hunt)
            terminated = terminated | (players < 0).all(1) | ((first_hunt > 0) & (time >= first_hunt + COUNTDOWN))
        return GameState(players, items, time, first_hunt), reward, terminated, (time >= self.horizon) & ~terminated

    def clock(self, state: GameState) -> Tensor:
        """int64 [B, 2]: steps done, steps left until the game must end (the countdown after a first hunt included)."""
        end = torch.where(state.first_hunt > 0, (state.first_hunt + COUNTDOWN).clamp(max=self.horizon), self.horizon)
        return torch.stack([state.time, end - state.time], 1)

    def action_mask(self, state: GameState) -> Tensor:
        """bool [B, N, A]: legal actions; STAY alone for a player that has left."""
        on_cell = state.players.unsqueeze(2) == state.items.unsqueeze(1).masked_fill(state.items.unsqueeze(1) < 0, -2)
        interact = [here.any(2, keepdim=True) for here in on_cell.split(self.item_counts, 2)]
        return torch.cat([self.legal_moves[state.players], *interact], 2)

    def observe(self, state: GameState) -> Tensor:
        """float32 [B, N, C, H, W]: seat i's view; own plane, then players i+1, i+2, ... mod N, then a plane a kind."""
        cells = torch.cat([state.players, state.items], 1) % (self.num_cells + 1)  # -1 becomes S, off the end
        planes = F.one_hot(cells, self.num_cells + 1)[..., :-1].float()  # [B, N + M, S]
        players, *items = planes.split([self.num_players, *self.item_counts], 1)
        seats = torch.arange(self.num_players, device=self.device)
        players = players[:, (seats[:, None] + seats) % self.num_players]  # [B, N, N, S]
        items = torch.stack([part.sum(1) for part in items], 1).unsqueeze(1).expand(-1, self.num_players, -1, -1)
        return torch.cat([players, items], 2).unflatten(-1, (self.height, self.width))


# ---------------------------------------------------------------------------------------------------------------------
# Rendering and the PettingZoo environment
# ---------------------------------------------------------------------------------------------------------------------
PLAYER_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#AA4499", "#117799", "#997700", "#882255", "#444444"]
ITEM_LOOKS = {"stag": (3, 180, "#C8A27A"), "hare": (4, 45, "#F2D76B"), "drift": (6, 0, "#BFE3F5")}  # sides, turn, fill
METADATA = {"name": "hop_grid_v0", "render_modes": ["rgb_array", "ansi"], "render_fps": 4, "is_parallelizable": True}


def render_frame(game: GridGame, state: GameState, beliefs: dict | None = None, title: str = "") -> np.ndarray:
    """Picture of the one game in `state`: uint8 [H', W', 3], of one size for one game with, and without, beliefs.
    `beliefs` is {"focal": seat, "probs": float [N, M + 1]}: what the focal player takes each player's next item to be,
    last column none. Every co-player gets a bar chart, and a line to the item that it most likely heads for."""
    cells, item_cells, (time, steps_left) = state.players[0].tolist(), state.items[0].tolist(), game.clock(state)[0]
    names = [f"{game.item_names[k]} {m - sum(game.item_counts[:k])}" for m, k in enumerate(game.item_kind.tolist())]
    colours, focal = PLAYER_COLOURS * game.num_players, None if beliefs is None else int(beliefs["focal"])
    charts = [seat for seat in range(game.num_players) if focal not in (None, seat)]
    # everything is drawn at twice its size and halved at the end, which smooths the edges
    half, top, chart_h = min(96, max(16, 448 // max(game.height, game.width))), 104, 44 + 28 * (game.num_items + 1)
    cell, side_x, body_h = 2 * half, 48 + 2 * half * game.width, max(260, 2 * half * game.height, chart_h * len(charts))
    image = Image.new("RGB", (max(640, side_x + 64 + 440 * bool(charts)), top + body_h + 24), "white")
    draw, centres, disks = ImageDraw.Draw(image), [], []
    draw.text((24, 12), title, "black", font_size=30)
    draw.text((24, 58), f"time {time}, {steps_left} steps left", "#555555", font_size=30)
    for c in range(game.num_cells):
        x, y = 24 + c % game.width * cell, top + c // game.width * cell
        draw.rectangle((x, y, x + cell, y + cell), "#FAFAF7", "#C8C8C8", 2)
        centres.append((x + half, y + half))
    columns, slot = math.ceil(game.num_players**0.5), (body_h - 36) / game.num_players
    for seat, c in enumerate(cells):  # each seat has a place of its own in every cell, and beside the grid for the end
        (x, y), w, (row, column) = centres[c], cell / columns, divmod(seat, columns)
        place = (x - half + (column + 0.5) * w, y - half + (row + 0.5) * w, max(2.0, 0.36 * w))  # with the radius
        disks.append(place if c >= 0 else (side_x + 28, top + 36 + (seat + 0.5) * slot, min(23.0, 0.45 * slot)))
    draw.text((side_x, top), "left" if min(cells) < 0 else "", "#555555", font_size=24)
    for k, seat in enumerate(charts):
        probs, text = beliefs["probs"][seat], f"player {seat}{' (left)' if cells[seat] < 0 else ''}: next item?"
        draw.text((side_x + 80, top + k * chart_h), text, colours[seat], font_size=24)
        for m, (name, c) in enumerate(zip([*names, "none"], [*item_cells, -1], strict=True)):
            x, y, p = side_x + 80, top + k * chart_h + 34 + 28 * m, float(probs[m]) * (cells[seat] >= 0)
            place = f" ({c // game.width},{c % game.width})" if c >= 0 else " (gone)" if m < game.num_items else ""
            draw.text((x, y), name + place, "black", font_size=22)
            draw.rectangle((x + 180, y + 3, x + 400, y + 23), "#EDEDED")
            draw.rectangle((x + 180, y + 3, x + 180 + 220 * p, y + 23), colours[seat] if p > 0 else "#EDEDED")
            if p > 0 and c >= 0 and m == np.argmax(probs):
                draw.line((*disks[seat][:2], *centres[c]), colours[seat], round(2 + 8 * p))
    for name, c in zip(names, item_cells, strict=True):
        if c >= 0:
            draw.regular_polygon((*centres[c], 0.48 * cell), *ITEM_LOOKS[name.split()[0]], "#6B5B45", 2)
            draw.text(centres[c], name[0].upper(), "black", anchor="mm", font_size=cell // 4)
    for seat, (x, y, r) in enumerate(disks):
        draw.ellipse((x - r, y - r, x + r, y + r), colours[seat], *(("black", 6) if seat == focal else ("white", 2)))
        draw.text((x, y), str(seat), "white", anchor="mm", font_size=max(6, int(1.2 * r)))
    return np.array(image.reduce(2))


def render_text(game: GridGame, state: GameState) -> str:
    """The one game in `state`, a row a line: S, H or D an item, the seats of the players on the cell, `.` nothing."""
    cells, items, (time, steps_left) = state.players[0].tolist(), state.items[0].tolist(), game.clock(state)[0]
    seats = {c: ",".join(str(seat) for seat, at in enumerate(cells) if at == c) for c in range(-1, game.num_cells)}
    letters = {c: game.item_names[k][0].upper() for c, k in zip(items, game.item_kind.tolist(), strict=True)}
    texts = [letters.get(c, "") + seats[c] or "." for c in range(game.num_cells)]
    wide = max(4, max(map(len, texts)) + 1)
    rows = ["".join(text.ljust(wide) for text in texts[c : c + game.width]) for c in range(0, len(texts), game.width)]
    left = f", players that left: {seats[-1]}" if seats[-1] else ""
    return "\n".join([*(row.rstrip() for row in rows), f"time {time}, {steps_left} steps left{left}"])


class GridParallelEnv(ParallelEnv):
    """One GridGame as a PettingZoo ParallelEnv, its agents `player_0` ... `player_{N-1}` in seat order. Observations
    are {"observation": float32 [C, H, W], "action_mask": int8 [A]}; infos hold "action_mask" again and "clock", int64
    [2]. A player that leaves the game is terminated in that step. An illegal action counts as STAY. Raises UsageError
    for an unknown game or render mode, ValueError for an action outside the action space."""

    metadata = METADATA

    def __init__(self, env_id: str = "msh-4h1s", render_mode: str | None = None):
        if render_mode not in (None, *METADATA["render_modes"]):
            raise UsageError(f"unknown render mode {render_mode!r}: it is rgb_array, ansi or None")
        self.game, self.render_mode, self.game_state, self.generator = GridGame(env_id), render_mode, None, Generator()
        self.generator.seed()  # fresh entropy, until reset is given a seed
        self.possible_agents, self.agents = [f"player_{seat}" for seat in range(self.game.num_players)], []
        planes, num_actions = (0.0, 1.0, self.game.obs_shape, np.float32), self.game.num_actions
        self.state_space, self.observation_spaces, self.action_spaces = spaces.Box(*planes), {}, {}
        for agent in self.possible_agents:
            view = {"observation": spaces.Box(*planes), "action_mask": spaces.MultiBinary(num_actions)}
            self.observation_spaces[agent], self.action_spaces[agent] = spaces.Dict(view), spaces.Discrete(num_actions)

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def views(self) -> tuple[dict, dict]:
        """Observations and infos of the agents that are in the game."""
        game, state, seats = self.game, self.game_state, [self.possible_agents.index(agent) for agent in self.agents]
        planes, mask = game.observe(state)[0].numpy(), game.action_mask(state)[0].to(torch.int8).numpy()
        infos = {f"player_{i}": {"action_mask": mask[i].copy(), "clock": game.clock(state)[0].numpy()} for i in seats}
        return {f"player_{i}": {"observation": planes[i], "action_mask": mask[i]} for i in seats}, infos

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.game_state, self.agents = self.game.initial_state(1, self.generator), self.possible_agents[:]
        return self.views()

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            raise RuntimeError("no game is being played: call reset first")
        for agent in self.agents:
            if not self.action_space(agent).contains(actions.get(agent)):
                raise ValueError(f"{agent}: action {actions.get(agent)!r} is not in {self.action_space(agent)}")
        played = [int(actions[agent]) if agent in self.agents else STAY for agent in self.possible_agents]
        self.game_state, reward, over, cut = self.game.step(self.game_state, torch.tensor([played]))
        over = over | (self.game_state.players[0] < 0)  # bool [N]: a player that leaves is terminated
        by_seat = [dict(zip(self.possible_agents, x.tolist(), strict=True)) for x in (reward[0], over, cut & ~over)]
        results, (observations, infos) = [{agent: x[agent] for agent in self.agents} for x in by_seat], self.views()
        self.agents = [agent for agent in self.agents if not (results[1][agent] or results[2][agent])]
        return observations, *results, infos

    def state(self) -> np.ndarray:
        """float32 [C, H, W]: a plane for each player in seat order, then one for each kind of item."""
        return self.game.observe(self.game_state)[0, 0].numpy()  # seat 0's view is in seat order

    def render(self) -> np.ndarray | str | None:
        draw = {"rgb_array": render_frame, "ansi": render_text}.get(self.render_mode, lambda game, state: None)
        return draw(self.game, self.game_state)


parallel_env = GridParallelEnv  # parallel_env(env_id, render_mode), the name that PettingZoo's own environments have


# ---------------------------------------------------------------------------------------------------------------------
# Co-players
# ---------------------------------------------------------------------------------------------------------------------
SCRIPTED = ("random", "ns", "nh", "cleaner", "exploiter")
SCRIPTED_OF = {"msh": ("ns", "nh", "random"), "msg": ("cleaner", "exploiter", "random")}
NOISE = 0.2  # probability of a uniform legal action instead, in the `-noisy` kinds


def scripted_actions(
    game: GridGame, state: GameState, mask: Tensor, kind: Tensor, noisy: Tensor, target: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Actions int64 [B, N] and targets int64 [B, N] (item index, -1 none) of scripted players at every seat. `kind`
    int64 [B, N] indexes SCRIPTED (others act as `random`), `noisy` bool [B, N], `mask` bool [B, N, A]; `target` that of
    the step before. Nearest is by Manhattan distance, ties uniform; a target is kept while it is there."""
    ns, nh, cleaner, exploiter = (kind == k for k in range(1, 5))
    present, left = state.items >= 0, state.players < 0  # [B, M], [B, N]
    stags = (present & (game.item_kind == 0)).any(1, keepdim=True)
    wanted = torch.where(cleaner | (ns & stags), 0, torch.where(ns | nh, 1, -1)).masked_fill(left, -1)  # kind of item
    eligible = present.unsqueeze(1) & (game.item_kind == wanted.unsqueeze(2))  # [B, N, M]
    away = game.distance[state.players.unsqueeze(2), state.items.unsqueeze(1)].masked_fill(~eligible, 1 << 20)
    nearest = (away + 0.5 * torch.rand(away.shape, generator=generator, device=away.device)).argmin(2)
    keep = (target >= 0) & eligible.gather(2, target.clamp(min=0).unsqueeze(2)).squeeze(2)
    target = torch.where(keep, target, torch.where(eligible.any(2), nearest, -1))
    item, action = target.clamp(min=0), torch.arange(game.num_actions, device=mask.device)
    goal = state.items.gather(1, item).unsqueeze(2)  # [B, N, 1] cell
    reach = game.distance[game.next_cell[state.players], goal]  # [B, N, A] how far it is after each action
    take = game.item_action[item].unsqueeze(2) == action
    allowed = torch.where(state.players.unsqueeze(2) == goal, take, reach < reach[..., STAY : STAY + 1])
    allowed = torch.where(target.unsqueeze(2) < 0, action == STAY, allowed)
    allowed = torch.where(exploiter.unsqueeze(2), mask & (action <= STAY), allowed)
    noise = noisy & (torch.rand(kind.shape, generator=generator, device=kind.device) < NOISE)
    allowed = torch.where((noise | left | ~(ns | nh | cleaner | exploiter)).unsqueeze(2), mask, allowed)
    draw = 1.0 - torch.rand(mask.shape, generator=generator, device=mask.device)  # in (0, 1]
    return (allowed * draw).argmax(2), target


class CoPlayers:
    """Who sits where in B parallel matches, and what the seats that are not the learner's play. `pool` lists co-players
    (module docstring); a match draws from it: half of the matches one kind at all N-1 seats, half seat by seat. With
    `fixed`, `pool` has N-1 entries and each plays in every match. Seats are dealt at random at each match. Kind 0 is
    `self`: those seats are played, and learnt from, by the learner. Raises UsageError."""

    def __init__(self, game: GridGame, pool: list, batch: int, match_episodes: int, generator: Generator, fixed=False):
        self.game, self.batch, self.match_episodes, self.generator = game, batch, match_episodes, generator
        n, device, self.fixed = game.num_players, game.device, fixed
        if fixed and len(pool) != n - 1:
            raise UsageError(f"{game.id} takes {n - 1} co-players, not {len(pool)}")
        pool = ["self", *(str(entry).strip() if isinstance(entry, str | Path) else entry for entry in pool)]
        kinds = [entry for k, entry in enumerate(pool) if entry not in pool[:k]]  # each different one once
        index = [kinds.index(entry) for entry in pool[1:]]
        resolved_kinds = [resolve_co_player(game, entry) for entry in kinds]
        self.names, self.players, script = (list(field) for field in zip(*resolved_kinds, strict=True))
        self.memory = {k: p.moa.initial_memory(batch) for k, p in enumerate(self.players) if hasattr(p, "moa")}
        self.objects = []  # (kind, slot, callable) of those that play
        for k, player in enumerate(self.players):  # of a kind: None, scripted or self; an Agent; N-1 callables, by slot
            if callable(player) and k not in self.memory:
                with refused(f"cannot make co-player {self.names[k]!r}"):
                    made = [player() if isinstance(player, type) else copy.deepcopy(player) for _ in range(1, n)]
                self.objects += [(k, s, one) for s, one in enumerate(made, 1) if not fixed or index[s - 1] == k]
                self.players[k] = made
        self.pool = torch.tensor(index, dtype=torch.int64, device=device)  # [entries] kind
        self.script = torch.tensor(script, device=device)  # [kinds] index into SCRIPTED, -1: not scripted
        self.noisy = torch.tensor([name.endswith("-noisy") for name in self.names], device=device) & (self.script >= 0)
        self.seat = self.kind = torch.zeros(batch, n, dtype=torch.int64, device=device)  # seat of slot; kind of seat
        self.target = torch.full_like(self.kind, -1)  # [B, N] item index that a scripted player walks to
        self.episode = self.kind[:, 0]  # [B] number within the match
        self.start_matches(torch.ones(batch, dtype=torch.bool, device=device))

    @property
    def learner(self) -> Tensor:
        """bool [B, N]: the seat is played by the learned policy."""
        return self.kind == 0

    def start_matches(self, which: Tensor) -> None:
        """Deals seats and kinds anew in the games of bool [B] `which`; slot 0 is the focal player's, always `self`."""
        b, n, dev, generator = self.batch, self.game.num_players, self.game.device, self.generator
        seat, drawn = torch.rand(b, n, generator=generator, device=dev).argsort(1), self.pool.expand(b, -1)
        if not self.fixed:
            each = torch.randint(len(self.pool), (b, n - 1), generator=generator, device=dev)
            alike = torch.rand(b, 1, generator=generator, device=dev) < 0.5
            drawn = self.pool[torch.where(alike, each[:, :1], each)]
        kind, rows = torch.zeros_like(seat).scatter(1, seat[:, 1:], drawn), which.unsqueeze(1)
        self.seat, self.kind = torch.where(rows, seat, self.seat), torch.where(rows, kind, self.kind)
        self.target, self.episode = self.target.masked_fill(rows, -1), self.episode.masked_fill(which, 0)
        for k, slot, player in self.objects:
            if hasattr(player, "start_match"):
                player.start_match(which & (self.kind.gather(1, self.seat[:, slot : slot + 1]).squeeze(1) == k))

    def act(self, state: GameState, mask: Tensor) -> Tensor:
        """Actions int64 [B, N] of all seats but the learner's (there: arbitrary legal ones). Raises UsageError."""
        game, generator, script, noisy = self.game, self.generator, self.script[self.kind], self.noisy[self.kind]
        actions, self.target = scripted_actions(game, state, mask, script, noisy, self.target, generator)
        for k, memory in self.memory.items():
            agent, here = self.players[k], self.kind == k
            chosen = agent.act(state, mask, memory, here, generator, self.oracle(agent, state)).action
            actions = torch.where(here, chosen, actions)
        for k, slot, player in self.objects:
            seat, games = self.seat[:, slot], torch.arange(self.batch, device=game.device)
            chosen = player(game.observe(state)[games, seat], mask[games, seat], game.clock(state), generator)
            good = isinstance(chosen, Tensor) and chosen.shape == seat.shape and not chosen.is_floating_point()
            if not good or ((chosen < 0) | (chosen >= game.num_actions)).any():
                wanted = f"an integer tensor [{self.batch}] of actions in 0..{game.num_actions - 1}"
                raise UsageError(f"co-player {self.names[k]!r} must return {wanted}")
            here = (self.kind == k) & (torch.arange(game.num_players, device=game.device) == seat.unsqueeze(1))
            chosen = chosen.to(actions)
            chosen = chosen.where(mask[games, seat, chosen], STAY)  # as the game takes it: the MOA learns from these
            actions = torch.where(here, chosen.unsqueeze(1), actions)
        return actions

    def oracle(self, agent: "Agent", state: GameState) -> Tensor | None:
        """[B, N, Zo] true kinds and targets of the step under way, for an agent of `--goal oracle`; else None."""
        told = (self.script[self.kind], self.noisy[self.kind], self.target)
        return true_goals(agent.relative, state, *told) if agent.args.goal == "oracle" else None

    def observe(self, state: GameState, actions: Tensor, ended: Tensor) -> Tensor:
        """Takes in one step (`actions` [B, N] in `state`, `ended` bool [B]); returns bool [B]: the match ended, too."""
        self.target, self.episode = self.target.masked_fill(ended.unsqueeze(1), -1), self.episode + ended
        match_ended = ended & (self.episode >= self.match_episodes)
        for k, memory in self.memory.items():
            self.memory[k] = self.players[k].remember(memory, state, actions, ended, match_ended)
        if match_ended.any():
            self.start_matches(match_ended)
        return match_ended


def resolve_co_player(game: GridGame, entry: str | Callable) -> tuple[str, Callable | None, int]:
    """Name, player (None: `self` or scripted) and index in SCRIPTED (-1: none) of one co-player. Raises UsageError."""
    name, player = getattr(entry, "__name__", type(entry).__name__), entry
    if isinstance(entry, str):
        name, stem, scripted = entry, entry.removesuffix("-noisy"), SCRIPTED_OF[game.family]
        if entry == "self" or stem in scripted:
            return name, None, SCRIPTED.index(stem) if stem in SCRIPTED else -1
        if stem in SCRIPTED:
            raise UsageError(f"co-player {name!r} does not play {game.family}: {', '.join(scripted)} do")
        if entry.endswith(".pt") or (entry and Path(entry).exists()):
            player = load_agent(entry, game.device, env_id=game.id)
        elif ":" in entry:
            with refused(f"cannot import co-player {name!r}"):
                module, attribute = entry.split(":")
                player = getattr(importlib.import_module(module), attribute)
    if isinstance(player, str) or not callable(player):
        raise UsageError(f"unknown co-player {entry!r}: give a name, a checkpoint, package.module:name or a callable")
    return name, player, -1


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
class RelativeFeatures:
    """What networks read of a state: fixed functions of relative cells, summed over items of a kind. No parameters.
    Own features [.., X]: clock, legal moves, and for each kind of item the sum over its items of R functions of the
    cell relative to the own cell. Features of a co-player [.., Y]: the R functions of its relative cell, and what it
    sees of the items itself. A player that has left, or an item that is gone, adds zero."""

    def __init__(self, game: GridGame):
        self.game, height, width, dev = game, game.height, game.width, game.device
        dr = torch.arange(1 - height, height, device=dev).float().repeat_interleave(2 * width - 1)
        dc = torch.arange(1 - width, width, device=dev).float().repeat(2 * height - 1)
        d, size = dr.abs() + dc.abs(), max(height, width)
        near, far = torch.exp(-d / 1.5), torch.exp(-d / 4.0)
        functions = [d >= 0, d == 0, d == 1, d == 2, dr == 0, dc == 0, near, far]
        functions += [x / size for x in (dr, dc, dr.abs(), dc.abs(), d)]
        functions += [way * x for way in (dr < 0, dr > 0, dc < 0, dc > 0) for x in (near, far)]
        self.size, self.absent = len(functions), len(d)
        self.table = F.pad(torch.stack([f.float() for f in functions], 1), (0, 0, 0, 1))  # [relative cells + 1, R]
        cell = torch.arange(game.num_cells, device=dev)
        line, centre = cell // width * (2 * width - 1) + cell % width, (height - 1) * (2 * width - 1) + width - 1
        self.line = F.pad(line, (0, 1), value=4 * self.absent)  # [S + 1] where the other cell lies
        self.origin = F.pad(line - centre, (0, 1), value=-4 * self.absent)  # [S + 1] where the own cell lies
        steps = torch.arange(game.horizon + 1, device=dev).float()
        # no step begins with 0 left, so V is never trained there; at the time limit it is read as with 1 left
        done, left = steps[:, None].expand(-1, len(steps)), steps.clamp(min=1.0).expand(len(steps), -1)
        clock = [done / game.horizon, left / game.horizon, torch.exp(-left / 2), torch.exp(-left / 8), left <= 5]
        clock += [left == 1, left == 2, left == 3, done + left < game.horizon, done >= 0]
        self.clock_table = torch.stack([c.float() for c in clock], 2)  # [T + 1, T + 1, 10]
        self.own_size = len(clock) + 5 + len(game.item_counts) * self.size  # X
        self.other_size = (1 + len(game.item_counts)) * self.size  # Y
        seats = torch.arange(game.num_players, device=dev)
        self.others = (seats[:, None] + seats[1:]) % game.num_players  # [N, N-1] the co-players of each seat

    def index(self, own: Tensor, other: Tensor) -> Tensor:
        """int64 [..] row of `table` for the cells `other` relative to the cells `own` (int64, broadcast)."""
        return (self.line[other] - self.origin[own]).clamp(max=self.absent)

    def cells(self, own: Tensor, other: Tensor) -> Tensor:
        """[.., R] functions of the cells `other` relative to the cells `own` (int64, broadcast)."""
        return self.table[self.index(own, other)]

    def items(self, own: Tensor, items: Tensor) -> Tensor:
        """[.., kinds * R] what is seen of `items` [.., M] from the cells `own` [..]."""
        kinds = self.index(own.unsqueeze(-1), items).flatten(0, -2).split(self.game.item_counts, 1)
        none = self.table.new_zeros(own.numel(), self.size)
        sums = [F.embedding_bag(kind, self.table, mode="sum") if kind.shape[1] else none for kind in kinds]
        return torch.cat(sums, 1).unflatten(0, own.shape)

    def clock_and_walls(self, own: Tensor, clock: Tensor) -> Tensor:
        """[.., 15] functions of the `clock` [.., 2], and the legal moves at the cells `own` [..]."""
        return torch.cat([self.clock_table[clock[..., 0], clock[..., 1]], self.game.legal_moves[own]], -1)

    def __call__(self, state: GameState) -> tuple[Tensor, Tensor]:
        """Own features [B, N, X] and co-players' features [B, N, N-1, Y] of every seat."""
        n = self.game.num_players
        items, clock = (x.unsqueeze(1).expand(-1, n, -1) for x in (state.items, self.game.clock(state)))
        seen = self.items(state.players, items)
        near = self.cells(state.players.unsqueeze(2), state.players[:, self.others])
        own = torch.cat([self.clock_and_walls(state.players, clock), seen], 2)
        return own, torch.cat([near, seen[:, self.others]], 3)


def layer(inputs: int, outputs: int, gain: float = math.sqrt(2.0), bias: bool = True) -> nn.Linear:
    """A linear layer with orthogonal weights of the given gain and zero bias."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.orthogonal_(linear.weight, gain)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class RelativeNetwork(nn.Module):
    """out(relu(hidden(relu(own(x) + goal(g) + mix(sum over co-players of relu(other(y_j)))))))."""

    def __init__(self, own: int, other: int, goal: int, outputs: int, hidden: int, gain: float):
        super().__init__()
        self.own, self.other, self.mix = layer(own, hidden), layer(other, hidden // 2), layer(hidden // 2, hidden)
        self.goal, self.hidden = layer(goal, hidden, bias=False), layer(hidden, hidden)
        self.out = layer(hidden, outputs, gain)

    def forward(self, own: Tensor, others: Tensor, goal: Tensor) -> Tensor:
        """[.., outputs] of own [.., X], others [.., N-1, Y], goal [.., Z]; or [.., K, outputs] of goals [.., K, Z]."""
        return self.head(own, F.relu(self.other(others)).sum(-2), goal)

    def head(self, own: Tensor, seen: Tensor, goal: Tensor) -> Tensor:
        """The same when what is seen of the co-players is already summed, in `seen` [.., H / 2]."""
        first, goal = self.own(own) + self.mix(seen), self.goal(goal)
        first = first.unsqueeze(-2) if goal.dim() > first.dim() else first
        return self.out(F.relu(self.hidden(F.relu(first + goal))))

    def other_parts(self, relative: RelativeFeatures, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The layer `other` in two summands: one by relative cell, a row for each of `relative.table`; one of `rest`,
        the co-players' other features [.., Y - R]."""
        near, far = self.other.weight.tensor_split([relative.size], 1)
        return relative.table @ near.T, F.linear(rest, far, self.other.bias)


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """`logits` [.., A] with -1e9 where bool `mask` [.., A] is False."""
    return logits.masked_fill(~mask, -1e9)


def sample(logits: Tensor, generator: Generator) -> Tensor:
    """int64 [..]: draws from softmax(`logits` [.., A]) (Gumbel-max)."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(min=1e-20)
    return (logits - (-uniform.log()).log()).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Goal model and MOA
# ---------------------------------------------------------------------------------------------------------------------
class Memory(NamedTuple):
    """What a MOA has seen of every seat in the running match, as sums over steps of a joint feature of (o, a)."""

    match: Tensor  # float32 [B, N, E + 1] over the match; the last entry counts steps
    episode: Tensor  # float32 [B, N, E + 1] over the episode


class MOA(nn.Module):
    """Model of other agents: encoder q_phi(z_j | h_j), decoder pi_hat(a_j | o_j, t, z_j), and the subgoal's decoder.
    The encoder sums a feature of each (o_j, a_j) over the match and over the episode, so it is updated step by step.
    The subgoal of j is the item of its next successful interaction in the episode, or none (OMG, Yu et al. 2024)."""

    def __init__(self, relative: RelativeFeatures, hidden: int, latent: int, goal: str):
        super().__init__()
        game, own, other = relative.game, relative.own_size, relative.other_size
        seen, queries = own + relative.size, len(game.item_counts) * relative.size + 1
        self.relative, self.goal, self.summary = relative, goal, hidden
        self.goal_size = len(SCRIPTED) + 3 + relative.size if goal == "oracle" else latent
        self.step_feature = layer(seen + game.num_actions, hidden, 1.0)
        first = layer(4 * hidden + 2 + seen, 2 * hidden)
        self.encoder = nn.Sequential(first, nn.ReLU(), layer(2 * hidden, 2 * latent, 0.1))
        self.decoder = RelativeNetwork(own, other, self.goal_size, game.num_actions, hidden, 0.01)
        self.subgoal = RelativeNetwork(own, other, self.goal_size, queries, hidden, 0.01)

    def initial_memory(self, batch: int) -> Memory:
        """The empty memory of B matches."""
        zeros = torch.zeros(batch, self.relative.game.num_players, self.summary + 1, device=self.relative.game.device)
        return Memory(zeros, zeros)

    def seen(self, own: Tensor, others: Tensor) -> Tensor:
        """[.., X + R] own features beside the sum over co-players of their relative cells' functions."""
        return torch.cat([own, others[..., : self.relative.size].sum(-2)], -1)

    def features(self, seen: Tensor, actions: Tensor, active: Tensor) -> Tensor:
        """[.., E + 1] what one step adds to the memory; 0 where bool `active` [..] is False."""
        chosen = F.one_hot(actions, self.relative.game.num_actions)
        feature = torch.tanh(self.step_feature(torch.cat([seen, chosen], -1)))
        return F.pad(feature, (0, 1), value=1.0) * active.unsqueeze(-1)

    def encode(self, memory: Memory, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation [.., Z] of q_phi(z | h): sums [.., E + 1] of `memory`, o now in `seen`."""
        inputs = [seen]
        for total in memory:
            sums, count = total[..., :-1], total[..., -1:]
            inputs += [sums / (1.0 + count), sums / (10.0 + 0.2 * count), torch.log1p(count) / 4.0]
        mean, log_std = self.encoder(torch.cat(inputs, -1)).chunk(2, -1)
        return mean, log_std.clamp(-6.0, 2.0)

    def subgoal_logits(self, cells: Tensor, items: Tensor, own: Tensor, others: Tensor, goal: Tensor) -> Tensor:
        """[.., M + 1] of the next item of players at `cells` [..] among `items` [.., M]; last: none. -1e9 if gone."""
        relative, game = self.relative, self.relative.game
        out = self.subgoal(own, others, goal)
        query = out[..., :-1].unflatten(-1, (len(game.item_counts), relative.size))[..., game.item_kind, :]
        scores = (query * relative.cells(cells.unsqueeze(-1), items)).sum(-1)
        return torch.cat([masked(scores, items >= 0), out[..., -1:]], -1)


def true_goals(relative: RelativeFeatures, state: GameState, script: Tensor, noisy: Tensor, target: Tensor) -> Tensor:
    """float32 [B, N, Z]: what `--goal oracle` tells of every seat. All arguments but `relative` are [B, N].
    The kind (`script` indexes SCRIPTED, -1: not scripted; bool `noisy`), and the relative cell of the item that the
    player walks to (`target`, -1: none)."""
    item = state.items.gather(1, target.clamp(min=0)).masked_fill((target < 0) | (script < 0), -1)
    kind, flags = F.one_hot(script + 1, len(SCRIPTED) + 1), torch.stack([noisy, item >= 0], 2)
    return torch.cat([kind, flags, relative.cells(state.players, item)], 2)


def moa_loss(moa: MOA, batch, alpha, subgoal_coef, pretraining: bool, generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss -log pi_hat + alpha KL(q || N(0, I)) + subgoal_coef * reconstruction over the steps of a MatchBatch, and its
    terms in nats a step. `pretraining` leaves the first term out: the VAE alone."""
    own, others = moa.relative(batch.state)
    mask, active = moa.relative.game.action_mask(batch.state), batch.active.flatten(0, 1)
    rows = active.flatten().nonzero(as_tuple=True)[0]  # [R] of S * L * N
    weight = batch.weight.flatten()[rows]
    weight = weight / weight.sum().clamp(min=1e-9)
    if moa.goal == "inferred":
        seen = moa.seen(own, others)
        step = moa.features(seen, batch.actions.flatten(0, 1), active).unflatten(0, batch.start.shape)
        before = step.cumsum(1) - step  # [S, L, N, E + 1] sums over the match, strictly before each step
        within = before - before.gather(1, batch.start[..., None, None].expand_as(before))
        history = Memory(*(total.flatten(0, 2)[rows] for total in (before, within)))
        mean, log_std = moa.encode(history, seen.flatten(0, 1)[rows])
        goal = mean + log_std.exp() * torch.randn(mean.shape, generator=generator, device=mean.device)
        kl = 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std).sum(-1)
    else:
        goal = own.new_zeros(len(rows), moa.goal_size) if batch.oracle is None else batch.oracle.flatten(0, 2)[rows]
        kl = own.new_zeros(len(rows))
    own, others, mask = (x.flatten(0, 1)[rows] for x in (own, others, mask))
    logits = masked(moa.decoder(own, others, goal), mask)
    nll = F.cross_entropy(logits, batch.actions.flatten()[rows], reduction="none")
    items = batch.state.items[rows // moa.relative.game.num_players]
    subgoals = moa.subgoal_logits(batch.state.players.flatten()[rows], items, own, others, goal)
    recon = F.cross_entropy(subgoals, batch.subgoal.flatten()[rows], reduction="none")
    nll, kl, recon = ((weight * term).sum() for term in (nll, kl, recon))
    loss = alpha * kl + subgoal_coef * recon + (0.0 if pretraining else nll)
    return loss, {"moa/nll": nll.detach(), "moa/kl": kl.detach(), "moa/recon": recon.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
class NodeNetwork:
    """A RelativeNetwork as the search reads it: whatever its first layers see of clock, own cell and relative cells is
    tabulated once a search, so that a state costs sums of rows and the layers above them. Exact but for rounding."""

    def __init__(self, network: RelativeNetwork, relative: RelativeFeatures):
        kinds, size = len(relative.game.item_counts), relative.size
        clock, walls, *items = network.own.weight.split([relative.clock_table.shape[2], 5, *[size] * kinds], 1)
        near, *seen, goal = network.other.weight.tensor_split([size * k for k in range(1, kinds + 2)], 1)
        tables = [relative.table @ part.T for part in items] + [relative.game.legal_moves.float() @ walls.T]
        tables.append((relative.clock_table @ clock.T + network.own.bias).flatten(0, 1))
        self.own = torch.cat(tables)  # [kinds * relative cells + S + 1 + (horizon + 1)^2, H]
        tables = [relative.table @ part.T for part in seen] + [relative.table @ near.T + network.other.bias]
        self.other = torch.cat(tables)  # [(kinds + 1) * relative cells, H / 2]
        self.other_goal, self.network = goal.T, network  # [Z, H / 2]

    def __call__(self, own: Tensor, others: Tensor, total: Tensor) -> Tensor:
        """[R, outputs] from rows of the table `own` [R, 2 + M]: of the clock, the own cell and the items; from what the
        layer `other` gives for the co-players, `others` [R, N-1, H / 2] (overwritten); and from what goals add to the
        first layer, `total` [R, H]."""
        first = F.embedding_bag(own, self.own, mode="sum").add_(total)
        first = first.add_(self.network.mix(others.relu_().sum(1))).relu_()
        return self.network.out(self.network.hidden(first).relu_())


class GameModel:
    """What the search asks of the world, at the nodes of T trees: exact steps of the game, pi_theta and V for the focal
    player, who sits at seat 0, and the MOA for its co-players. Node s * T + t is made in tree t by simulation s; nodes
    0..T-1 are the roots. Nothing in a tree depends on another one."""

    def __init__(self, agent: "Agent", state: GameState, memory: Memory, goals: tuple[Tensor, ...], draws: Tensor):
        """`state` and `memory` are of T games; `goals` are mean, log standard deviation and draw [T, N, Z] at the root;
        `draws` [T, S + 1, N] in 0..1 decide what co-players do at the nodes."""
        self.agent, self.game, self.args, self.relative = agent, agent.game, agent.args, agent.relative
        game, (self.trees, nodes, n), m = agent.game, draws.shape, agent.game.num_items
        self.draws = draws[:, :, 1:].transpose(0, 1).flatten(0, 1)  # [nodes, N-1]
        self.networks = [NodeNetwork(network, self.relative) for network in (agent.actor, agent.critic)]
        decoder = agent.moa.decoder  # that of another script may be no RelativeNetwork, and is called as it is
        self.decoder = NodeNetwork(decoder, self.relative) if hasattr(decoder, "goal") else None
        self.states = torch.empty(nodes * self.trees, n + m + 2, dtype=torch.int64, device=game.device)
        self.seats = torch.empty(nodes * self.trees, n, 2 + m + n, dtype=torch.int64, device=game.device)  # table rows
        self.joint = torch.empty(nodes * self.trees, n, dtype=torch.int64, device=game.device)  # actions at a node
        self.refresh = self.args.goal_refresh
        mean, log_std, draw = goals
        self.goals, self.memory = self.goal_parts(mean, draw), memory
        if self.refresh:  # goals and memories of every node, not of every tree
            self.noise = (draw - mean) / log_std.exp()
            at_root = [[*self.goals], [*memory]]
            self.goals, self.memory = (
                [x.new_empty(len(self.states), *x.shape[1:]) for x in group] for group in at_root
            )
            for stored, root in zip([*self.goals, *self.memory], [*at_root[0], *at_root[1]], strict=True):
                stored[: self.trees] = root
        # rows of the networks' tables for each pair of cells: of items by kind, then of players
        kinds, cells = len(game.item_counts), torch.arange(game.num_cells + 1, device=game.device)
        pairs = self.relative.index(cells.unsqueeze(1), cells)  # [S + 1, S + 1] by own cell and the other one
        offsets = len(self.relative.table) * torch.arange(kinds + 1, device=game.device)
        by_kind = [*pairs.expand(kinds, -1, -1), pairs.T]  # players: by the cell that is seen, and from where
        self.table_rows = torch.stack(by_kind).add_(offsets.view(-1, 1, 1)).flatten()
        self.walls, self.clocks = int(offsets[-1]), int(offsets[-1]) + len(cells)  # where these begin in the table
        self.pair_kind = pairs.numel() * torch.cat([game.item_kind, torch.full_like(cells[:1].expand(n), kinds)])
        others = self.relative.others[1:].flatten()
        self.others, observer = others, torch.arange(1, n, device=game.device).repeat_interleave(n - 1)
        self.near_columns = others * self.seats.shape[2] + 2 + m + observer
        self.write(torch.arange(self.trees, device=game.device), state)

    def goal_parts(self, mean: Tensor, draw: Tensor) -> list[Tensor]:
        """What goals [R, N, Z] add to first layers: of the focal player's policy and value (both [R, N-1, H / 2] and
        [R, H]; they know the mean, as in play), and of the MOA [R, N-1, H] (it plays the drawn goal)."""
        theirs, total = self.agent.with_goals(mean.new_empty(*mean.shape[:2], mean.shape[1] - 1, 0), mean)
        parts = [f for net in self.networks for f in (theirs[:, 0] @ net.other_goal, net.network.goal(total[:, 0]))]
        return [*parts, self.decoder.network.goal(draw[:, 1:]) if self.decoder else draw[:, 1:]]

    def write(self, nodes: Tensor, state: GameState) -> Tensor:
        """Stores the states of `nodes` [R]. What their networks read, [R, N, 2 + M + N]: for every seat the rows of the
        clock, of its cell, of the items as it sees them, and of itself as each player sees it."""
        game, size, n = self.game, len(self.game.legal_moves), self.game.num_players
        clock, cells = game.clock(state), torch.cat([state.items, state.players], 1)
        state = torch.cat([cells, state.time.unsqueeze(1), state.first_hunt.unsqueeze(1)], 1)
        self.states.index_copy_(0, nodes, state)
        there = cells % size  # -1 becomes S
        own = there[:, -n:].unsqueeze(2)
        pairs = own * size + (there + self.pair_kind).unsqueeze(1)
        rows = self.table_rows.index_select(0, pairs.flatten()).view_as(pairs)
        clock = torch.add(clock[:, 1] + self.clocks, clock[:, 0], alpha=game.horizon + 1)
        seats = torch.cat([clock.view(-1, 1, 1).expand(-1, n, 1), own + self.walls, rows], 2)
        self.seats.index_copy_(0, nodes, seats)
        return seats

    def read(self, nodes: Tensor) -> GameState:
        """The states of `nodes` [R]."""
        widths = [self.game.num_items, self.game.num_players, 1, 1]
        items, players, time, first_hunt = self.states.index_select(0, nodes).split(widths, 1)
        return GameState(players, items, time.squeeze(1), first_hunt.squeeze(1))

    def focal(self, network: NodeNetwork, seats: Tensor, theirs: Tensor, total: Tensor) -> Tensor:
        """[R, outputs] of a network of the focal player, from rows `seats` [R, N, 2 + M + N]."""
        m = self.game.num_items
        others = F.embedding_bag(seats[:, 1:, 2 : 3 + m].flatten(0, 1), network.other, mode="sum")
        return network(seats[:, 0, : 2 + m], others.view_as(theirs).add_(theirs), total)

    def expand(self, nodes: Tensor) -> Tensor:
        """Prior pi_theta [R, A] of the focal player at `nodes` [R], -1 where illegal; the MOA draws what the co-players
        do there, once and for all of the focal player's actions."""
        seats, n, m = self.seats.index_select(0, nodes), self.game.num_players, self.game.num_items
        state, known = self.read(nodes), nodes if self.refresh else nodes % self.trees
        mask, actor, decoder = self.game.action_mask(state), self.networks[0], self.decoder
        theirs, total, drawn = (self.goals[k].index_select(0, known) for k in (0, 1, 4))
        with self.agent.timer("policy and value"):
            prior = masked(self.focal(actor, seats, theirs, total), mask[:, 0]).softmax(1)
        with self.agent.timer("MOA"):
            rest = mask[:, 1:]
            if self.args.co_player_model == "uniform":
                chance = rest / rest.sum(2, keepdim=True)
            elif decoder is None:
                own, others = (x[:, 1:] for x in self.relative(state))
                chance = masked(self.agent.moa.decoder(own, others, drawn), rest).softmax(2)
            else:
                seen = F.embedding_bag(seats[:, :, 2 : 2 + m].flatten(0, 1), decoder.other, mode="sum")
                others = F.embedding(seats.flatten(1).index_select(1, self.near_columns), decoder.other)
                others = others.add_(seen.unflatten(0, (-1, n)).index_select(1, self.others))
                others = others.view(len(nodes) * (n - 1), n - 1, decoder.other.shape[1])
                logits = decoder(seats[:, 1:, : 2 + m].flatten(0, 1), others, drawn.flatten(0, 1))
                chance = masked(logits.view_as(rest), rest).softmax(2)
            upto, draw = chance.cumsum(2), self.draws.index_select(0, nodes).unsqueeze(2)
            self.joint[:, 1:].index_copy_(0, nodes, (upto > draw * upto[..., -1:]).int().argmax(2))
        return prior.masked_fill_(~mask[:, 0], -1.0)

    def step(self, nodes: Tensor, actions: Tensor, simulation: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reward [R] of the focal player's `actions` [R] at `nodes` [R] of different trees, V [R] of the new nodes of
        `simulation` (0 where nothing follows), and bool [R]: the game goes on from there."""
        trees = nodes % self.trees
        made = simulation * self.trees + trees
        game, args, timer = self.game, self.args, self.agent.timer
        with timer("game step"):
            before = self.read(nodes)
            joint = self.joint.index_select(0, nodes)
            joint[:, 0] = actions
            after, reward, terminated, truncated = game.step(before, joint)
            reward = (1.0 - args.prosocial) * reward[:, 0] + args.prosocial * reward.mean(1)
            seats = self.write(made, after)
            lives = (after.players[:, 0] >= 0) & ~terminated
            lives = lives & ~truncated if args.plan_horizon == "end" else lives
        if self.refresh:
            with timer("goal inference"):
                self.infer(before, joint, after, nodes, made)
        with timer("policy and value"):
            theirs, total = (x.index_select(0, made if self.refresh else trees) for x in self.goals[2:4])
            value = self.focal(self.networks[1], seats, theirs, total).squeeze(1) * lives
        return reward * args.reward_scale, value, lives & ~truncated

    def infer(self, before: GameState, joint: Tensor, after: GameState, nodes: Tensor, made: Tensor) -> None:
        """Stores what goals add to first layers at the nodes `made` [R]: inferred again every `--goal-refresh` steps of
        the game from the root on, from the memory along the simulated path; else those of `nodes` [R] before."""
        agent, trees, goes_on = self.agent, nodes % self.trees, torch.zeros_like(nodes, dtype=torch.bool)
        memory = Memory(*(x.index_select(0, nodes) for x in self.memory))
        memory = agent.remember(memory, before, joint, goes_on, goes_on)
        mean, log_std = agent.infer(memory, *self.relative(after), None)
        now = (after.time - self.states[:, -2].index_select(0, trees)) % self.refresh == 0  # [R]
        drawn = mean + self.noise.index_select(0, trees) * log_std.exp()
        for stored, fresh in zip(self.goals, self.goal_parts(mean, drawn), strict=True):
            fresh = torch.where(now.view(-1, *[1] * (fresh.dim() - 1)), fresh, stored.index_select(0, nodes))
            stored.index_copy_(0, made, fresh)
        for stored, fresh in zip(self.memory, memory, strict=True):
            stored.index_copy_(0, made, fresh)


def puct(visits: Tensor, total: Tensor, prior: Tensor, value: Tensor, root: Tensor | None, constant: float) -> Tensor:
    """int64 [R]: what to try next at R nodes, by PUCT (Silver et al. 2017): the highest Q + c pi sqrt(N) / (1 + n). Of
    each action visits n, summed returns and prior pi (-1: illegal) [R, A]; V [R]. Q is scaled to 0..1 over the node's
    own actions and its mean, as which an action counts that was not tried. At a `root` (bool [R]) every legal action is
    tried once before any is tried twice, so that all scores look ahead one step at least; None once that is done."""
    count = visits.sum(1, keepdim=True)
    tried = visits > 0
    mean = (value.unsqueeze(1) + total.sum(1, keepdim=True)) / (1.0 + count)
    q = torch.where(tried, total / visits, mean)
    low, high = q.aminmax(dim=1, keepdim=True)
    score = q.sub_(low).div_((high - low).clamp_(min=1e-8))
    score.addcdiv_(prior * (constant * count.sqrt()), 1.0 + visits)
    if root is not None:
        untried = root.unsqueeze(1) & ~tried & (prior >= 0)  # an addend would round the scores away
        score.masked_fill_(tried & untried.any(1, keepdim=True), -1e8)
    return score.masked_fill_(prior < 0, -1e9).argmax(1)


class TreeSearch:
    """T trees that grow in lock step, one node a simulation, kept as parallel arrays over nodes (numbered as those of
    `model`). At every node the action that PUCT would try next is kept, and changes only for nodes on a path that was
    just backed up: so a selection merely follows pointers. `model` has `expand` and `step`, as GameModel."""

    def __init__(self, model, prior: Tensor, value: Tensor, simulations: int, constant: float, gamma: float, most: int):
        """`prior` [T, A] (-1: illegal) and `value` [T] of the roots, PUCT's `constant`, and the `most` steps ahead."""
        (trees, actions), self.model, self.most = prior.shape, model, most
        self.simulations, self.constant, self.gamma, size = simulations, constant, gamma, (simulations + 1) * trees
        self.trees, self.timer, self.puct = torch.arange(trees, device=prior.device), Timer(False), puct
        self.rows = prior.new_zeros(size, 3 * actions + 1)  # one row a node: a backup reads all of it at once
        self.widths = [actions, actions, actions, 1]
        # [nodes, A] of every action, [nodes]
        self.visits, self.total = self.rows[:, :actions], self.rows[:, actions : 2 * actions]
        self.prior, self.value = self.rows[:, 2 * actions : 3 * actions], self.rows[:, -1]
        self.child = torch.full((size, actions), -1, device=prior.device)  # int64 [nodes, A] the node it leads to
        self.reward = prior.new_zeros(size)  # [nodes] on the way into the node
        self.goes_on = torch.zeros(size, dtype=torch.bool, device=prior.device)  # [nodes] it may have children; no root
        self.depth = self.child.new_zeros(size)  # [nodes]
        self.expanded = self.goes_on.clone()  # [nodes] prior and co-players' actions are known
        self.choice = self.depth.clone()  # int64 [nodes] the action to try next
        self.follow = self.child[:, 0].clone()  # int64 [nodes] the node that it leads to, -1: the path ends here
        self.prior[:trees], self.value[:trees], self.expanded[:trees] = prior, value, True
        self.choice[:trees] = prior.argmax(1)

    def run(self) -> tuple[Tensor, Tensor]:
        """Q [T, A] (an untried action counts as the root's mean) and visits [T, A] of the roots' actions."""
        for simulation in range(1, self.simulations + 1):
            with self.timer("select"):
                paths, leaf = self.select()
            with self.timer("expand"):
                value = self.expand(leaf, simulation)
            with self.timer("backup"):
                self.backup(paths, value, simulation)
        visits, total = self.visits[: len(self.trees)], self.total[: len(self.trees)]
        mean = (self.value[: len(self.trees)] + total.sum(1)) / (1.0 + self.simulations)
        return torch.where(visits > 0, total / visits.clamp(min=1.0), mean.unsqueeze(1)), visits

    def select(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Trees [P] and their nodes [P] on the paths, step by step from the roots, and the last node of each path [T].
        Trees drop out where their path ends."""
        trees = nodes = self.trees
        paths, leaf = [(trees, nodes)], nodes.clone()
        while True:
            following = self.follow.index_select(0, nodes)
            left = (following >= 0).nonzero().squeeze(1)
            if not len(left):
                return paths, leaf
            trees, nodes = trees.index_select(0, left), following.index_select(0, left)
            paths.append((trees, nodes))
            leaf.index_copy_(0, trees, nodes)

    def expand(self, leaf: Tensor, simulation: int) -> Tensor:
        """Takes the chosen action at every `leaf` [T]; V [T] of where it leads. A node where a path ends for the first
        time gets its prior and its co-players' actions here: most nodes never do. Nothing is done again where the
        action was taken before, and nothing follows after it."""
        fresh = leaf[~self.expanded.index_select(0, leaf)]
        if len(fresh):
            prior = self.model.expand(fresh)
            self.prior.index_copy_(0, fresh, prior)
            self.choice.index_copy_(0, fresh, prior.argmax(1))
            self.expanded.index_fill_(0, fresh, True)
        actions, child = self.choice.index_select(0, leaf), self.child.view(-1)
        edges = leaf * self.child.shape[1] + actions
        trees = (child.index_select(0, edges) < 0).nonzero().squeeze(1)  # that get a node
        if len(trees):
            nodes, new = leaf.index_select(0, trees), simulation * len(self.trees) + trees
            reward, value, goes_on = self.model.step(nodes, actions.index_select(0, trees), simulation)
            depth = self.depth.index_select(0, nodes) + 1
            child.index_copy_(0, edges.index_select(0, trees), new)
            arrays, goes_on = (self.depth, self.reward, self.value, self.goes_on), goes_on & (depth < self.most)
            for array, entries in zip(arrays, (depth, reward, value, goes_on), strict=True):
                array.index_copy_(0, new, entries)
        return self.value.index_select(0, child.index_select(0, edges))

    def backup(self, paths: list[tuple[Tensor, Tensor]], value: Tensor, simulation: int) -> None:
        """Adds the discounted return of the T new nodes, rewards along the path and then `value` [T], to every action
        on their paths; then finds anew what to try next there."""
        nodes = torch.cat([level for _, level in paths])
        edges = nodes * self.child.shape[1] + self.choice.index_select(0, nodes)
        rewards = self.reward.index_select(0, self.child.view(-1).index_select(0, edges))
        returns, future = [], value.clone()
        for (trees, _), reward in zip(
            reversed(paths), reversed(rewards.split([len(t) for t, _ in paths])), strict=True
        ):
            returns.append(torch.add(reward, future.index_select(0, trees), alpha=self.gamma))
            future.index_copy_(0, trees, returns[-1])
        ours = nodes * self.rows.shape[1] + self.choice.index_select(0, nodes)
        added = torch.cat([torch.ones_like(rewards), *returns[::-1]])
        self.rows.view(-1).index_add_(0, torch.cat([ours, ours + self.child.shape[1]]), added)
        visits, total, prior, value = self.rows.index_select(0, nodes).split(self.widths, 1)
        root = nodes < len(self.trees) if simulation < prior.shape[1] else None
        choice = self.puct(visits, total, prior, value.squeeze(1), root, self.constant)
        child = self.child.view(-1).index_select(0, nodes * self.child.shape[1] + choice)
        self.choice.index_copy_(0, nodes, choice)
        going = self.goes_on.index_select(0, child.clamp(min=0))
        self.follow.index_copy_(0, nodes, child.masked_fill_(~going, -1))


def centred(q_plan: Tensor, mask: Tensor) -> Tensor:
    """`q_plan` [.., A] less its mean over the legal actions of bool `mask` [.., A]; 0 for the others."""
    return (q_plan - (q_plan * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)) * mask


def root_mean_square(q_plan: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of centred `q_plan` [.., A], over legal actions where there is a choice."""
    choice = mask.sum(-1) > 1
    squares = centred(q_plan, mask)[choice].square().sum()
    return (squares / mask[choice].sum().clamp(min=1)).sqrt().clamp(min=1e-3)


class Decision(NamedTuple):
    """What the policy of every seat saw, thought and did in one step of B games."""

    action: Tensor  # int64 [B, N]
    log_prob: Tensor  # float32 [B, N] of the action, under the policy that acted
    value: Tensor  # float32 [B, N] of returns times reward_scale
    own: Tensor  # float32 [B, N, X]
    others: Tensor  # float32 [B, N, N-1, Y]
    goal: Tensor  # float32 [B, N, Z] inferred of every seat
    mask: Tensor  # bool [B, N, A]
    q_plan: Tensor  # float32 [B, N, A] the planner's scores of legal actions; 0 where it did not run
    offset: Tensor  # float32 [B, N, A] beta * (q_plan - its mean over legal actions): the planner in the logits
    prior: Tensor  # float32 [B, N, A] log pi_theta, without the offset


# method: the search's options
PLAYED = """plan_update plan_beta policy_target co_player_model num_simulations num_goal_samples puct_c max_depth
    plan_horizon goal_refresh""".split()  # options that may change when an agent is played


# method: tree search
class Agent(nn.Module):
    """The learned player, for every seat of B games at once: policy, value, MOA, and what chooses with them."""

    # method: no transition network
    def __init__(self, game: GridGame, args: Args):
        super().__init__()
        self.game, self.args, self.relative = game, args, RelativeFeatures(game)
        if args.goal_refresh and args.goal != "inferred":
            raise UsageError(f"--goal-refresh needs --goal inferred, not {args.goal}")
        if args.policy_target == "visits" and args.plan_update == "offset":
            raise UsageError("--policy-target visits needs --plan-update hop")
        own, hidden, actions = self.relative.own_size, args.hidden_size, game.num_actions
        self.moa = MOA(self.relative, args.moa_hidden_size, args.goal_size, args.goal)
        other, goal = self.relative.other_size + self.moa.goal_size, self.moa.goal_size
        self.actor = RelativeNetwork(own, other, goal, actions, hidden, 0.01)
        self.critic = RelativeNetwork(own, other, goal, 1, hidden, 1.0)
        self.register_buffer("plan_slope", torch.tensor(0.0))  # running regression of (return - V) on Q_plan
        self.register_buffer("plan_rms", torch.tensor(0.1))  # running root mean square of centred Q_plan
        self.plan_mode, self.timer = args.plan_update, Timer(False)  # the mode is "none" after --plan-until
        self.puct = puct  # compiled with --compile
        self.base: nn.Module | None = None  # the agent of another script whose networks these are
        self.to(game.device)

    @property
    def uses_moa(self) -> bool:
        """Whether anything reads the MOA: its goals, or the co-players' actions that it predicts."""
        return self.args.goal == "inferred" or self.args.plan_update != "none"

    @property
    def plan_beta(self) -> Tensor:
        """What multiplies centred q_plan: `--plan-beta` over its root mean square, times the slope clipped to 0..1."""
        return self.args.plan_beta * self.plan_slope.clamp(0.0, 1.0) / self.plan_rms

    def search_on(self, base: nn.Module) -> None:
        """Takes networks and goal inference of `base`, an agent of any script, to search with. Raises UsageError."""
        if self.args.goal_refresh and not hasattr(base.moa, "encode"):
            raise UsageError("--goal-refresh needs goals that an encoder infers: this checkpoint has none")
        self.base, self.plan_mode, self.actor, self.critic, self.moa = base, "none", base.actor, base.critic, base.moa
        for name in ("infer", "remember", "sample_goals", "with_goals"):
            setattr(self, name, getattr(base, name))

    # method: the agent below the search turns, too
    def on_game(self, env_id: str) -> GridGame:
        """Turns to another game of the same family: no network depends on sizes or counts. Raises UsageError."""
        game = GridGame(env_id, self.game.device)
        if game.family != self.game.family:
            raise UsageError(f"the checkpoint was trained on {self.game.id}; it cannot play {game.id}")
        self.game, self.relative = game, RelativeFeatures(game)
        self.moa.relative = self.relative
        if self.base is not None:
            self.base.on_game(env_id)
        return game

    def turn_planner(self, mode: str) -> None:
        """Sets the planner's mode, to play. One that was off is trusted (slope 1), and the root mean square of its
        scores is measured in 16 games that pi_theta plays with itself."""
        was, self.plan_mode = self.plan_mode, mode
        if mode == "none" or was != "none":
            return
        self.plan_mode = "offset"
        self.plan_slope.fill_(1.0)
        self.plan_rms.fill_(1e9)  # the scores are looked at, and do not count
        game, generator, seen = self.game, Generator(self.game.device).manual_seed(0), []
        state, memory = game.initial_state(16, generator), self.moa.initial_memory(16)
        for _ in range(game.horizon):
            mask, every = game.action_mask(state), torch.ones_like(state.players, dtype=torch.bool)
            decision = self.act(state, mask, memory, every, generator, None)
            after, _, terminated, truncated = game.step(state, decision.action)
            memory = self.remember(memory, state, decision.action, *[terminated | truncated] * 2)
            state = after.replaced(terminated | truncated, game.initial_state(16, generator))
            seen.append((decision.q_plan, mask))
        self.plan_mode = mode
        self.plan_rms.copy_(root_mean_square(*(torch.stack(x) for x in zip(*seen, strict=True))))

    @torch.no_grad()
    def remember(self, memory: Memory, state: GameState, actions: Tensor, ended: Tensor, match_ended: Tensor) -> Memory:
        """The memory after `actions` [B, N] in `state`; emptied where the episode or the match ended (bool [B])."""
        if self.args.goal != "inferred":
            return memory
        step = self.moa.features(self.moa.seen(*self.relative(state)), actions, state.players >= 0)
        clear = [which.view(-1, 1, 1) for which in (match_ended, ended)]
        return Memory(*((total + step).masked_fill(c, 0.0) for total, c in zip(memory, clear, strict=True)))

    def infer(self, memory: Memory, own: Tensor, others: Tensor, oracle: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation [B, N, Z] of every seat's goal: inferred, zero, or the truth `oracle`."""
        if self.args.goal == "inferred":
            return self.moa.encode(memory, self.moa.seen(own, others))
        goal = own.new_zeros(*own.shape[:2], self.moa.goal_size) if oracle is None else oracle
        return goal, torch.full_like(goal, -30.0)

    def with_goals(self, others: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Co-players' features with their goals [.., N, N-1, Y + Z], and the goals' sum over co-players [.., N, Z]."""
        theirs = goal[..., self.relative.others, :]
        return torch.cat([others, theirs], -1), theirs.sum(-2)

    @torch.no_grad()
    def value(self, state: GameState, memory: Memory, oracle: Tensor | None) -> Tensor:
        """V [B, N] of every seat."""
        own, others = self.relative(state)
        return self.critic(own, *self.with_goals(others, self.infer(memory, own, others, oracle)[0])).squeeze(-1)

    # method: tree search
    @torch.no_grad()
    def act(self, state: GameState, mask, memory: Memory, seats, generator, oracle: Tensor | None) -> Decision:
        """A Decision for every seat of `state`; the planner runs only where bool `seats` [B, N] is True. bool `mask`
        [B, N, A] has the legal actions; `memory` is this agent's; `oracle` [B, N, Z] is for `--goal oracle`."""
        with self.timer("goal inference"):
            own, others = self.relative(state)
            goal, log_std = self.infer(memory, own, others, oracle)
        with self.timer("policy and value"):
            joined, total = self.with_goals(others, goal)
            prior = masked(self.actor(own, joined, total), mask).log_softmax(-1)
            value = self.critic(own, joined, total).squeeze(-1)
        q_plan = offset = torch.zeros_like(prior)
        if self.plan_mode != "none":
            with self.timer("MCTS"):
                some = seats & (state.players >= 0) & (mask.sum(-1) > 1)
                q_plan, visits = self.plan(state, mask, memory, some, (goal, log_std), prior, value, generator)
            offset = self.plan_beta * centred(q_plan, mask)
            if self.plan_mode == "hop" and self.args.policy_target == "visits":
                offset = (visits / visits.sum(-1, keepdim=True).clamp(min=1.0)).clamp(min=1e-9).log()
        policy = masked(offset if self.plan_mode == "hop" else prior + offset, mask).log_softmax(-1)
        action = sample(policy, generator)
        log_prob = policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return Decision(action, log_prob, value, own, others, goal, mask, q_plan, offset, prior)

    def sample_goals(self, goal: Tensor, log_std: Tensor, samples: int, generator: Generator) -> Tensor:
        """float32 [B, N, K, Z]: K draws of every seat's z ~ q, whose mean is `goal`."""
        shape = (*goal.shape[:2], samples, goal.shape[2])
        noise = torch.randn(shape, generator=generator, device=goal.device)
        return goal.unsqueeze(2) + noise * log_std.exp().unsqueeze(2)

    @torch.no_grad()
    def plan(
        self, state: GameState, mask, memory: Memory, seats, goals, prior, value, generator
    ) -> tuple[Tensor, Tensor]:
        """Q_plan [B, N, A], mean over the K trees of a decision, and visits [B, N, A], summed over them. It searches
        where bool `seats` [B, N] is True; elsewhere both are 0. `goals`: mean and log standard deviation [B, N, Z]."""
        args, n, k = self.args, self.game.num_players, self.args.num_goal_samples
        games, seat = seats.nonzero(as_tuple=True)  # D decisions
        samples = self.sample_goals(*goals, k, generator).transpose(1, 2)  # [B, K, N, Z]
        root = masked(prior[games, seat], mask[games, seat]).softmax(1).repeat_interleave(k, 0)  # [D * K, A]
        legal = mask[games, seat].repeat_interleave(k, 0)
        if self.training and args.dirichlet_fraction:
            alpha = torch.full_like(root, args.dirichlet_alpha)
            noise = (torch._standard_gamma(alpha, generator) + 1e-30) * legal  # Dirichlet, when it sums to 1
            root = torch.lerp(root, noise / noise.sum(1, keepdim=True), args.dirichlet_fraction)
        draws = torch.rand(len(root), args.num_simulations + 1, n, generator=generator, device=root.device)
        scores = root.new_zeros(2, len(root), mask.shape[2])
        for part in filter(len, self.chunks(len(root))):  # of the trees
            at, me = games[part // k], seat[part // k]
            order = (me.unsqueeze(1) + torch.arange(n, device=me.device)) % n  # [T, N] the focal player first
            here = state.rows(at)
            here = here._replace(players=here.players.gather(1, order))
            turned, past = ([x[at.unsqueeze(1), order] for x in fields] for fields in (goals, memory))  # [T, N, ..]
            drawn = samples[at, part % k].gather(1, order.unsqueeze(2).expand(-1, -1, samples.shape[3]))
            with torch.inference_mode():
                model = GameModel(self, here, type(memory)(*past), (*turned, drawn), draws[part])
                model.expand(torch.arange(len(part), device=me.device))
                prior, v = root[part].masked_fill(~legal[part], -1.0), value[at, me]
                search = TreeSearch(model, prior, v, args.num_simulations, args.puct_c, args.gamma, args.max_depth)
                search.timer, search.puct = self.timer, self.puct
                scores[:, part] = torch.stack(search.run())
        q, visits = scores.unflatten(1, (len(games), k)).unbind(0)  # [D, K, A]
        result = prior.new_zeros(2, *mask.shape)
        result[:, games, seat] = torch.stack([q.mean(1), visits.sum(1)]) * mask[games, seat]
        return result[0], result[1]

    # method: of trees
    def chunks(self, count: int) -> tuple[Tensor, ...]:
        """Indices 0..count-1 of trees, in parts: on a CPU few enough at a time to stay in its cache."""
        size = 640 if self.game.device.type == "cpu" else max(1, count)
        return torch.arange(count, device=self.game.device).split(size)


# ---------------------------------------------------------------------------------------------------------------------
# Buffer
# ---------------------------------------------------------------------------------------------------------------------
class MatchBatch(NamedTuple):
    """S matches of L steps for the MOA."""

    state: GameState  # of S * L games
    actions: Tensor  # int64 [S, L, N]
    active: Tensor  # bool [S, L, N] the step is within the match and the player has not left
    start: Tensor  # int64 [S, L] index of the first step of the same episode
    subgoal: Tensor  # int64 [S, L, N] item of the next successful interaction, M for none
    weight: Tensor  # float32 [S, L, N] what the rule of collection gives the step's loss
    oracle: Tensor | None  # float32 [S, L, N, Zo] true goals


class MOABuffer:
    """Whole episodes, match by match, for the MOA; and the running matches of B games, from which memories are
    rebuilt. Rules of collection (`--moa-buffer`), each for a player's episode: `all` keeps every one; `positive`
    those with reward > 0, as the original does; `balanced` keeps every one, and weighs its steps by how rare its class
    of outcome is (nothing taken, an item of the first kind, of the second; for drifts: none, one, more), by at most a
    factor `most`: each class has the same weight in episodes, and a longer episode has more steps of that weight. Those
    that are not kept still serve as history of the others. A match in which none is kept is not stored."""

    def __init__(self, game: GridGame, batch: int, capacity: int, match_episodes: int, rule: str, most: float = 4.0):
        self.game, self.batch, self.capacity, self.episodes = game, batch, capacity, match_episodes
        self.rule, self.most, self.stored = rule, most, 0  # matches ever stored
        self.kept, self.offered = 0, 0  # players' episodes ever kept, and ever played
        n, length = game.num_players, match_episodes * game.horizon
        shapes = {"script": (n,), "length": (), "born": (), "episode_reward": (match_episodes, n)}
        shapes["taken"] = (match_episodes, n, 2)  # items of the first kind, and of the other
        shapes |= dict.fromkeys(("players", "actions", "subgoal", "target"), (length, n))
        shapes |= {**dict.fromkeys(("time", "first_hunt", "episode"), (length,)), "items": (length, game.num_items)}
        wide = {"length": torch.int64, "born": torch.int64, "episode_reward": torch.float32}
        rows = batch + capacity  # the first B rows hold the running matches, the others a ring of ended ones
        zeros = {name: torch.zeros(rows, *shape, device=game.device) for name, shape in shapes.items()}
        self.data = {name: zero.to(wide.get(name, torch.int16)) for name, zero in zeros.items()}

    def add(self, state: GameState, actions: Tensor, co_players: CoPlayers, reward: Tensor, after: GameState):
        """Takes one step of the B running matches; call before `co_players.observe`."""
        data, games, episode = self.data, torch.arange(self.batch, device=self.game.device), co_players.episode
        wins = self.game.hits(state, actions) & (after.items < 0).unsqueeze(1)  # [B, N, M]
        subgoal, first = torch.where(wins.any(2), wins.int().argmax(2), -1), (wins & (self.game.item_kind == 0)).sum(2)
        values = {**state._asdict(), "actions": actions, "episode": episode, "subgoal": subgoal}
        for name, value in {**values, "target": co_players.target}.items():
            data[name][games, data["length"][games]] = value.short()
        data["script"][games] = (co_players.script + len(SCRIPTED) * co_players.noisy)[co_players.kind].short()
        data["episode_reward"][games, episode] += reward
        data["taken"][games, episode] += torch.stack([first, wins.sum(2) - first], 2).short()
        data["length"][games] += 1

    def end(self, ended: Tensor, step: int) -> None:
        """Stores the running matches of bool [B] `ended`, played until game step `step`, by the rule of collection."""
        data, rows = self.data, ended.nonzero(as_tuple=True)[0]
        keep = self.keep(rows).flatten(1)
        kept = rows[keep.any(1)][-self.capacity :]
        self.offered, self.kept = self.offered + keep.numel(), self.kept + int(keep.sum())
        if len(kept):
            slots = self.batch + (self.stored + torch.arange(len(kept), device=rows.device)) % self.capacity
            self.stored += len(kept)
            data["born"][kept] = step
            for value in data.values():
                value[slots] = value[kept]
            # the next successful interaction at or after each step, if it lies in the same episode
            event, episode = data["subgoal"][slots], data["episode"][slots].unsqueeze(2)
            steps = torch.arange(event.shape[1], device=rows.device).view(1, -1, 1)
            live = (event >= 0) & (steps < data["length"][slots].view(-1, 1, 1))
            coming = torch.where(live, steps, event.shape[1]).flip(1).cummin(1).values.flip(1)
            at = coming.clamp(max=event.shape[1] - 1)
            same = (coming == at) & (episode.expand_as(event).gather(1, at) == episode)
            data["subgoal"][slots] = torch.where(same, event.gather(1, at), self.game.num_items).short()
        for name in ("length", "episode_reward", "taken"):
            data[name][rows] = 0

    def keep(self, rows: Tensor) -> Tensor:
        """bool [rows, episodes, N]: which players' episodes the rule keeps."""
        return (self.data["episode_reward"][rows] > 0) | (self.rule != "positive")

    def weights(self, rows: Tensor) -> Tensor:
        """float32 [rows, episodes, N]: the weight of each player's episode in the loss."""
        if self.rule != "balanced":
            return self.keep(rows).float()
        held = self.batch + torch.arange(len(self), device=rows.device)
        count = torch.bincount(self.outcome(held).flatten(), minlength=3).float()
        weight = (count.sum() / ((count > 0).sum() * count.clamp(min=1))).clamp(max=self.most)
        return weight[self.outcome(rows)]

    def outcome(self, rows: Tensor) -> Tensor:
        """int64 [rows, episodes, N] in 0..2: class of the outcome of each player's episode."""
        first, other = self.data["taken"][rows].long().unbind(-1)
        return torch.where(first > 0, 1, 2 * (other > 0)) if self.game.family == "msh" else first.clamp(max=2)

    def __len__(self) -> int:
        return min(self.stored, self.capacity)

    def statistics(self, step: int) -> dict[str, float]:
        """Fill (players' episodes held, of what would fit), their share of those played, mean age in game steps."""
        held = self.batch + torch.arange(len(self), device=self.game.device)
        fill = float(self.keep(held).sum()) / (self.capacity * self.episodes * self.game.num_players)
        age = float((step - self.data["born"][held].float()).mean()) if len(self) else 0.0
        return {"moa/buffer_fill": fill, "moa/buffer_kept": self.kept / max(1, self.offered), "moa/buffer_age": age}

    def sample(self, matches: int, relative: RelativeFeatures, oracle: bool, generator: Generator) -> MatchBatch:
        """`matches` ended matches, uniformly, with replacement."""
        rows = torch.randint(len(self), (matches,), generator=generator, device=self.game.device)
        return self.batch_of(self.batch + rows, relative, oracle)

    def batch_of(self, rows: Tensor, relative: RelativeFeatures, oracle: bool = False) -> MatchBatch:
        """The matches at `rows`, cut to the longest of them."""
        data, length, goals = self.data, self.data["length"][rows], None
        most = max(1, int(length.max()))
        part = {k: data[k][rows, :most].long() for k in (*GameState._fields, "actions", "episode", "subgoal", "target")}
        state = GameState(*(part[k].flatten(0, 1) for k in GameState._fields))
        steps = torch.arange(most, device=rows.device)
        active = (steps < length.unsqueeze(1)).unsqueeze(2) & (part["players"] >= 0)
        start = torch.where(part["time"] == 0, steps, 0).cummax(1).values
        weight = self.weights(rows).gather(1, part["episode"].unsqueeze(2).expand_as(active)) * active
        if oracle:
            script = data["script"][rows].long().unsqueeze(1).expand_as(active).flatten(0, 1)
            known = torch.where(script < 0, -1, script % len(SCRIPTED))
            goals = true_goals(relative, state, known, script >= len(SCRIPTED), part["target"].flatten(0, 1))
            goals = goals.unflatten(0, (-1, most))
        return MatchBatch(state, part["actions"], active, start, part["subgoal"], weight, goals)

    @torch.no_grad()
    def memory(self, moa: MOA, episode: Tensor) -> Memory:
        """The memory of the B running matches, in their `episode` [B], under the present parameters of `moa`."""
        parts = []
        for rows in torch.arange(self.batch, device=self.game.device).split(64):  # all at once can take gigabytes
            batch = self.batch_of(rows, moa.relative)
            own, others = moa.relative(batch.state)
            step = moa.features(moa.seen(own, others), batch.actions.flatten(0, 1), batch.active.flatten(0, 1))
            step = step.unflatten(0, batch.start.shape)  # [rows, L, N, E + 1]
            running = self.data["episode"][rows, : step.shape[1]] == episode[rows].unsqueeze(1)
            parts.append((step.sum(1), (step * running[..., None, None]).sum(1)))
        return Memory(*(torch.cat(part) for part in zip(*parts, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# PPO
# ---------------------------------------------------------------------------------------------------------------------
def generalised_advantages(rewards, values, next_values, goes_on, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages [T, B, N] of every player by itself (GAE, Schulman et al. 2016, eq. 16); arguments [T, B, N].
    `next_values`: V of the player's next state; 0 where the player left or the game terminated; V of the final state if
    it was truncated. bool `goes_on`: the next row continues the player's episode."""
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += gamma * gae_lambda * goes_on[t] * advantages[t + 1]
    return advantages


def ppo_loss(actor, critic, rows, args: Args, ent_coef: Tensor, imitate: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a minibatch of R rows, and its terms [R]. Clipped PPO on the policy that acted: log pi_theta plus the
    planner's stored offset, so that the ratio is exact. Where the planner acted alone, `imitate`: cross-entropy towards
    its policy (HOP, Huang et al. 2024)."""
    own, others, goal, mask, offset = (rows[name] for name in ("own", "others", "goal", "mask", "offset"))
    prior = masked(actor(own, others, goal), mask)
    log_policy = (prior if imitate else prior + offset).log_softmax(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    terms = {"value": 0.5 * (critic(own, others, goal).squeeze(-1) - rows["return"]).square(), "entropy": entropy}
    if imitate:
        terms["policy"] = -(masked(offset, mask).softmax(-1) * log_policy).sum(-1)
    else:
        log_ratio = log_policy.gather(1, rows["action"].unsqueeze(1)).squeeze(1) - rows["log_prob"]
        ratio, advantage = log_ratio.exp(), rows["advantage"]
        if args.norm_adv:
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
        terms["policy"] = -torch.minimum(advantage * ratio, advantage * clipped)
        terms |= {"approx_kl": ratio - 1.0 - log_ratio, "clip_fraction": ((ratio - 1.0).abs() > args.clip_coef).float()}
    loss = terms["policy"].mean() + args.vf_coef * terms["value"].mean()
    return loss if imitate else loss - ent_coef * entropy.mean(), {name: term.detach() for name, term in terms.items()}


def minibatches(rows: dict[str, Tensor], epochs: int, parts: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
    """`epochs` passes over `rows` [R, ..], each in `parts` random parts."""
    some = next(iter(rows.values()))
    for _ in range(epochs):
        order = torch.randperm(len(some), generator=generator, device=some.device)
        for index in filter(len, order.tensor_split(parts)):
            yield {name: value.index_select(0, index) for name, value in rows.items()}


# method: no transition network
KEPT = {  # attributes in a checkpoint besides weights, games and matches
    "trainer": ["returns", "global_step", "iteration", "pretrained"],
    "co_players": ["seat", "kind", "target", "episode"],
    "buffer": ["stored", "kept", "offered"],
}
FREE = """total_timesteps checkpoint_every capture_video save_model profile resume track compile wandb_project_name
    wandb_entity exp_name evaluate eval_episodes""".split()  # options that a resumed run may change


# method: no transition network
class Trainer:
    """All that changes in a run: agent, optimisers, games, co-players, memories, buffer, generator, counters."""

    # method: no transition network
    def __init__(self, args: Args):
        self.args, self.device = args, torch.device("cuda" if args.cuda else "cpu")
        torch.manual_seed(args.seed)
        self.game = game = GridGame(args.env_id, self.device)
        self.generator = Generator(self.device).manual_seed(args.seed)
        self.agent = agent = Agent(game, args)
        nets = {"policy": nn.ModuleList([agent.actor, agent.critic]), "moa": agent.moa}
        lr = {"policy": args.learning_rate, "moa": args.moa_learning_rate}
        self.optimizers = {k: torch.optim.Adam(net.parameters(), lr[k], eps=1e-5) for k, net in nets.items()}
        pool = args.co_players.split(",")
        self.co_players = CoPlayers(game, pool, args.num_envs, args.match_episodes, self.generator)
        self.buffer = MOABuffer(game, args.num_envs, args.moa_capacity, args.match_episodes, args.moa_buffer)
        self.state = game.initial_state(args.num_envs, self.generator)
        self.memory = agent.moa.initial_memory(args.num_envs)
        self.returns = torch.zeros(args.num_envs, game.num_players, device=self.device)  # of the running episodes
        self.global_step, self.iteration, self.pretrained = 0, 0, 0
        self.log: dict[str, list[float]] = collections.defaultdict(list)  # of the episodes that ended in this iteration
        self.ppo_loss = ppo_loss
        hot = [(self, "ppo_loss"), (agent, "puct")]
        for owner, name in [*hot, *((game, name) for name in ("step", "hits", "action_mask"))] if args.compile else []:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))

    def rollout(self) -> dict[str, Tensor]:
        """Plays `--num-steps` steps of every game, ended ones anew; fields of Decision and more, [T, B, N, ..]."""
        args, game, agent, timer, co_players = self.args, self.game, self.agent, self.agent.timer, self.co_players
        steps: list[dict[str, Tensor]] = []
        if args.goal == "inferred" and not args.freeze_moa:
            with timer("memory"):
                self.memory = self.buffer.memory(agent.moa, co_players.episode)
        for _ in range(args.num_steps):
            state, learner, mask = self.state, co_players.learner, game.action_mask(self.state)
            with timer("co-players"):
                actions = co_players.act(state, mask)
            with timer("compute_action"):
                oracle = co_players.oracle(agent, state)
                decision = agent.act(state, mask, self.memory, learner, self.generator, oracle)
            actions = torch.where(learner, decision.action, actions)
            with timer("game"):
                after, reward, terminated, truncated = game.step(state, actions)
            ended, here, stays = terminated | truncated, state.players >= 0, after.players >= 0
            match_ended, final_value = ended & (co_players.episode + 1 >= args.match_episodes), torch.zeros_like(reward)
            if truncated.any():
                with timer("compute_action"):
                    memory = agent.remember(self.memory, state, actions, *[torch.zeros_like(ended)] * 2)
                    oracle = co_players.oracle(agent, after)
                    final_value = agent.value(after, memory, oracle) * (truncated.unsqueeze(1) & stays)
            with timer("memory"):
                self.memory = agent.remember(self.memory, state, actions, ended, match_ended)
            if agent.uses_moa:
                with timer("MOA buffer"):
                    self.buffer.add(state, actions, co_players, reward, after)
                    self.buffer.end(match_ended, self.global_step + self.pretrained)
            mixed = (1.0 - args.prosocial) * reward + args.prosocial * reward.mean(1, keepdim=True)
            fields = {**decision._asdict(), "action": actions, "other_actions": actions[:, agent.relative.others]}
            fields |= {"reward": mixed * args.reward_scale, "goes_on": stays & ~ended.unsqueeze(1), "active": here}
            steps.append({**fields, "learner": learner & here, "final_value": final_value})
            self.state, self.returns, self.global_step = after, self.returns + reward, self.global_step + args.num_envs
            if ended.any():
                self.record(ended)
                self.state = after.replaced(ended, game.initial_state(args.num_envs, self.generator))
            co_players.observe(state, actions, ended)
        with timer("compute_action"):
            last = agent.value(self.state, self.memory, co_players.oracle(agent, self.state))
        rows = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        following = torch.cat([rows["value"][1:], last.unsqueeze(0)])  # [T, B, N]
        return {**rows, "next_value": torch.where(rows["goes_on"], following, rows["final_value"])}

    def record(self, ended: Tensor) -> None:
        """Notes the returns of episodes that ended, in games bool [B] `ended`, by kind and by the learner's seat."""
        seats = torch.arange(self.game.num_players, device=self.device).expand_as(self.returns)
        columns = (x[ended].flatten().tolist() for x in (self.co_players.kind, seats, self.returns))
        for kind, seat, total in zip(*columns, strict=True):
            own = [f"returns/seat_{seat}", "charts/episodic_return"] if kind == 0 else []
            for name in (f"returns/{self.co_players.names[kind]}", *own):
                self.log[name].append(total)
        self.log["charts/episodic_length"].extend(self.state.time[ended].tolist())
        self.returns = self.returns.masked_fill(ended.unsqueeze(1), 0.0)

    # method: no transition network
    def iterate(self) -> dict[str, Tensor]:
        """One iteration, rollout and updates; returns metrics."""
        args, agent, timer = self.args, self.agent, self.agent.timer
        done = self.global_step / args.total_timesteps
        agent.plan_mode = agent.plan_mode if done < args.plan_until else "none"  # and stays off if a run is made longer
        rate = args.learning_rate * (1.0 - done if args.anneal else 1.0)
        ent_coef = args.ent_coef * (max(1.0 - done, args.ent_floor) if args.anneal else 1.0)
        self.optimizers["policy"].param_groups[0]["lr"] = rate
        metrics = {"charts/learning_rate": torch.tensor(rate)}
        with timer("rollout"):
            rows = self.rollout()
        with timer("update"):
            if agent.uses_moa:
                metrics |= self.buffer.statistics(self.global_step + self.pretrained)
                with timer("MOA"):
                    metrics |= {} if args.freeze_moa else self.update_moa(pretraining=False)
            rows["others"], rows["goal"] = agent.with_goals(rows["others"], rows["goal"])
            with timer("PPO"):
                metrics |= self.update_policy(rows, ent_coef)
        self.iteration += 1
        return metrics

    def descend(self, name: str, loss: Tensor, max_norm: float) -> Tensor:
        """One step of the optimiser `name`, its gradient clipped; returns the gradient's norm."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        optimizer.step()
        return norm

    def update_policy(self, rows: dict[str, Tensor], ent_coef: float) -> dict[str, Tensor]:
        """PPO, or imitation of the planner, on the learner's rows in a rollout; means over minibatches, and by seat."""
        args, agent, n = self.args, self.agent, self.game.num_players
        steps = (rows[name] for name in ("reward", "value", "next_value", "goes_on"))
        rows["advantage"] = generalised_advantages(*steps, args.gamma, args.gae_lambda)
        rows["return"] = rows["advantage"] + rows["value"]
        rows["seat"] = torch.arange(n, device=self.device).expand(rows["value"].shape)
        if not rows["learner"].any():
            return {}
        unused = ("learner", "active", "goes_on", "final_value", "next_value", "other_actions", "reward")
        rows = {name: value[rows["learner"]] for name, value in rows.items() if name not in unused}  # [R, ..]
        metrics = {} if agent.plan_mode == "none" else self.calibrate(rows)
        residual, spread = rows["advantage"].var(correction=0), rows["return"].var(correction=0).clamp(min=1e-9)
        metrics["losses/explained_variance"] = 1.0 - residual / spread
        if imitate := agent.plan_mode == "hop":
            expected = (masked(rows["offset"], rows["mask"]).softmax(-1) * rows["q_plan"]).sum(-1)
            rows["return"] = torch.where(rows["mask"].sum(-1) > 1, 0.5 * (rows["return"] + expected), rows["return"])
        sums: dict[str, Tensor | float] = collections.defaultdict(float)  # [2, N]: sums and counts by seat
        for part in minibatches(rows, args.update_epochs, args.num_minibatches, self.generator):
            loss, terms = self.ppo_loss(agent.actor, agent.critic, part, args, torch.tensor(ent_coef), imitate)
            terms["grad_norm"] = self.descend("policy", loss, args.max_grad_norm).expand(len(part["seat"]))
            seats = F.one_hot(part["seat"], n).float()
            for name, term in terms.items():
                sums[name] = sums[name] + torch.stack([term @ seats, seats.sum(0)])
        metrics |= {f"losses/{name}": total[0].sum() / total[1].sum() for name, total in sums.items()}
        by_seat = {name: sums[name][0] / sums[name][1].clamp(min=1) for name in ("policy", "value")}  # [N] each
        return metrics | {f"losses/{name}_seat_{i}": mean[i] for name, mean in by_seat.items() for i in range(n)}

    def calibrate(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Regression of (return - V) on (Q_plan(a) - E_pi Q_plan) over R rows, and Q_plan's scale; both set beta."""
        agent, q_plan, mask = self.agent, rows["q_plan"], rows["mask"]
        choice = mask.sum(-1) > 1
        policy = masked(rows["offset"] + (0.0 if agent.plan_mode == "hop" else rows["prior"]), mask).softmax(-1)
        gain = q_plan.gather(1, rows["action"].unsqueeze(1)).squeeze(1) - (policy * q_plan).sum(-1)
        slope = (gain * rows["advantage"])[choice].sum() / gain[choice].square().sum().clamp(min=1e-9)
        rms = root_mean_square(q_plan, mask)
        agent.plan_slope.lerp_(slope.clamp(-1.0, 2.0), 0.2)
        agent.plan_rms.lerp_(rms, 0.2)
        return {"losses/plan_slope": slope, "losses/plan_rms": rms, "losses/plan_beta": agent.plan_beta.clone()}

    def update_moa(self, pretraining: bool) -> dict[str, Tensor]:
        """`--moa-updates` minibatches of matches from the buffer; returns means over them."""
        args, moa, sums = self.args, self.agent.moa, collections.Counter()
        for _ in range(args.moa_updates if len(self.buffer) else 0):
            batch = self.buffer.sample(args.moa_matches, self.agent.relative, args.goal == "oracle", self.generator)
            loss, terms = moa_loss(moa, batch, args.moa_alpha, args.subgoal_coef, pretraining, self.generator)
            self.descend("moa", loss, 1.0)
            sums.update(terms)
        return {name: total / args.moa_updates for name, total in sums.items()}

    def pretrain(self, stop: list) -> None:
        """Plays `--pretrain-moa-steps` game steps with the first policy, and trains the VAE alone on them; ends early
        when `stop` is no longer empty."""
        while self.agent.uses_moa and self.pretrained < self.args.pretrain_moa_steps and not stop:
            self.rollout()
            self.update_moa(pretraining=True)
            if self.args.goal == "inferred":
                self.memory = self.buffer.memory(self.agent.moa, self.co_players.episode)
            self.pretrained += self.args.num_envs * self.args.num_steps
            self.global_step = 0
        if self.pretrained and not len(self.buffer):
            print("--pretrain-moa-steps: no match has ended, so nothing was learnt; take more", file=sys.stderr)
        self.log.clear()

    def load_moa(self, path: str) -> None:
        """Takes the MOA (encoder, decoder, subgoals) of a checkpoint. Raises UsageError."""
        content = load_checkpoint(path, self.device)
        weights, args, goal = content["agent"].items(), content["args"], self.args.goal
        if args["goal"] != goal or (goal != "inferred" and args.get("plan_update", "none") == "none"):
            raise UsageError(f"--load-moa: {path} has no MOA that was trained with --goal {goal}")
        try:
            self.agent.moa.load_state_dict({k[len("moa.") :]: v for k, v in weights if k.startswith("moa.")})
        except RuntimeError:
            raise UsageError(f"--load-moa: the MOA of {path} is of another game, goal or size") from None

    def model(self) -> dict:
        """What a checkpoint needs to be played."""
        head = {"script": SCRIPT, "game": self.game.id, "args": dataclasses.asdict(self.args)}
        return {**head, "plan_mode": self.agent.plan_mode, "agent": self.agent.state_dict()}

    def content(self) -> dict:
        """All that the run needs to go on as if it had not stopped: tensors and plain Python values. What callable
        co-players remember by themselves is not in it."""
        held, parts = self.args.num_envs + len(self.buffer), {part: getattr(self, part, self) for part in KEPT}
        return self.model() | {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "kept": {part: {name: getattr(parts[part], name) for name in names} for part, names in KEPT.items()},
            "games": [list(self.state), list(self.memory)],
            "co_player_memory": {k: list(memory) for k, memory in self.co_players.memory.items()},
            "matches": {name: value[:held].clone() for name, value in self.buffer.data.items()},
        }

    def load(self, content: dict) -> None:
        """Goes on from a checkpoint's `content`. Raises UsageError if it is no checkpoint.pt or the options differ."""
        if "optimizers" not in content or content["script"] != SCRIPT:
            raise UsageError(f"--resume needs a checkpoint.pt of {SCRIPT}; a model.pt can only be played")
        for name, value in dataclasses.asdict(self.args).items():
            same_game = name == "env_id" and content["game"] == self.game.id  # in another spelling
            if name not in FREE and content["args"][name] != value and not same_game:
                raise UsageError(f"--resume: --{name.replace('_', '-')} was {content['args'][name]!r} in that run")
        self.agent.load_state_dict(content["agent"])
        self.agent.plan_mode = content["plan_mode"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.generator.set_state(content["generator"].cpu())
        for part in KEPT:
            vars(getattr(self, part, self)).update(content["kept"][part])  # "trainer" is this object itself
        self.state, self.memory = GameState(*content["games"][0]), Memory(*content["games"][1])
        for k, memory in self.co_players.memory.items():  # of this script, or of another
            self.co_players.memory[k] = type(memory)(*content["co_player_memory"][k])
        for name, value in content["matches"].items():
            self.buffer.data[name][: len(value)] = value


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def play_matches(agent: Agent, co_players: CoPlayers, generator: Generator, watch: Callable | None = None) -> Tensor:
    """Returns [B, episodes, N], by seat, of one match in each game. `watch(state, memory, episode)` sees each step."""
    game, batch, episodes = co_players.game, co_players.batch, co_players.match_episodes
    state, memory = game.initial_state(batch, generator), agent.moa.initial_memory(batch)
    returns = torch.zeros(batch, episodes, game.num_players, device=game.device)
    games, playing = torch.arange(batch, device=game.device), torch.ones(batch, dtype=torch.bool, device=game.device)
    while playing.any():
        episode, learner, mask = co_players.episode, co_players.learner, game.action_mask(state)
        if watch is not None:
            watch(state, memory, episode)
        actions = co_players.act(state, mask)
        seats, oracle = learner & playing.unsqueeze(1), co_players.oracle(agent, state)
        actions = torch.where(learner, agent.act(state, mask, memory, seats, generator, oracle).action, actions)
        after, reward, terminated, truncated = game.step(state, actions)
        returns[games, episode] += reward * playing.unsqueeze(1)
        ended = terminated | truncated
        match_ended = co_players.observe(state, actions, ended)
        memory = agent.remember(memory, state, actions, ended, match_ended)
        state, playing = after.replaced(ended, game.initial_state(batch, generator)), playing & ~match_ended
    return returns


def evaluate(
    checkpoint, co_players, *, env_id=None, episodes=200, num_envs=64, match_episodes=10, seed=1, device="cpu", **play
) -> dict[str, float | list[float]]:
    """Few-shot evaluation: one learned player, at a random seat each match, with N-1 co-players. Raises UsageError.
    `checkpoint`: its path, or its run's folder. `co_players`: one name, path or callable for all of them, or N-1 of
    them (a list, or separated by commas). `env_id`: by default the game trained on; another of its family will do.
    Actions are drawn from the policy, with the planner if the checkpoint had it on; `play` (options in PLAYED) replaces
    the checkpoint's. Returns, undiscounted sums of rewards: `focal_return`, the mean of `focal_returns` [episodes] in
    the order of matches, `co_player_return` (mean), and `by_episode` [match_episodes], the focal mean at the k-th
    episode of a match."""
    if min(episodes, num_envs, match_episodes) < 1:
        raise UsageError("episodes, num_envs and match_episodes must be at least 1")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device}: no CUDA device is available")
    agent = load_agent(checkpoint, device, play, env_id)
    game, entries = agent.game, co_players.split(",") if isinstance(co_players, str) else co_players
    entries = list(entries) if isinstance(entries, list | tuple) else [entries]
    entries = entries * (game.num_players - 1) if len(entries) == 1 else entries
    matches, generator = math.ceil(episodes / match_episodes), Generator(device).manual_seed(seed)
    returns, seats = [], []
    for _ in range(math.ceil(matches / num_envs)):
        players = CoPlayers(game, entries, min(num_envs, matches), match_episodes, generator, fixed=True)
        seats.append(players.seat[:, :1])
        returns.append(play_matches(agent, players, generator))
    returns, seats = torch.cat(returns)[:matches], torch.cat(seats)[:matches]  # [matches, episodes, N], [matches, 1]
    focal = returns.gather(2, seats.unsqueeze(1).expand(-1, match_episodes, 1)).squeeze(2)
    company = (returns.sum(2) - focal) / max(1, game.num_players - 1)
    kept = focal.flatten()[:episodes].tolist()
    result = {"focal_return": float(np.mean(kept)), "focal_returns": kept, "by_episode": focal.mean(0).tolist()}
    return {**result, "co_player_return": float(company.flatten()[:episodes].mean())}


def record_episode(agent: Agent, co_players: CoPlayers, generator: Generator, path: Path) -> None:
    """A GIF of a match's last episode: all players, the items, and what the focal player believes of the others."""
    frames, focal = [], int(co_players.seat[0, 0])
    kinds = [co_players.names[k] for k in co_players.kind[0].tolist()]
    title = "  ".join(f"{seat}: {'focal' if seat == focal else kind}" for seat, kind in enumerate(kinds))

    def watch(state: GameState, memory: Memory, episode: Tensor) -> None:
        if int(episode[0]) < co_players.match_episodes - 1:
            return
        own, others = agent.relative(state)
        goal, _ = agent.infer(memory, own, others, co_players.oracle(agent, state))
        items = state.items.unsqueeze(1).expand(-1, agent.game.num_players, -1)
        probs = agent.moa.subgoal_logits(state.players, items, own, others, goal).softmax(-1)[0].tolist()
        frames.append(Image.fromarray(render_frame(agent.game, state, {"focal": focal, "probs": probs}, title)))

    play_matches(agent, co_players, generator, watch)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500, loop=0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and logging
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem


class Timer:
    """`with timer("name"):` sums seconds and calls by nested path; a disabled timer does nothing."""

    def __init__(self, enabled: bool, cuda: bool = False):
        self.enabled, self.synchronize = enabled, torch.cuda.synchronize if cuda else lambda: None
        self.seconds, self.calls = collections.Counter(), collections.Counter()  # by path: names, outermost part first
        self.path: tuple[str, ...] = ()  # of the part that is running

    @contextlib.contextmanager
    def __call__(self, name: str):
        if not self.enabled:
            yield
            return
        outer, self.path = self.path, (*self.path, name)
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[self.path] += time.perf_counter() - start
        self.calls[self.path] += 1
        self.path = outer

    def tree(self) -> str:
        """Seconds, share of the whole and calls of every part, as an indented table."""
        lines = [f"{'part':40}   seconds  share    calls"]
        whole = sum(seconds for path, seconds in self.seconds.items() if len(path) == 1)
        for path in sorted(self.seconds, key=lambda p: [(-self.seconds[p[: k + 1]], p[k]) for k in range(len(p))]):
            label, seconds = "  " * (len(path) - 1) + path[-1], self.seconds[path]
            lines.append(f"{label:40} {seconds:9.2f} {seconds / whole:6.1%} {self.calls[path]:8}")
        return "\n".join(lines)


@contextlib.contextmanager
def refused(what: str):
    """Turns whatever is raised inside (a damaged file and an import can raise anything) into a UsageError, one line."""
    try:
        yield
    except Exception as error:
        text = f"{what} ({' '.join(f'{type(error).__name__} {error}'.split())[:160]})"
        raise UsageError(str(error) if type(error).__name__ == "UsageError" else text) from None  # of any script


def save_atomically(content: dict, path: Path) -> None:
    """torch.save to a temporary file beside `path`, then renamed: a killed run leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """The content of a checkpoint of this script or of one beside it, or of its run's folder. Raises UsageError."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}")
    with refused(f"cannot read checkpoint {path}"), warnings.catch_warnings(action="ignore"):
        content = torch.load(path, map_location=device, weights_only=True)
    script = content.get("script", "another program") if isinstance(content, dict) else "another program"
    if not re.fullmatch(r"\w+", str(script)) or not Path(__file__).with_name(f"{script}.py").is_file():
        raise UsageError(f"{path} is a file of {script}, not a checkpoint of {SCRIPT} or of a script beside it")
    return content


# method: search on top of the networks of any script
def load_agent(path: str | Path, device="cpu", options: dict | None = None, env_id: str | None = None) -> Agent:
    """The agent of a checkpoint, ready to play `env_id` (default: the game trained on), with `options` (of PLAYED, by
    name) in place of the checkpoint's; that of another script plays by that script, unless a `plan_update` in `options`
    puts the search on top: without one, no other option goes. Raises UsageError."""
    content, options, base = load_checkpoint(path, device), options or {}, None
    if set(options) - set(PLAYED):
        raise UsageError(f"options that may change when an agent is played: {', '.join(PLAYED)}")
    if content["script"] != SCRIPT:
        searching = options.get("plan_update", "none") != "none"
        if options.keys() - {"plan_update"} and not searching:
            raise UsageError(f"{path} is of {content['script']}: options of search need --plan-update offset or hop")
        with refused(f"cannot import {content['script']}, whose checkpoint {path} is"):
            base = importlib.import_module(content["script"]).load_agent(path, device, env_id=env_id)
        if not searching:
            return base
        fitting = {field.name for field in dataclasses.fields(Args)} & set(content["args"])
        content["args"] = {name: content["args"][name] for name in fitting}
    with refused(f"checkpoint {path} does not fit this version"):
        planned = content["args"].get("plan_update", "none") != "none"
        args = resolved(Args(**{**content["args"], **options, "cuda": False}))  # `device` may be another one
        agent = Agent(GridGame(content["game"], device), args)
        if base is None:
            agent.load_state_dict(content["agent"])
            agent.plan_mode = content["plan_mode"]
        else:
            agent.search_on(base)
    mode, learnt = options.get("plan_update", agent.plan_mode), args.goal == "inferred" or planned
    if mode != "none" and args.co_player_model == "moa" and not learnt:
        raise UsageError(f"{path} has no trained MOA: the search needs --co-player-model uniform")
    agent.on_game(env_id or agent.game.id)
    agent.eval()
    agent.turn_planner(mode)
    return agent


# method: a planner of another script is no search
def played(content: dict) -> dict:
    """The values of the options PLAYED with which a checkpoint's `content` is played."""
    if content["script"] != SCRIPT:
        return {"plan_update": "none"}
    values = {**content["args"], "plan_update": content["plan_mode"]}
    return {name: values[name] for name in PLAYED if name in values}


EVALUATED = """evaluate eval_episodes env_id co_players match_episodes num_envs seed
    cuda""".split()  # options that `--evaluate` reads, besides PLAYED


def print_evaluation(args: Args) -> None:
    """`--evaluate`: plays the checkpoint on `--env-id` and prints the returns with 95 % intervals over matches."""
    sizes = {"episodes": args.eval_episodes, "num_envs": args.num_envs, "match_episodes": args.match_episodes}
    co_players, device = args.co_players or "self", "cuda" if args.cuda else "cpu"
    before = {**vars(Args()), **played(load_checkpoint(args.evaluate))}
    options = {name: getattr(args, name) for name in PLAYED if getattr(args, name) not in (None, before[name])}
    result = evaluate(args.evaluate, co_players, env_id=args.env_id, **sizes, seed=args.seed, device=device, **options)
    returns, length = result["focal_returns"], args.match_episodes
    matches = [np.mean(returns[k : k + length]) for k in range(0, len(returns), length)]
    error = 1.96 * np.std(matches, ddof=1) / math.sqrt(len(matches)) if len(matches) > 1 else math.nan
    print(f"focal return      {np.mean(returns):7.3f} +- {error:.3f}  ({len(returns)} episodes, with {co_players})")
    print(f"co-player return  {result['co_player_return']:7.3f}")
    print("by episode of a match " + " ".join(f"{value:.2f}" for value in result["by_episode"]))


def start_run(args: Args, step: int) -> tuple[Path, SummaryWriter]:
    """The run's folder (that of `--resume`, or a new one), its args.json, and its TensorBoard writer from `step` on."""
    with refused("--track needs wandb: pip install wandb"):
        track = importlib.import_module("wandb").init if args.track else None
    options, name = dataclasses.asdict(args), f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    folder = Path(args.resume or f"runs/{name}")
    folder = folder.parent if folder.is_file() else folder
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=bool(args.resume))
            break
        folder = folder.with_name(folder.name + "+")
    (folder / "args.json").write_text(json.dumps(options, indent=2) + "\n")
    if track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name}
        track(**names, dir=str(folder), config=options, sync_tensorboard=True, reinit="finish_previous")
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    table = "".join(f"\n|{name}|{value}|" for name, value in options.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|{table}")
    return folder, writer


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """The whole run; returns the final metrics, and `run`, its folder. Raises UsageError before anything is written."""
    args = resolved(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=args.cuda)  # CUDA lacks some of them
    if ":" in args.co_players:  # callables: others of their kind try one step, before anything is written
        game, pool = GridGame(args.env_id, "cuda" if args.cuda else "cpu"), args.co_players.split(",")
        with refused(f"co-players {args.co_players} cannot play"):
            state, generator = game.initial_state(args.num_envs), Generator(game.device)
            players = CoPlayers(game, pool, args.num_envs, args.match_episodes, generator)
            players.act(state, game.action_mask(state))
    trainer, metrics, stop, per_iteration = Trainer(args), {}, [], args.num_envs * args.num_steps
    if args.pretrain_moa_steps and args.goal != "inferred":
        raise UsageError(f"--pretrain-moa-steps trains nothing that is read with --goal {args.goal}")
    if (args.freeze_moa or args.load_moa) and not trainer.agent.uses_moa:
        raise UsageError(f"--{'freeze' if args.freeze_moa else 'load'}-moa: nothing in this run reads the MOA")
    with refused(f"checkpoint {args.resume or args.load_moa} does not fit this version"):
        if args.resume:
            trainer.load(load_checkpoint(args.resume, trainer.device))
        elif args.load_moa:
            trainer.load_moa(args.load_moa)
    folder, writer = start_run(args, trainer.global_step)

    def on_signal(number: int, frame: object) -> None:
        stop.append(signal.signal(number, signal.default_int_handler))  # after the iteration; a second Ctrl-C at once

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer.agent.timer = timer = Timer(args.profile, args.cuda)
    bar = tqdm(total=args.total_timesteps, initial=trainer.global_step, unit="step", unit_scale=True, desc=args.env_id)
    try:
        with timer("pretraining"):
            trainer.pretrain(stop)
        save_atomically(trainer.content(), folder / "checkpoint.pt")
        while trainer.global_step + per_iteration <= args.total_timesteps and not stop:
            trainer.log.clear()
            start = time.perf_counter()
            with timer("iteration"):
                metrics = {name: float(value) for name, value in trainer.iterate().items()}
            metrics["charts/SPS"] = per_iteration / (time.perf_counter() - start)
            metrics |= {name: float(np.mean(values)) for name, values in trainer.log.items()}
            metrics |= {"/".join(("time", *path)): seconds for path, seconds in timer.seconds.items()}
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} is {value} at step {trainer.global_step}, see {folder}")
                writer.add_scalar(name, value, trainer.global_step)
            bar.set_postfix_str(f"return {metrics.get('charts/episodic_return', math.nan):.2f}", refresh=False)
            bar.update(per_iteration)
            if trainer.iteration % args.checkpoint_every == 0:
                save_atomically(trainer.content(), folder / "checkpoint.pt")
        save_atomically(trainer.content(), folder / "checkpoint.pt")
        if args.save_model:
            save_atomically(trainer.model(), folder / "model.pt")
        if args.capture_video and not stop:
            generator = Generator(trainer.device).manual_seed(args.seed)
            players = CoPlayers(trainer.game, args.co_players.split(","), 1, args.match_episodes, generator)
            with timer("video"):
                record_episode(trainer.agent.eval(), players, generator, folder / "episode.gif")
    finally:
        bar.close()
        writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if args.profile:
        print(timer.tree())
    print(f"{'stopped' if stop else 'done'} at step {trainer.global_step}: {folder}")
    return {**metrics, "run": str(folder)}


def parse_arguments(arguments: list[str]) -> Args:
    """Args from the command line, over the options of a run to resume or the game of one to play. Raises UsageError."""

    def parse(default: Args) -> Args:
        captured = io.StringIO()
        try:
            with contextlib.redirect_stderr(captured):
                return tyro.cli(Args, args=arguments, default=default, description=__doc__)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            # tyro's box: a title, the message, then hints, with rules or empty lines between them
            text = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", "", captured.getvalue()).partition("\n")[2]
            blocks = [" ".join(block.split()) for block in re.split(r"(?m)^[ ─-]*$", text)]
            raise UsageError(next(filter(None, blocks), "bad command line")) from None

    args = parse(Args())
    path = args.evaluate or args.resume
    if path is None:
        return args
    content = load_checkpoint(path)
    with refused(f"checkpoint {path} does not fit this version"):
        default = Args(env_id=content["game"], **played(content)) if args.evaluate else Args(**content["args"])
    args = parse(default)
    given = [name for name, value in vars(args).items() if value != getattr(default, name)]
    read = *EVALUATED, *(PLAYED if vars(args).get("plan_update") != "none" else ["plan_update"])
    idle = [f"--{name.replace('_', '-')}" for name in given if args.evaluate and name not in read]
    if idle:
        raise UsageError(f"--evaluate has no use for {', '.join(idle)}")
    return args


def main() -> None:
    """Command line: trains, or evaluates with `--evaluate`. Exit status 2 and one line for what cannot be done."""
    try:
        args = parse_arguments(sys.argv[1:])
        print_evaluation(args) if args.evaluate else train(args)
    except (UsageError, FloatingPointError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()

"""HOP+ with discrete goals and no planner: opponent modelling in mixed-motive grid games, in one file.

A learner plays Markov Stag-Hunt or Markov Snowdrift among co-players whose goals it infers: one of G discrete goals for
every seat and match, each an embedding. A model of other agents (MOA) predicts actions under every goal; from the
likelihoods of what a player did, Bayes' rule gives a belief N x G, which goes on from episode to episode; PPO reads the
embeddings of the goals that are assigned to the co-players. Papers: HOP (Huang et al., ICML 2024, arXiv 2406.08002),
Gumbel-Softmax (Jang et al., ICLR 2017, 1611.01144), PPO (1707.06347), GAE (1506.02438).

    python hop_ppo_gumbel.py --num-envs 16                          # train on the small stag hunt
    python hop_ppo_gumbel.py --env-id msg --co-players self         # self-play on the snowdrift game
    python hop_ppo_gumbel.py --evaluate runs/NAME --co-players ns   # play a checkpoint with three stag hunters
    diff hop_onestep.py hop_ppo_gumbel.py                           # the method: what differs from the sibling

A co-player is `self`; a scripted name (msh: ns, nh, random; msg: cleaner, exploiter, random; each also with -noisy);
a checkpoint, by its path; `package.module:name`, or a callable `(observation [B, C, H, W], action_mask
[B, A], clock [B, 2], generator) -> actions [B]`, one for each of the N-1 co-players (a class is instantiated for each).
If it has a method `start_match(which [B] bool)`, that is called when matches start. Before training, another object (or
copy) of each plays one step of a game that nothing is learnt from.
Shapes in comments: B games, N seats (players), A actions, C planes, G goals, M items, T steps, Z goal, R rows, .."""

import collections
import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
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


# method: options of goals and beliefs, none of a planner
@dataclasses.dataclass
class Args:
    # common
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of everything random
    torch_deterministic: bool = True  # use torch's deterministic algorithms
    cuda: bool = False  # run on the GPU
    # method: there is no planner
    compile: bool = False  # compile the game and the PPO loss with torch.compile
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
    # method: there is no transition network
    hidden_size: int = 64  # width of the policy's and value's networks
    reward_scale: float | None = None  # factor on rewards in learning (default: 3 / the game's best mean return)
    pg: bool = False  # plain policy gradient, same advantages, no ratio (on-policy only with --update-epochs 1)
    # goals and MOA
    # method: discrete goals
    goal: Literal["inferred", "none", "oracle"] = "inferred"  # discrete, zero (Direct-OM), or the scripted ones' truth
    goals: int = 4  # discrete goals a player (G)
    # method: of a discrete goal's embedding
    goal_size: int = 8  # dimensions of a goal's embedding
    goal_training: Literal["gumbel", "em", "amortised"] = "gumbel"  # responsibilities drawn, soft; or guessed
    temperature: float = 1.0  # of the Gumbel-Softmax at the start; falls to a tenth of it, if annealed
    belief: Literal["bayes", "encoder", "none"] = "bayes"  # from the likelihoods; an encoder's guess; always uniform
    inter_om: Literal["posterior", "count"] = "posterior"  # what an ended episode adds to the prior: that, or its goal
    inter_om_alpha: float = 0.0  # weight of the old prior in the next episode's; 0: the last posterior, 1: nothing kept
    assignment: Literal["soft", "hard", "exclusive"] = "soft"  # of goals to players: mean, likeliest, one-to-one
    own_goal: bool = False  # the policy chooses a goal of its own, too
    goal_period: int = 10  # game steps for which it keeps that goal, at most to the episode's end
    moa_hidden_size: int = 64  # width of the MOA's networks
    # method: larger, since its minibatches are fewer
    moa_learning_rate: float = 5e-3  # of the MOA (Adam), annealed as well
    subgoal_coef: float = 0.1  # weight of the subgoal's reconstruction
    moa_every: int = 4  # iterations from one training of the MOA to the next; then all beliefs are computed anew
    # method: more at a time, since not every iteration trains
    moa_updates: int = 20  # minibatches for the MOA each time
    moa_matches: int = 8  # matches in each
    moa_share: float = 0.25  # share of their steps that are read, drawn anew each time; the likelihood is that of those
    moa_capacity: int = 1000  # matches that the MOA's buffer holds
    moa_buffer: Literal["all", "positive", "balanced"] = "all"  # which episodes it keeps and how it weighs them
    load_moa: str | None = None  # folder or checkpoint from which the MOA is taken
    freeze_moa: bool = False  # do not train the MOA
    # method: there is no VAE
    pretrain_moa_steps: int = 0  # game steps played first, besides the run's, to train the MOA


# method: there is no planner
FAMILY_DEFAULTS = {"msh": {"gamma": 0.99}, "msg": {"gamma": 0.85}}  # of the options that are None
# method: there is no planner, and alpha is the count's
NOT_NEGATIVE = ["seed", "ent_coef", "vf_coef", "subgoal_coef", "pretrain_moa_steps"]
# method: as well
SHARES = ["gamma", "gae_lambda", "prosocial", "ent_floor", "inter_om_alpha", "moa_share"]


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
# method: beliefs; the sums are the encoder's
class Memory(NamedTuple):
    """What a MOA has seen of every seat in the running match. Fields that no option asks for have no last entries."""

    prior: Tensor  # float32 [B, N, G] log of the belief with which the running episode began
    likelihood: Tensor  # float32 [B, N, G] log-likelihood of the episode so far under every goal
    match: Tensor  # float32 [B, N, E + 1] over the match; the last entry counts steps
    own: Tensor  # float32 [B, N, G] goal that the seat itself pursues, one-hot; zeros: to be drawn now
    key: Tensor  # int64 [B, N, 1] counter of random numbers for that draw


LEAST = 1e-3  # share of the uniform distribution in every prior: no goal is ever ruled out


class GoalHeads(nn.Module):
    """A network whose last layer's weights are linear in the goal: out(x)[.., outputs, Z + 1] times (g, 1), x =
    relu(hidden(relu(own(x) + mix(sum over co-players of relu(other(y_j)))))). All goals cost little more than one."""

    def __init__(self, own: int, other: int, goal: int, outputs: int, hidden: int, gain: float):
        super().__init__()
        self.own, self.other, self.mix = layer(own, hidden), layer(other, hidden // 2), layer(hidden // 2, hidden)
        self.hidden, self.out = layer(hidden, hidden), layer(hidden, outputs * (goal + 1), gain)
        self.outputs, self.goal_size = outputs, goal

    def body(self, own: Tensor, others: Tensor) -> Tensor:
        """[.., H] of own [.., X] and others [.., N-1, Y]: all but the last layer."""
        first = self.own(own) + self.mix(F.relu(self.other(others)).sum(-2))
        return F.relu(self.hidden(F.relu(first)))

    def forward(self, own: Tensor, others: Tensor, goal: Tensor) -> Tensor:
        """[.., outputs] for goals [.., Z], or [.., K, outputs] for [.., K, Z]; more entries of a goal are not read."""
        weight = self.out(self.body(own, others)).unflatten(-1, (self.outputs, self.goal_size + 1))
        goal = F.pad(goal[..., : self.goal_size], (0, 1), value=1.0)
        if goal.dim() < weight.dim():
            return (weight @ goal.unsqueeze(-1)).squeeze(-1)
        return goal @ weight.transpose(-1, -2)

    def every(self, own: Tensor, others: Tensor, goals: Tensor) -> Tensor:
        """[.., outputs, G] for every one of `goals` [G, Z], by one matrix for all of them."""
        goals = F.pad(goals, (0, 1), value=1.0)  # [G, Z + 1]
        weight, bias = (x.unflatten(0, (self.outputs, -1)) for x in (self.out.weight, self.out.bias))
        weight, bias = goals @ weight, bias @ goals.T  # [outputs, G, H], [outputs, G]
        return F.linear(self.body(own, others), weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)


# method: discrete goals, their likelihoods and Bayes' rule in place of a VAE
class MOA(nn.Module):
    """Model of other agents: a table of G goal embeddings, one for all seats, since no seat is special; the decoder
    pi_hat(a_j | o_j, t, g); the subgoal's decoder; and, if an option asks for it, an encoder that guesses the goal. A
    player has one goal in a match. The belief over it is Bayes' rule on the decoder's likelihoods within an episode,
    and from episode to episode what `--inter-om` says: the posterior, or HOP's count (Huang et al. 2024, eq. 2).
    The subgoal of j is the item of its next successful interaction in the episode, or none (OMG, Yu et al. 2024)."""

    # method: table, heads and encoder
    def __init__(self, relative: RelativeFeatures, args: Args):
        super().__init__()
        game, own, other, hidden = relative.game, relative.own_size, relative.other_size, args.moa_hidden_size
        queries, told = len(game.item_counts) * relative.size + 1, args.goal_size
        told = len(SCRIPTED) + 3 + relative.size if args.goal == "oracle" else told
        self.relative, self.args, self.goal = relative, args, args.goal
        self.goal_size = told + args.own_goal * args.goal_size  # what is told of a player, and what it pursues itself
        self.decoder = GoalHeads(own, other, told, game.num_actions, hidden, 1.0)
        self.subgoal = GoalHeads(own, other, told, queries, hidden, 0.01)
        if args.goal == "inferred":
            self.table = nn.Parameter(0.3 * torch.randn(args.goals, args.goal_size))  # small: at first it is noise
        self.encodes = args.goal == "inferred" and (args.belief == "encoder" or args.goal_training == "amortised")
        self.summary = hidden if self.encodes else -1
        self.made = args.seed % 2**14 << 12  # memories, so that seeds differ too
        if self.encodes:
            self.step_feature = layer(own + relative.size + game.num_actions, hidden, 1.0)
            self.guesser = nn.Sequential(layer(2 * hidden + 1, hidden), nn.ReLU(), layer(hidden, args.goals, 0.1))

    # method: other fields
    def initial_memory(self, batch: int) -> Memory:
        """The empty memory of B matches; every one made has random numbers of its own for `--own-goal`."""
        args, seats = self.args, (batch, self.relative.game.num_players)
        zeros = torch.zeros(*seats, args.goals, device=self.relative.game.device)
        sums, own = zeros.new_zeros(*seats, self.summary + 1), zeros[..., : args.goals * args.own_goal]
        key, self.made = torch.arange(zeros[..., 0].numel(), device=zeros.device), self.made + 1
        key = key.view(*seats, 1)[..., : int(args.own_goal)] + (self.made << 32)
        return Memory(zeros - math.log(args.goals), zeros, sums, own, key)

    def seen(self, own: Tensor, others: Tensor) -> Tensor:
        """[.., X + R] own features beside the sum over co-players of their relative cells' functions."""
        return torch.cat([own, others[..., : self.relative.size].sum(-2)], -1)

    def features(self, seen: Tensor, actions: Tensor, active: Tensor) -> Tensor:
        """[.., E + 1] what one step adds to the memory; 0 where bool `active` [..] is False."""
        chosen = F.one_hot(actions, self.relative.game.num_actions)
        feature = torch.tanh(self.step_feature(torch.cat([seen, chosen], -1)))
        return F.pad(feature, (0, 1), value=1.0) * active.unsqueeze(-1)

    def guess(self, match: Tensor) -> Tensor:
        """Logits [.., G] of the encoder's guess from its sums [.., E + 1] over the match."""
        sums, count = match[..., :-1], match[..., -1:]
        inputs = [sums / (1.0 + count), sums / (10.0 + 0.2 * count), torch.log1p(count) / 4.0]
        return self.guesser(torch.cat(inputs, -1))

    def log_likelihood(self, own: Tensor, others: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        """float32 [.., G]: log pi_hat(a | o, t, g) of the `actions` [..] taken, under every goal in one call."""
        logits = masked(self.decoder.every(own, others, self.table), mask.unsqueeze(-1)).log_softmax(-2)
        index = actions[..., None, None].expand(*actions.shape, 1, logits.shape[-1])
        return logits.gather(-2, index).squeeze(-2)

    def next_prior(self, prior: Tensor, likelihood: Tensor) -> Tensor:
        """Log prior [.., G] of the episode after one that began with log `prior` and had the log-`likelihood`: HOP's
        p <- alpha p + (1 - alpha) onehot(goal of the episode), or with the posterior itself in place of the one-hot."""
        posterior, alpha = (prior + likelihood).softmax(-1), self.args.inter_om_alpha
        if self.args.inter_om == "count":
            posterior = F.one_hot(posterior.argmax(-1), posterior.shape[-1])
        mixed = alpha * prior.softmax(-1) + (1.0 - alpha) * posterior
        return torch.log((1.0 - LEAST) * mixed + LEAST / prior.shape[-1])

    def log_belief(self, memory: Memory) -> Tensor:
        """float32 [B, N, G]: log of the belief over the goal of every seat, the same for all observers."""
        if self.args.belief == "encoder":
            return self.guess(memory.match).log_softmax(-1)
        belief = (memory.prior + memory.likelihood).log_softmax(-1)
        return belief if self.args.belief == "bayes" else torch.full_like(belief, -math.log(self.args.goals))

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


def straight_through(logits: Tensor, temperature: float, generator: Generator) -> Tensor:
    """One-hot draws [.., G] from softmax(`logits`) with the gradient of softmax((logits + Gumbel noise) / temperature)
    (Jang et al. 2017)."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(min=1e-20, max=1.0 - 1e-7)
    soft = ((logits - (-uniform.log()).log()) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1])
    return hard + soft - soft.detach()


# method: discrete goals, one for a seat and match
def moa_loss(moa: MOA, batch, subgoal_coef, temperature: float, generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss -log pi_hat + KL(q(g) || uniform) + subgoal_coef * reconstruction over a random share of the steps of a
    MatchBatch. The first two are in nats a step (the KL once for a seat's match), so that they are a bound on the
    marginal likelihood of these steps, each to the power of its weight (1 with `--moa-buffer all`), and equal to it if
    q is the posterior, as in `--goal-training em`; then the gradient is that of expectation-maximisation. Returns the
    terms, too; `moa/kl` in nats a match: 0 means that goals have collapsed."""
    live = batch.active.any(2)  # [S, L]
    live &= torch.rand(live.shape, generator=generator, device=live.device) < moa.args.moa_share
    state, steps = batch.state.rows(live.flatten()), (batch.actions, batch.active, batch.weight, batch.subgoal)
    actions, active, weight, subgoal = (x[live] for x in steps)  # [R, N] here and below: steps of all seats
    (own, others), match, terms = moa.relative(state), live.nonzero()[:, 0], {}  # [R, N, ..], [R]
    log_probs = moa.log_likelihood(own, others, moa.relative.game.action_mask(state), actions) * weight.unsqueeze(-1)
    logits = log_probs.new_zeros(len(live), *log_probs.shape[1:]).index_add(0, match, log_probs)  # [S, N, G]
    past, guess = guesses(moa, batch) if moa.encodes else (None, None)
    logits = guess if moa.args.goal_training == "amortised" else logits
    q, whole = logits.softmax(-1), weight.sum().clamp(min=1e-9)
    drawn = q if moa.args.goal_training == "em" else straight_through(logits, temperature, generator)
    known = ((batch.weight > 0) & live.unsqueeze(2)).any(1)  # [S, N]
    kl = ((q * (logits.log_softmax(-1) + math.log(moa.args.goals))).sum(-1) * known).sum()
    terms["moa/nll"] = -(drawn[match] * log_probs).sum(-1).sum() / whole
    items = state.items.unsqueeze(1).expand(-1, active.shape[1], -1)
    subgoals = (x[::4] for x in (state.players, items, own, others, drawn[match] @ moa.table))  # [::4]: for speed
    recon = F.cross_entropy(moa.subgoal_logits(*subgoals).movedim(-1, 1), subgoal[::4], reduction="none")
    terms["moa/recon"] = (weight[::4] * recon).sum() / weight[::4].sum().clamp(min=1e-9)
    loss, terms["moa/kl"] = kl / whole, kl / known.sum().clamp(min=1)
    loss = loss + terms["moa/nll"] + subgoal_coef * terms["moa/recon"]
    if moa.encodes:  # the guess at every step, from what came before it, is to agree with what was drawn
        terms["moa/guess"] = -(weight * (drawn.detach()[match] * past[live].log_softmax(-1)).sum(-1)).sum() / whole
        loss = loss + terms["moa/guess"]
    return loss, {name: term.detach() for name, term in terms.items()}


def guesses(moa: MOA, batch) -> tuple[Tensor, Tensor]:
    """The encoder's logits [S, L, N, G] before each step of a MatchBatch, and [S, N, G] at the end of every match."""
    seen, shape = moa.seen(*moa.relative(batch.state)), batch.start.shape
    step = moa.features(seen, batch.actions.flatten(0, 1), batch.active.flatten(0, 1)).unflatten(0, shape)
    after = step.cumsum(1)  # [S, L, N, E + 1]
    return moa.guess(after - step), moa.guess(after[:, -1])


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# ---------------------------------------------------------------------------------------------------------------------
# method: there is no planner; a goal of its own
class Decision(NamedTuple):
    """What the policy of every seat saw and did in one step of B games."""

    action: Tensor  # int64 [B, N]
    log_prob: Tensor  # float32 [B, N] of the action, under the policy that acted
    value: Tensor  # float32 [B, N] of returns times reward_scale
    own: Tensor  # float32 [B, N, X]
    others: Tensor  # float32 [B, N, N-1, Y]
    goal: Tensor  # float32 [B, N, Z] inferred of every seat
    mask: Tensor  # bool [B, N, A]
    # method: there is no offset
    prior: Tensor  # float32 [B, N, A] log pi_theta
    chosen: Tensor  # float32 [B, N, G] own goal, one-hot (no last entries without --own-goal)
    draws: Tensor  # bool [B, N] the own goal is drawn in this step


def uniform_numbers(key: Tensor, count: int) -> Tensor:
    """float32 [.., count] in (0, 1): random numbers of the counters int64 [.., 1] `key` (SplitMix64, Steele et al.
    2014)."""
    bits = key * count + torch.arange(1, count + 1, device=key.device)  # int64 wraps around
    bits = bits * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((bits >> 40) & 0xFFFFFF).float().add(0.5) / (1 << 24)


# method: what is believed and assigned
PLAYED = ("belief", "assignment")  # options that may change when an agent is played


# method: beliefs, their assignment and the own goal in place of a planner
class Agent(nn.Module):
    """The learned player: policy, value, MOA and its beliefs, for every seat of B games at once."""

    # method: no planner; sizes of goals; the chooser
    def __init__(self, game: GridGame, args: Args):
        super().__init__()
        self.game, self.args, self.relative = game, args, RelativeFeatures(game)
        own, hidden, actions = self.relative.own_size, args.hidden_size, game.num_actions
        self.moa = MOA(self.relative, args)
        goal, self.told = self.moa.goal_size, self.moa.goal_size - args.own_goal * args.goal_size
        other = self.relative.other_size + self.told
        self.actor = RelativeNetwork(own, other, goal, actions, hidden, 0.01)
        self.critic = RelativeNetwork(own, other, goal, 1, hidden, 1.0)
        if args.own_goal:  # with the actor, since it is a part of the policy
            self.actor.chooser = RelativeNetwork(own, other, goal, args.goals, hidden, 0.01)
        if args.own_goal and args.goal != "inferred":
            raise UsageError("--own-goal needs --goal inferred: it is a row of the same table")
        self.plan_mode, self.timer = "none", Timer(False)  # no planner, ever
        self.latest = (None, None)  # a state and its features: `act` and `remember` read the same one
        self.latest_step = (None, None, None)  # state, actions, likelihoods: a truncated step is remembered twice
        self.to(game.device)
        self.assign(self.moa.initial_memory(1).prior)  # raises if players cannot share out the goals

    # method: no planner reads it
    @property
    def uses_moa(self) -> bool:
        """Whether anything reads the MOA."""
        return self.args.goal == "inferred"

    # method: more players may be too many to share out the goals
    def on_game(self, env_id: str) -> GridGame:
        """Turns to another game of the same family: no network depends on sizes or counts. Raises UsageError."""
        game = GridGame(env_id, self.game.device)
        if game.family != self.game.family:
            raise UsageError(f"the checkpoint was trained on {self.game.id}; it cannot play {game.id}")
        self.game, self.relative = game, RelativeFeatures(game)
        self.moa.relative = self.relative
        self.assign(self.moa.initial_memory(1).prior)  # raises if players cannot share out the goals
        return game

    def look(self, state: GameState) -> tuple[Tensor, Tensor]:
        """`relative(state)`, once for one state in succession."""
        if self.latest[0] is not state:
            self.latest = state, self.relative(state)
        return self.latest[1]

    # method: Bayes' rule, the count of episodes, the own goal
    @torch.no_grad()
    def remember(self, memory: Memory, state: GameState, actions: Tensor, ended: Tensor, match_ended: Tensor) -> Memory:
        """The memory after `actions` [B, N] in `state`; what ended (bool [B]) is passed on from episode to episode, and
        emptied from match to match."""
        if self.args.goal != "inferred" or self.args.belief == "none" and not self.args.own_goal:
            return memory
        (own, others), active = self.look(state), state.players >= 0
        if self.args.own_goal:
            chosen = self.infer_all(memory, own, others, None)[2]
            keep = ~ended & ((state.time + 1) % self.args.goal_period > 0)
            memory = memory._replace(own=chosen * keep.view(-1, 1, 1), key=memory.key + actions.numel())
        if self.args.belief == "bayes":
            if self.latest_step[0] is not state or self.latest_step[1] is not actions:
                step = self.moa.log_likelihood(own, others, self.game.action_mask(state), actions)
                self.latest_step = state, actions, step * active.unsqueeze(-1)
            memory = memory._replace(likelihood=memory.likelihood + self.latest_step[2])
        if self.moa.encodes:
            step = self.moa.features(self.moa.seen(own, others), actions, active)
            memory = memory._replace(match=memory.match + step)
        if not ended.any():
            return memory
        clear, over = ended.view(-1, 1, 1), match_ended.view(-1, 1, 1)
        prior = torch.where(clear, self.moa.next_prior(memory.prior, memory.likelihood), memory.prior)
        prior, likelihood = prior.masked_fill(over, -math.log(self.args.goals)), memory.likelihood.masked_fill(clear, 0)
        return memory._replace(prior=prior, likelihood=likelihood, match=memory.match.masked_fill(over, 0.0))

    def assign(self, log_belief: Tensor) -> Tensor:
        """float32 [B, N, G]: shares of the goals that every seat is taken to have. `soft`: the belief; `hard`: the
        likeliest goal; `exclusive`: the one-to-one assignment of the largest joint probability, the mean of all the
        best ones if there are several, so that no seat comes first."""
        if self.args.assignment == "soft":
            return log_belief.exp()
        if self.args.assignment == "hard":
            return F.one_hot(log_belief.argmax(-1), log_belief.shape[-1]).float()
        players, goals = log_belief.shape[1:]
        if goals < players or math.perm(goals, players) > 50_000:
            raise UsageError(f"--assignment exclusive: {players} players cannot share out --goals {goals}")
        orders = torch.tensor(list(itertools.permutations(range(goals), players)), device=log_belief.device)  # [P, N]
        scores = log_belief[:, torch.arange(players), orders].sum(-1)  # [B, P]
        best = (scores >= scores.amax(1, keepdim=True) - 1e-5).float()
        return torch.einsum("bp,png->bng", best / best.sum(1, keepdim=True), F.one_hot(orders, goals).float())

    # method: beliefs and their assignment
    def infer(self, memory: Memory, own: Tensor, others: Tensor, oracle: Tensor | None) -> tuple[Tensor, Tensor]:
        """The embeddings [B, N, Z] of the goals assigned to every seat, and the log of the belief [B, N, G]; or zeros,
        or the truth `oracle`, as of certain knowledge. With `--own-goal` the embedding of what a seat pursues itself
        is joined to its goal: `with_goals` shows it to that seat alone."""
        return self.infer_all(memory, own, others, oracle)[:2]

    @torch.no_grad()
    def infer_all(self, memory, own, others, oracle) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]:
        """The same; own goals [B, N, G], one-hot; bool [B, N]: drawn in this step; their log-probabilities there."""
        never = torch.zeros(own.shape[:2], dtype=torch.bool, device=own.device)
        if self.args.goal != "inferred":
            goal = own.new_zeros(*own.shape[:2], self.told) if oracle is None else oracle
            return goal, torch.full_like(goal, -30.0), memory.own, never, 0.0
        log_belief, table = self.moa.log_belief(memory), self.moa.table
        goal = self.assign(log_belief) @ table
        if not self.args.own_goal:
            return goal, log_belief, memory.own, never, 0.0
        joined, total = self.with_goals(others, torch.cat([goal, memory.own @ table], -1))
        log_probs, draws = self.actor.chooser(own, joined, total).log_softmax(-1), ~memory.own.any(-1)
        noise = -(-uniform_numbers(memory.key, self.args.goals).log()).log()
        drawn = F.one_hot((log_probs + noise).argmax(-1), self.args.goals).float()
        chosen = torch.where(draws.unsqueeze(-1), drawn, memory.own)
        return torch.cat([goal, chosen @ table], -1), log_belief, chosen, draws, draws * (log_probs * chosen).sum(-1)

    # method: the own goal
    def with_goals(self, others: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Co-players' features with their goals [.., N, N-1, Y + Z], and the goals' sum over co-players [.., N, Z],
        beside the own goal if there is one."""
        theirs = goal[..., self.relative.others, : self.told]
        return torch.cat([others, theirs], -1), torch.cat([theirs.sum(-2), goal[..., self.told :]], -1)

    # method: the own goal
    @torch.no_grad()
    def value(self, state: GameState, memory: Memory, oracle: Tensor | None) -> Tensor:
        """V [B, N] of every seat."""
        own, others = self.relative(state)
        goal, _, _, draws, _ = self.infer_all(memory, own, others, oracle)
        joined, total = self.with_goals(others, goal)
        return self.critic(own, joined, undrawn(total, draws, self.told)).squeeze(-1)

    # method: no planner; the own goal
    @torch.no_grad()
    def act(self, state: GameState, mask, memory: Memory, seats, generator, oracle: Tensor | None) -> Decision:
        """A Decision for every seat of `state` (`seats`, those where it matters, save nothing here). bool `mask`
        [B, N, A] has the legal actions; `memory` is this agent's; `oracle` [B, N, Z] is for `--goal oracle`."""
        with self.timer("goal inference"):
            own, others = self.look(state)
            goal, _, chosen, draws, log_choice = self.infer_all(memory, own, others, oracle)
        with self.timer("policy and value"):
            joined, total = self.with_goals(others, goal)
            prior = masked(self.actor(own, joined, total), mask).log_softmax(-1)
            value = self.critic(own, joined, undrawn(total, draws, self.told)).squeeze(-1)
        action = sample(prior, generator)
        log_prob = prior.gather(-1, action.unsqueeze(-1)).squeeze(-1) + log_choice
        return Decision(action, log_prob, value, own, others, goal, mask, prior, chosen, draws)

    # method: from the belief
    def sample_goals(self, goal: Tensor, log_belief: Tensor, samples: int, generator: Generator) -> Tensor:
        """float32 [B, N, K, Z]: embeddings of K goals of every seat, drawn from its belief; of its own, the one that
        it pursues. Where nothing is inferred, `goal` itself."""
        goal = goal.unsqueeze(2).expand(-1, -1, samples, -1)
        if self.args.goal != "inferred":
            return goal
        drawn = sample(log_belief.unsqueeze(2).expand(-1, -1, samples, -1), generator)
        return torch.cat([self.moa.table[drawn], goal[..., self.told :]], -1)


def undrawn(total: Tensor, draws: Tensor, told: int) -> Tensor:
    """`total` [.., Z] with zeros for the own goal (from entry `told` on) where bool `draws` [..]: there V is the
    baseline of the choice as well, and must not know it."""
    return torch.cat([total[..., :told], total[..., told:] * ~draws.unsqueeze(-1)], -1)


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


# method: rebuilds beliefs
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

    # method: Bayes over the episodes; own goals stay as they are in `present`
    @torch.no_grad()
    def memory(self, moa: MOA, episode: Tensor, present: Memory) -> Memory:
        """The memory of the B running matches, in their `episode` [B], under the present parameters of `moa`."""
        parts = []
        for rows in torch.arange(self.batch, device=self.game.device).split(64):  # all at once can take gigabytes
            batch, memory = self.batch_of(rows, moa.relative), Memory(*(field[rows] for field in present))
            live, now = batch.active.any(2), self.data["episode"][rows, : batch.active.shape[1]].long()
            state, active = batch.state.rows(live.flatten()), batch.active[live].unsqueeze(-1)
            (own, others), actions = moa.relative(state), batch.actions[live]  # [R, N, ..]
            games, count = torch.arange(len(rows), device=now.device), self.episodes
            game = games.unsqueeze(1).expand_as(now)[live]
            if moa.args.belief == "bayes":
                steps = moa.log_likelihood(own, others, self.game.action_mask(state), actions) * active
                total = steps.new_zeros(len(rows) * count, *steps.shape[1:])
                total = total.index_add(0, game * count + now[live], steps).unflatten(0, (len(rows), count))
                prior = torch.full_like(memory.prior, -math.log(moa.args.goals))
                for k in range(count - 1):
                    ended = (episode[rows] > k).view(-1, 1, 1)
                    prior = torch.where(ended, moa.next_prior(prior, total[:, k]), prior)
                memory = memory._replace(prior=prior, likelihood=total[games, episode[rows]])
            if moa.encodes:
                steps = moa.features(moa.seen(own, others), actions, active.squeeze(-1))
                memory = memory._replace(match=torch.zeros_like(memory.match).index_add(0, game, steps))
            parts.append(memory)
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


# method: no planner, but the own goal, if one was drawn, is part of what was done; or plain policy gradient
def ppo_loss(actor, critic, rows, args: Args, ent_coef: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a minibatch of R rows, and its terms [R]. Clipped PPO on the joint log-probability of the action and of
    the own goal where one was drawn; with `--pg` -A log pi instead."""
    own, others, goal, mask, value_goal = (rows[name] for name in ("own", "others", "goal", "mask", "goal"))
    log_policy = masked(actor(own, others, goal), mask).log_softmax(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    log_prob = log_policy.gather(1, rows["action"].unsqueeze(1)).squeeze(1)
    if args.own_goal:
        value_goal = undrawn(goal, rows["draws"], goal.shape[1] - args.goal_size)
        choice = actor.chooser(own, others, value_goal).log_softmax(-1)
        log_prob = log_prob + rows["draws"] * (choice * rows["chosen"]).sum(-1)
        entropy = entropy - rows["draws"] * (choice.exp() * choice).sum(-1)
    terms = {"value": 0.5 * (critic(own, others, value_goal).squeeze(-1) - rows["return"]).square(), "entropy": entropy}
    log_ratio = log_prob - rows["log_prob"]
    ratio, advantage = log_ratio.exp(), rows["advantage"]
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    terms["policy"] = -advantage * log_prob if args.pg else -torch.minimum(advantage * ratio, advantage * clipped)
    terms |= {"approx_kl": ratio - 1.0 - log_ratio, "clip_fraction": ((ratio - 1.0).abs() > args.clip_coef).float()}
    loss = terms["policy"].mean() + args.vf_coef * terms["value"].mean()
    return loss - ent_coef * entropy.mean(), {name: term.detach() for name, term in terms.items()}


def minibatches(rows: dict[str, Tensor], epochs: int, parts: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
    """`epochs` passes over `rows` [R, ..], each in `parts` random parts."""
    some = next(iter(rows.values()))
    for _ in range(epochs):
        order = torch.randperm(len(some), generator=generator, device=some.device)
        for index in filter(len, order.tensor_split(parts)):
            yield {name: value.index_select(0, index) for name, value in rows.items()}


# method: there are no surprising transitions
KEPT = {  # attributes in a checkpoint besides weights, games and matches
    "trainer": ["returns", "global_step", "iteration", "pretrained"],
    "co_players": ["seat", "kind", "target", "episode"],
    "buffer": ["stored", "kept", "offered"],
}
FREE = """total_timesteps checkpoint_every capture_video save_model profile resume track compile wandb_project_name
    wandb_entity exp_name evaluate eval_episodes""".split()  # options that a resumed run may change


# method: no planner; the MOA is trained every few iterations
class Trainer:
    """All that changes in a run: agent, optimisers, games, co-players, memories, buffer, generator, counters."""

    # method: no transition network
    def __init__(self, args: Args):
        if not args.moa_share:
            raise UsageError("--moa-share must be positive")
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
        hot = [(self, "ppo_loss")]
        for owner, name in [*hot, *((game, name) for name in ("step", "hits", "action_mask"))] if args.compile else []:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))

    # method: the beliefs are computed anew only after the MOA was trained
    def rollout(self) -> dict[str, Tensor]:
        """Plays `--num-steps` steps of every game, ended ones anew; fields of Decision and more, [T, B, N, ..]."""
        args, game, agent, timer, co_players = self.args, self.game, self.agent, self.agent.timer, self.co_players
        steps: list[dict[str, Tensor]] = []
        if args.goal == "inferred" and not args.freeze_moa and self.iteration % args.moa_every == 0:
            with timer("memory"):
                self.memory = self.buffer.memory(agent.moa, co_players.episode, self.memory)
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
                    if match_ended.any():
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

    # method: no planner; the MOA is trained every few iterations
    def iterate(self) -> dict[str, Tensor]:
        """One iteration, rollout and updates; returns metrics."""
        args, agent, timer = self.args, self.agent, self.agent.timer
        done = self.global_step / args.total_timesteps
        rate = args.learning_rate * (1.0 - done if args.anneal else 1.0)
        ent_coef = args.ent_coef * (max(1.0 - done, args.ent_floor) if args.anneal else 1.0)
        self.optimizers["policy"].param_groups[0]["lr"] = rate
        self.optimizers["moa"].param_groups[0]["lr"] = args.moa_learning_rate * rate / args.learning_rate
        metrics = {"charts/learning_rate": torch.tensor(rate)}
        with timer("rollout"):
            rows = self.rollout()
        with timer("update"):
            if agent.uses_moa:
                metrics |= self.buffer.statistics(self.global_step + self.pretrained)
                metrics |= self.goal_statistics()
                with timer("MOA"):
                    trains = not args.freeze_moa and (self.iteration + 1) % args.moa_every == 0
                    metrics |= self.update_moa(args.temperature * (1.0 - 0.9 * done * args.anneal)) if trains else {}
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

    # method: no planner to imitate or to calibrate
    def update_policy(self, rows: dict[str, Tensor], ent_coef: float) -> dict[str, Tensor]:
        """PPO on the learner's rows in a rollout; means over minibatches, and by seat."""
        args, agent, n = self.args, self.agent, self.game.num_players
        steps = (rows[name] for name in ("reward", "value", "next_value", "goes_on"))
        rows["advantage"] = generalised_advantages(*steps, args.gamma, args.gae_lambda)
        rows["return"] = rows["advantage"] + rows["value"]
        rows["seat"] = torch.arange(n, device=self.device).expand(rows["value"].shape)
        if not rows["learner"].any():
            return {}
        unused = ("learner", "active", "goes_on", "final_value", "next_value", "other_actions", "reward")
        rows = {name: value[rows["learner"]] for name, value in rows.items() if name not in unused}  # [R, ..]
        residual, spread = rows["advantage"].var(correction=0), rows["return"].var(correction=0).clamp(min=1e-9)
        metrics = {"losses/explained_variance": 1.0 - residual / spread}
        sums: dict[str, Tensor | float] = collections.defaultdict(float)  # [2, N]: sums and counts by seat
        for part in minibatches(rows, args.update_epochs, args.num_minibatches, self.generator):
            loss, terms = self.ppo_loss(agent.actor, agent.critic, part, args, torch.tensor(ent_coef))
            terms["grad_norm"] = self.descend("policy", loss, args.max_grad_norm).expand(len(part["seat"]))
            seats = F.one_hot(part["seat"], n).float()
            for name, term in terms.items():
                sums[name] = sums[name] + torch.stack([term @ seats, seats.sum(0)])
        metrics |= {f"losses/{name}": total[0].sum() / total[1].sum() for name, total in sums.items()}
        by_seat = {name: sums[name][0] / sums[name][1].clamp(min=1) for name in ("policy", "value")}  # [N] each
        return metrics | {f"losses/{name}_seat_{i}": mean[i] for name, mean in by_seat.items() for i in range(n)}

    # method: the loss's arguments
    def update_moa(self, temperature: float) -> dict[str, Tensor]:
        """`--moa-updates` minibatches of matches from the buffer; returns means over them."""
        args, moa, sums = self.args, self.agent.moa, collections.Counter()
        for _ in range(args.moa_updates if len(self.buffer) else 0):
            batch = self.buffer.sample(args.moa_matches, self.agent.relative, args.goal == "oracle", self.generator)
            loss, terms = moa_loss(moa, batch, args.subgoal_coef, temperature, self.generator)
            self.descend("moa", loss, 1.0)
            sums.update(terms)
        return {name: total / args.moa_updates for name, total in sums.items()}

    @torch.no_grad()
    def goal_statistics(self) -> dict[str, Tensor]:
        """What the beliefs of the running matches know after their first episodes, in nats: entropy of the goals in
        use by all seats; mutual information with scripted players' kind, with the kind of item that they walk to, and
        with the seat (which should be none)."""
        players, belief = self.co_players, self.agent.moa.log_belief(self.memory).exp()
        later = (players.episode > 0).unsqueeze(1).expand_as(players.kind)  # [B, N]
        known = later & (players.script[players.kind] >= 0)
        wanted = F.pad(self.game.item_kind, (0, 1), value=-1)[players.target] + 1
        seats = torch.arange(self.game.num_players, device=self.device).expand_as(known)
        use = belief[later].mean(0)
        result = {"moa/usage_entropy": -(use * use.clamp(min=1e-20).log()).sum()} if later.any() else {}
        for name, labels in {"kind": players.kind, "target": wanted, "seat": seats}.items() if known.any() else ():
            joint = F.one_hot(labels[known], int(labels.max()) + 1).float().T @ belief[known]  # [labels, G]
            joint = joint / joint.sum()
            parts = [-(p * p.clamp(min=1e-20).log()).sum() for p in (joint, joint.sum(0), joint.sum(1))]
            result[f"moa/{name}_information"] = parts[1] + parts[2] - parts[0]
        return result

    # method: there is no VAE
    def pretrain(self, stop: list) -> None:
        """Plays `--pretrain-moa-steps` game steps with the first policy, and trains the MOA on them; ends early
        when `stop` is no longer empty."""
        while self.agent.uses_moa and self.pretrained < self.args.pretrain_moa_steps and not stop:
            self.rollout()
            self.update_moa(self.args.temperature)
            self.memory = self.buffer.memory(self.agent.moa, self.co_players.episode, self.memory)
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


# method: no planner turns
def load_agent(path: str | Path, device="cpu", options: dict | None = None, env_id: str | None = None) -> Agent:
    """The agent of a checkpoint, ready to play `env_id` (default: the game trained on), with `options` (of PLAYED, by
    name) in place of the checkpoint's; that of another script plays by that script. Raises UsageError."""
    content, options = load_checkpoint(path, device), options or {}
    if content["script"] != SCRIPT:
        with refused(f"cannot import {content['script']}, whose checkpoint {path} is"):
            return importlib.import_module(content["script"]).load_agent(path, device, options, env_id)
    if set(options) - set(PLAYED):
        raise UsageError(f"options that may change when an agent is played: {', '.join(PLAYED)}")
    with refused(f"checkpoint {path} does not fit this version"):
        args = Args(**{**content["args"], "cuda": False})  # `device` may be another one
        agent = Agent(GridGame(content["game"], device), args)
        agent.load_state_dict(content["agent"])
        agent.plan_mode = content["plan_mode"]
    agent.args = agent.moa.args = resolved(dataclasses.replace(args, **options))
    if agent.args.belief == "encoder" and not agent.moa.encodes:
        raise UsageError(f"--belief encoder: {path} was trained without an encoder")
    agent.on_game(env_id or agent.game.id)
    agent.eval()
    return agent


def played(content: dict) -> dict:
    """The values of the options PLAYED with which a checkpoint's `content` is played."""
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

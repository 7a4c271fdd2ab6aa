"""Co-players of the grid games that no script has, to be met by who has never met them.

    python hop_onestep.py --evaluate runs/NAME --co-players benchmarks.strangers:Waiting

`DEVELOPMENT` served choices, `HELD_OUT` none; tables have both, apart.

On the stag hunt `Waiting` stays for eight steps, then takes the nearest item of any kind; `Turns`
hunts stags in one episode, hares in the next; `Follower` walks to the nearest player, and takes
what it stands on. Held out: `Nearest` takes the nearest item of any kind; `Shy` hunts the hare that
is farthest from the other players; `Late` hunts stags for fifteen steps, then hares.

On the snowdrift `Lazy` removes drifts that are at most two steps away, and else stays; `Shifts`
removes drifts in one episode, and none in the next; `Halves` those of the left half of the board.
Held out: `Tired` removes drifts for the first fifteen steps of an episode; `Fair` as long as it has
removed no more than half of what is gone; `Waverer` stays in every second step.
"""

from operator import attrgetter

import torch
from torch import Tensor, where

STAY = 4
MOVES = 5  # UP, DOWN, LEFT, RIGHT, STAY; actions that take items follow


class Stranger:
    """Goes to the cheapest of the cells that it wants, and takes what lies there: a callable as
    `--co-players` wants it. `wants` and `cost` are functions of what it has seen, its attributes,
    that tell bool and float [R, S] by cell. In each of R rows:

    - by cell [R, S]: `players` (the others), `items`, the `first` and `second` kind of items;
      `distance` from the own cell, and that of the nearest other player, `alone`;
    - [R, 1]: steps `done` in the episode, the `episode` in the match, items that are `left` in it,
      `most` at its start, and how often the row has `taken` one;
    - distances between cells `apart` [S, S], and their `column` [S]."""

    def __init__(self, wants, cost=attrgetter("distance")):
        self.wants = wants
        self.cost = cost
        self.episode = -1
        self.taken = self.most = 0

    def start_match(self, which: Tensor) -> None:
        """Takes bool [R]: rows whose match starts."""
        self.episode = where(which[:, None], -1, self.episode)

    def __call__(self, observation, action_mask, clock, generator):
        """Actions int64 [R] for observations [R, C, H, W] of own cell, other players, kinds of
        items, bool `action_mask` [R, A] and `clock` [R, 2] (steps done, left)."""
        height, width = observation.shape[2:]
        kinds = action_mask.shape[1] - MOVES
        planes = observation.flatten(2) > 0.5  # [R, C, S]
        items = planes[:, -kinds:]
        self.players = planes[:, 1:-kinds].any(1)
        self.items = items.any(1)
        self.first = items[:, 0]
        self.second = items[:, -1]
        self.left = self.items.sum(1, True)
        self.done = clock[:, :1]
        self.episode = self.episode + (self.done == 0)
        self.taken = where(self.done == 0, 0, self.taken)
        self.most = where(self.done == 0, self.left, self.most)
        cell = torch.arange(height * width, device=clock.device)
        self.column = cell % width
        self.apart = (cell // width - cell[:, None] // width).abs()
        self.apart += (self.column - self.column[:, None]).abs()
        own = planes[:, 0].int().argmax(1)
        self.distance = self.apart[own]
        self.alone = where(self.players[:, None], self.apart, 99).amin(2)
        costs = where(self.wants(self), self.cost(self).float(), torch.inf)
        costs = costs + 0.5 * torch.rand(costs.shape, generator=generator, device=costs.device)
        least, target = costs.min(1)
        moves = torch.tensor([-width, width, -1, 1, 0], device=clock.device)
        after = (own[:, None] + moves).clamp(0, len(cell) - 1)  # an illegal move leads anywhere
        reach = self.apart[after, target[:, None]]  # [R, 5]
        closer = action_mask[:, :MOVES] & (reach < reach[:, STAY:])
        noise = torch.rand(closer.shape, generator=generator, device=costs.device)
        action = where(closer, noise, -1.0).argmax(1)
        action = where(closer.any(1) & least.isfinite(), action, STAY)
        takes = action_mask[:, MOVES:]
        taking = (target == own) & takes.any(1) & least.isfinite()
        self.taken = self.taken + taking[:, None]
        return where(taking, MOVES + takes.int().argmax(1), action)


Waiting = Stranger(lambda seen: seen.items & (seen.done >= 8))
Turns = Stranger(lambda seen: where(seen.episode % 2 == 0, seen.first, seen.second))
Follower = Stranger(lambda seen: seen.players)
Nearest = Stranger(lambda seen: seen.items)
Shy = Stranger(lambda seen: seen.second, lambda seen: 100 - seen.alone)
Late = Stranger(lambda seen: where(seen.done < 15, seen.first, seen.second))
Lazy = Stranger(lambda seen: seen.items & (seen.distance <= 2))
Shifts = Stranger(lambda seen: seen.items & (seen.episode % 2 == 0))
Halves = Stranger(lambda seen: seen.items & (2 * seen.column <= seen.column.max()))
Tired = Stranger(lambda seen: seen.items & (seen.done < 15))
Fair = Stranger(lambda seen: seen.items & (2 * seen.taken <= seen.most - seen.left))
Waverer = Stranger(lambda seen: seen.items & (seen.done % 2 == 0))
DEVELOPMENT = {"msh": "Waiting Turns Follower".split(), "msg": "Lazy Shifts Halves".split()}
HELD_OUT = {"msh": "Nearest Shy Late".split(), "msg": "Tired Fair Waverer".split()}

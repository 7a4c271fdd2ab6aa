"""Co-players of the grid games that no script has, to be met by who has never met them.

    python hop_onestep.py --evaluate runs/NAME --co-players benchmarks.strangers:Waiting

`DEVELOPMENT` served choices, `HELD_OUT` none; tables have both, apart. On the stag hunt:

- `Waiting` stays for eight steps, then takes the nearest item of any kind.
- `Turns` hunts stags in one episode, hares in the next.
- `Follower` walks to the nearest player, and takes what it stands on.
- `Nearest` (held out) takes the nearest item of any kind.
- `Shy` (held out) hunts the hare that is farthest from the other players.
- `Late` (held out) hunts stags for fifteen steps, then hares.

On the snowdrift:

- `Lazy` removes drifts that are at most two steps away, and else stays.
- `Shifts` removes drifts in one episode, and none in the next.
- `Halves` removes drifts of the left half of the board.
- `Tired` (held out) removes drifts for the first fifteen steps of an episode.
- `Fair` (held out) removes drifts as long as it has removed no more than half of what is gone.
- `Waverer` (held out) removes drifts, but stays in every second step.
"""

import torch
from torch import Generator, Tensor

STAY = 4
MOVES = 5  # UP, DOWN, LEFT, RIGHT, STAY; actions that take items follow
FAR = 10**6


class Stranger:
    """Walks to the cheapest target and takes it. A callable as `--co-players` wants it; `costs`
    says what each cell is worth going to."""

    def __init__(self):
        self.episode = None  # int64 [R, 1] number within the match
        self.taken = None  # int64 [R, 1] items that the row has tried to take in this episode

    def start_match(self, which: Tensor) -> None:
        """Takes bool [R]: rows whose match starts."""
        which = which[:, None]
        if self.episode is None:
            self.episode = self.taken = torch.zeros_like(which).long()
        self.episode = torch.where(which, -1, self.episode)

    def costs(self, seen: dict[str, Tensor], distance: Tensor, done: Tensor) -> Tensor:
        """float [R, S] by cell: FAR where nothing is to be gone to, else what the least of decides.
        `seen` [R, S] by name, bool: `players` (the others), `first` and `second` kind of items,
        `items`; `distance` [R, S] from the own cell; `done` [R, 1] steps of the episode. There are
        also `self.apart` [S, S], distances between cells, and `self.column` [S]."""
        raise NotImplementedError

    def __call__(
        self, observation: Tensor, action_mask: Tensor, clock: Tensor, generator: Generator
    ):
        """Actions int64 [R] for observations [R, C, H, W] of own cell, other players, kinds of
        items, bool `action_mask` [R, A] and `clock` [R, 2] (steps done, left)."""
        rows, _, height, width = observation.shape
        kinds = action_mask.shape[1] - MOVES
        done = clock[:, :1]
        if self.episode is None:
            self.start_match(torch.ones(rows, dtype=torch.bool, device=observation.device))
        self.episode = self.episode + (done == 0)
        self.taken = self.taken.masked_fill(done == 0, 0)
        planes = observation.flatten(2) > 0.5  # [R, C, S]
        items = planes[:, -kinds:]
        seen = {"players": planes[:, 1:-kinds].any(1), "items": items.any(1)}
        seen |= {"first": items[:, 0], "second": items[:, -1]}
        cell = torch.arange(height * width, device=clock.device)
        self.column = cell % width
        self.apart = (cell // width - cell[:, None] // width).abs()
        self.apart += (self.column - self.column[:, None]).abs()  # [S, S]
        own = planes[:, 0].int().argmax(1)
        costs = self.costs(seen, self.apart[own], done).float()
        costs = costs + 0.5 * torch.rand(costs.shape, generator=generator, device=costs.device)
        least, target = costs.min(1)
        moves = torch.tensor([-width, width, -1, 1, 0], device=clock.device)
        after = (own[:, None] + moves).clamp(0, len(cell) - 1)  # an illegal move leads anywhere
        reach = self.apart[after, target[:, None]]  # [R, 5]
        closer = action_mask[:, :MOVES] & (reach < reach[:, STAY:])
        noise = torch.rand(closer.shape, generator=generator, device=costs.device)
        action = torch.where(closer, noise, -1.0).argmax(1)
        action = torch.where(closer.any(1) & (least < FAR), action, STAY)
        takes = action_mask[:, MOVES:]
        taking = (target == own) & takes.any(1) & (least < FAR)
        self.taken = self.taken + taking[:, None]
        return torch.where(taking, MOVES + takes.int().argmax(1), action)


def wanted(plane: Tensor, cost: Tensor) -> Tensor:
    """`cost` [R, S] where bool `plane` has something, else FAR."""
    return torch.where(plane, cost.float(), float(FAR))


class Waiting(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"] & (done >= 8), distance)


class Turns(Stranger):
    def costs(self, seen, distance, done):
        even = self.episode % 2 == 0
        return wanted(torch.where(even, seen["first"], seen["second"]), distance)


class Follower(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["players"], distance)


class Nearest(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"], distance)


class Shy(Stranger):
    def costs(self, seen, distance, done):
        players = seen["players"][:, None]
        nearest = torch.where(players, self.apart.float(), 99.0).amin(2)
        return wanted(seen["second"], 100.0 - nearest)


class Late(Stranger):
    def costs(self, seen, distance, done):
        early = done < 15
        return wanted(torch.where(early, seen["first"], seen["second"]), distance)


class Lazy(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"] & (distance <= 2), distance)


class Shifts(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"] & (self.episode % 2 == 0), distance)


class Halves(Stranger):
    def costs(self, seen, distance, done):
        left = 2 * self.column <= self.column.max()
        return wanted(seen["items"] & left, distance)


class Tired(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"] & (done < 15), distance)


class Fair(Stranger):
    def __init__(self):
        super().__init__()
        self.most = 0  # items at the start of the episode

    def costs(self, seen, distance, done):
        left = seen["items"].sum(1, True)
        self.most = torch.where(done == 0, left, self.most)
        fair = 2 * self.taken <= self.most - left
        return wanted(seen["items"] & fair, distance)


class Waverer(Stranger):
    def costs(self, seen, distance, done):
        return wanted(seen["items"] & (done % 2 == 0), distance)


DEVELOPMENT = {"msh": (Waiting, Turns, Follower), "msg": (Lazy, Shifts, Halves)}
HELD_OUT = {"msh": (Nearest, Shy, Late), "msg": (Tired, Fair, Waverer)}

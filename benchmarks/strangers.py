"""Co-players of the grid games that no script has, to be met by who has never met them.

    python hop_onestep.py --evaluate runs/NAME --co-players benchmarks.strangers:Waiting

`DEVELOPMENT` serves choices; `HELD_OUT` serves none, and is what is reported. On the stag hunt:

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
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # UP, DOWN, LEFT, RIGHT, STAY
FAR = 10**6


class Stranger:
    """Walks to the cheapest target and takes it. A callable as `--co-players` wants it; `costs`
    says what each cell is worth going to."""

    def __init__(self):
        self.episode = None  # int64 [R] number within the match
        self.taken = None  # int64 [R] items that the row has tried to take in this episode

    def start_match(self, which: Tensor) -> None:
        """Takes bool [R]: rows whose match starts."""
        if self.episode is None:
            self.episode = which.long() - 1
            self.taken = torch.zeros_like(self.episode)
        self.episode = torch.where(which, -1, self.episode)

    def costs(self, planes: dict[str, Tensor], distance: Tensor, done: Tensor) -> Tensor:
        """float [R, H, W]: FAR where nothing is to be gone to, else what the least of decides.
        `planes` [R, H, W] by name, bool: `players` (the others), `first` and `second` kind of
        items, `items`; `distance` [R, H, W] from the own cell; `done` [R] steps of the episode."""
        raise NotImplementedError

    def __call__(
        self, observation: Tensor, action_mask: Tensor, clock: Tensor, generator: Generator
    ):
        """Actions int64 [R] for observations [R, C, H, W] of own cell, other players, kinds of
        items, bool `action_mask` [R, A] and `clock` [R, 2] (steps done, left)."""
        rows, _, height, width = observation.shape
        kinds = action_mask.shape[1] - len(MOVES)
        if self.episode is None:
            self.start_match(torch.ones(rows, dtype=torch.bool, device=observation.device))
        starts = clock[:, 0] == 0
        self.episode = self.episode + starts
        self.taken = self.taken.masked_fill(starts, 0)
        seen = observation > 0.5
        items = seen[:, -kinds:]
        planes = {"players": seen[:, 1:-kinds].any(1), "items": items.any(1)}
        planes |= {"first": items[:, 0], "second": items[:, -1]}
        cell = observation[:, 0].flatten(1).argmax(1)
        row = torch.arange(height, device=cell.device)[:, None]
        column = torch.arange(width, device=cell.device)
        own = torch.stack([cell // width, cell % width], 1)
        moves = torch.tensor(MOVES, device=cell.device)

        def distances(place):  # [.., 2] -> [.., H, W]
            place = place[..., None, None]
            return (row - place[..., 0, :, :]).abs() + (column - place[..., 1, :, :]).abs()

        costs = self.costs(planes, distances(own), clock[:, 0]).flatten(1).float()
        costs = costs + 0.5 * torch.rand(costs.shape, generator=generator, device=costs.device)
        least, target = costs.min(1)
        nowhere = least >= FAR
        reach = distances(own[:, None] + moves).flatten(2)  # [R, 5, H * W]
        reach = reach.take_along_dim(target[:, None, None], 2).squeeze(2)
        there = reach[:, STAY] == 0
        closer = action_mask[:, : len(MOVES)] & (reach < reach[:, STAY:])
        noise = torch.rand(closer.shape, generator=generator, device=costs.device)
        action = torch.where(closer, noise, -1.0).argmax(1)
        action = torch.where(closer.any(1) & ~nowhere, action, STAY)
        takes = action_mask[:, len(MOVES) :]
        taking = there & takes.any(1) & ~nowhere
        self.taken = self.taken + taking
        return torch.where(taking, len(MOVES) + takes.int().argmax(1), action)


def wanted(plane: Tensor, cost: Tensor) -> Tensor:
    """`cost` [R, H, W] where bool `plane` has something, else FAR."""
    return torch.where(plane, cost.float(), float(FAR))


class Waiting(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"] & (done >= 8)[:, None, None], distance)


class Turns(Stranger):
    def costs(self, planes, distance, done):
        even = (self.episode % 2 == 0)[:, None, None]
        return wanted(torch.where(even, planes["first"], planes["second"]), distance)


class Follower(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["players"], distance)


class Nearest(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"], distance)


class Shy(Stranger):
    def costs(self, planes, distance, done):
        height, width = distance.shape[1:]
        row = torch.arange(height, device=distance.device).repeat_interleave(width)
        column = torch.arange(width, device=distance.device).repeat(height)
        apart = (row[:, None] - row).abs() + (column[:, None] - column).abs()  # [H * W, H * W]
        players = planes["players"].flatten(1)[:, None]
        nearest = torch.where(players, apart.float(), 99.0).amin(2).view(distance.shape)
        return wanted(planes["second"], 100.0 - nearest)


class Late(Stranger):
    def costs(self, planes, distance, done):
        early = (done < 15)[:, None, None]
        return wanted(torch.where(early, planes["first"], planes["second"]), distance)


class Lazy(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"] & (distance <= 2), distance)


class Shifts(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"] & (self.episode % 2 == 0)[:, None, None], distance)


class Halves(Stranger):
    def costs(self, planes, distance, done):
        left = torch.arange(distance.shape[2], device=distance.device) < distance.shape[2] / 2
        return wanted(planes["items"] & left, distance)


class Tired(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"] & (done < 15)[:, None, None], distance)


class Fair(Stranger):
    def __init__(self):
        super().__init__()
        self.most = 0  # items at the start of the episode

    def costs(self, planes, distance, done):
        left = planes["items"].flatten(1).sum(1)
        self.most = torch.where(done == 0, left, self.most)
        fair = 2 * self.taken <= self.most - left
        return wanted(planes["items"] & fair[:, None, None], distance)


class Waverer(Stranger):
    def costs(self, planes, distance, done):
        return wanted(planes["items"] & (done % 2 == 0)[:, None, None], distance)


DEVELOPMENT = {"msh": (Waiting, Turns, Follower), "msg": (Lazy, Shifts, Halves)}
HELD_OUT = {"msh": (Nearest, Shy, Late), "msg": (Tired, Fair, Waverer)}

"""Rules of the grid games: hand-made scenes, a slow reference written from the rules, invariances.

Cells are (row, column) in this file, and None for a player that has left or an item that is gone.
"""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.only("hop_onestep")

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1), STAY: (0, 0)}
PLANES = {"msh": ["stag", "hare"], "msg": ["drift"]}
HORIZON = {"msh": 35, "msg": 50}

GAMES = {  # id: family, height, width, players, kinds of the items
    "msh-3x3-4h1s": ("msh", 3, 3, 4, ["stag"] + ["hare"] * 4),
    "msh-4x4-4h2s": ("msh", 4, 4, 4, ["stag"] * 2 + ["hare"] * 4),
    "msh-2x5-3p-2h2s": ("msh", 2, 5, 3, ["stag"] * 2 + ["hare"] * 2),
    "msh-3x2-6p-1h3s": ("msh", 3, 2, 6, ["stag"] * 3 + ["hare"]),
    "msh-5x1-2p-0h1s": ("msh", 5, 1, 2, ["stag"]),
    "msh-2x2-1p-0h2s": ("msh", 2, 2, 1, ["stag"] * 2),
    "msg-3x3-6d": ("msg", 3, 3, 4, ["drift"] * 6),
    "msg-1x6-2p-3d": ("msg", 1, 6, 2, ["drift"] * 3),
    "msg-4x3-5p-4d": ("msg", 4, 3, 5, ["drift"] * 4),
    "msg-7x7-1p-9d": ("msg", 7, 7, 1, ["drift"] * 9),
}
every_game = pytest.mark.parametrize("env_id", GAMES)
quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def place_of(index, width):
    """(row, column) of a cell's number; None for -1."""
    return None if index < 0 else (index // width, index % width)


def places_of(cells, width):
    return [place_of(index, width) for index in cells.tolist()]


def number_of(place, width):
    return -1 if place is None else place[0] * width + place[1]


# ------------------------------------------------------------------------------------------------
# The reference: one game of plain Python, from the rules
# ------------------------------------------------------------------------------------------------
class Reference:
    """One game. `events` counts what happened."""

    def __init__(self, env_id, state, b):
        self.family, self.height, self.width, _, self.kinds = GAMES[env_id]
        self.players = places_of(state.players[b], self.width)
        self.items = places_of(state.items[b], self.width)
        self.time = int(state.time[b])
        self.first_hunt = int(state.first_hunt[b])
        self.horizon = HORIZON[self.family]
        self.wanted = dict(enumerate(PLANES[self.family], 5))  # action: kind of item
        self.events = Counter()

    def item_here(self, player, kind):
        """Number of the item of that kind on the player's cell, or None."""
        place = self.players[player]
        for m, item in enumerate(self.items):
            if place is not None and item == place and self.kinds[m] == kind:
                return m
        return None

    def mask(self, player):
        if self.players[player] is None:
            return [action == STAY for action in range(5 + len(self.wanted))]
        row, column = self.players[player]
        moves = [row > 0, row < self.height - 1, column > 0, column < self.width - 1, True]
        return moves + [self.item_here(player, kind) is not None for kind in self.wanted.values()]

    def clock(self):
        end = self.horizon
        if self.first_hunt > 0:
            end = min(end, self.first_hunt + 5)
        return [self.time, end - self.time]

    def observe(self, player):
        """float array [planes, H, W]."""
        n = len(self.players)
        cells = []
        for k in range(n):
            cells.append([self.players[(player + k) % n]])
        for kind in PLANES[self.family]:
            numbers = [m for m, of in enumerate(self.kinds) if of == kind]
            cells.append([self.items[m] for m in numbers])
        planes = np.zeros((len(cells), self.height, self.width), np.float32)
        for plane, places in zip(planes, cells, strict=True):
            for place in places:
                if place is not None:
                    plane[place] = 1.0
        return planes

    def step(self, actions):
        """Rewards, terminated, truncated, subgoals: lists of one entry a player."""
        n = len(actions)
        groups = {}  # item: players that act on it
        after = list(self.players)
        for player, action in enumerate(actions):
            if not self.mask(player)[action]:
                self.events["illegal"] += 1
            elif action in self.wanted:
                item = self.item_here(player, self.wanted[action])
                groups.setdefault(item, []).append(player)
            elif self.players[player] is not None:
                row, column = self.players[player]
                after[player] = (row + OFFSETS[action][0], column + OFFSETS[action][1])
        rewards = [0.0] * n
        subgoals = [-1] * n
        taken = 0
        for item, group in groups.items():
            kind = self.kinds[item]
            if kind == "stag" and len(group) < 2:
                self.events["lone stag"] += 1
                continue
            taken += 1
            self.events[f"{kind} by {len(group)}"] += 1
            self.items[item] = None
            for player in range(n):
                rewards[player] += 6.0 * (kind == "drift")
            for player in group:
                rewards[player] += {"stag": 10.0, "hare": 1.0, "drift": -4.0}[kind] / len(group)
                subgoals[player] = item
                if kind != "drift":
                    after[player] = None
        self.players = after
        self.time += 1
        self.events["several at once"] += taken > 1
        if taken and self.family == "msh":
            self.events["later hunt"] += self.first_hunt > 0
            self.first_hunt = self.first_hunt or self.time
        ends = {
            "no item left": not any(self.items),
            "all left": not any(self.players),
            "countdown": self.first_hunt > 0 and self.time == self.first_hunt + 5,
        }
        over = any(ends.values())
        late = self.time == self.horizon and not over
        self.events.update(name for name, holds in ends.items() if holds)
        self.events["truncated"] += late
        terminated = [over or place is None for place in after]
        truncated = [late and place is not None for place in after]
        self.events["truncated with leavers"] += late and not all(truncated)
        self.over = over or late
        return rewards, terminated, truncated, subgoals


def assert_same_view(game, state, references, games):
    """State, mask, clock and observations of the batched `games` are those of the references."""
    observation = game.observe(state).numpy()
    mask = game.action_mask(state)
    clock = game.clock(state)
    alive = game.alive(state)
    for b in games:
        reference = references[b]
        assert places_of(state.players[b], game.width) == reference.players
        assert places_of(state.items[b], game.width) == reference.items
        assert int(state.time[b]) == reference.time
        assert int(state.first_hunt[b]) == reference.first_hunt
        assert clock[b].tolist() == reference.clock()
        assert alive[b].tolist() == [place is not None for place in reference.players]
        for player in range(len(reference.players)):
            assert mask[b, player].tolist() == reference.mask(player)
            assert (observation[b, player] == reference.observe(player)).all()


def eventful_action(mask, rng):
    """Mostly legal, interactions preferred; some blind interactions, some of everything."""
    legal = [action for action, allowed in enumerate(mask) if allowed]
    interactions = [action for action in legal if action >= 5]
    roll = rng.random()
    if roll < 0.15:
        return rng.randrange(len(mask))
    if roll < 0.3:
        return rng.randrange(5, len(mask))
    if roll < 0.6 and interactions:
        return rng.choice(interactions)
    return rng.choice(legal)


EVENTS = {
    "msh": """stag by 2,stag by 3,hare by 1,hare by 2,lone stag,several at once,later hunt,illegal,
        countdown,all left,no item left,truncated,truncated with leavers""",
    "msg": "drift by 1,drift by 2,several at once,illegal,no item left,truncated",
}


def test_whole_episodes_agree_with_the_reference(script):
    events = {"msh": Counter(), "msg": Counter()}
    batch = 24
    for env_id in GAMES:
        game = script.GridGame(env_id)
        rng = random.Random(env_id)
        state = game.start(batch, generator_of(rng.randrange(2**31)))
        late = [rng.randrange(game.horizon) * (b % 2) for b in range(batch)]
        state = state._replace(time=torch.tensor(late))
        references = [Reference(env_id, state, b) for b in range(batch)]
        games = list(range(batch))
        assert_same_view(game, state, references, games)
        while games:  # those that are over stay in the batch, their outputs are of no account
            actions = []
            for reference in references:
                masks = [reference.mask(player) for player in range(game.num_players)]
                actions.append([eventful_action(mask, rng) for mask in masks])
            before = state
            played = torch.tensor(actions)
            state, reward, terminated, truncated = game.step(before, played)
            reached = game.reached(before, played, state, reward)
            shape = (batch, game.num_players)
            assert reward.shape == terminated.shape == truncated.shape == reached.shape == shape
            assert reward.dtype == torch.float32
            assert terminated.dtype == truncated.dtype == torch.bool
            for b in games:
                rewards, terminations, truncations, subgoals = references[b].step(actions[b])
                assert reward[b].tolist() == pytest.approx(rewards, abs=1e-5)
                assert terminated[b].tolist() == terminations
                assert truncated[b].tolist() == truncations
                assert reached[b].tolist() == subgoals
                assert bool((terminated | truncated)[b].all()) == references[b].over
            assert_same_view(game, state, references, games)
            games = [b for b in games if not references[b].over]
        for reference in references:
            events[reference.family].update(reference.events)
    for family, names in EVENTS.items():
        for name in names.split(","):
            assert events[family][name.strip()] > 0, (family, name)


# ------------------------------------------------------------------------------------------------
# Scenes
# ------------------------------------------------------------------------------------------------
class Scene:
    """One game that is set up and played by hand."""

    def __init__(self, script, env_id, players, items, time=0, first_hunt=0):
        self.game = script.GridGame(env_id)
        assert len(players) == self.game.num_players
        assert len(items) == self.game.num_items
        self.state = script.GridState(
            torch.tensor([[number_of(place, self.game.width) for place in players]]),
            torch.tensor([[number_of(place, self.game.width) for place in items]]),
            torch.tensor([time]),
            torch.tensor([first_hunt]),
        )

    def step(self, *actions):
        self.state, reward, terminated, truncated = self.game.step(
            self.state, torch.tensor([actions])
        )
        self.reward = reward[0].tolist()
        self.terminated = terminated[0].tolist()
        self.truncated = truncated[0].tolist()
        return self

    def play_on(self, *actions, steps=1):
        """`steps` times the same actions, none of which ends the game."""
        for _ in range(steps):
            self.step(*actions)
            assert not all(self.terminated)
            assert not any(self.truncated)
        return self

    @property
    def players(self):
        return places_of(self.state.players[0], self.game.width)

    @property
    def items(self):
        return places_of(self.state.items[0], self.game.width)

    @property
    def mask(self):
        return self.game.action_mask(self.state)[0].tolist()

    @property
    def clock(self):
        return self.game.clock(self.state)[0].tolist()


PREY = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2)]  # the stag, four hares
DRIFTS = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2), (0, 1)]
STILL = (STAY,) * 4
NOTHING = [0.0] * 4
EVERYONE = [True] * 4
NOBODY = [False] * 4


def hunt(script, players, time=0, first_hunt=0, items=PREY, env_id="msh-4x4-4h1s"):
    return Scene(script, env_id, players, items, time, first_hunt)


@pytest.mark.parametrize(
    "start, action, end",
    [
        ((1, 2), UP, (0, 2)),
        ((1, 2), DOWN, (2, 2)),
        ((1, 2), LEFT, (1, 1)),
        ((1, 2), RIGHT, (1, 3)),
        ((1, 2), STAY, (1, 2)),
        ((0, 2), UP, (0, 2)),
        ((3, 2), DOWN, (3, 2)),
        ((2, 0), LEFT, (2, 0)),  # a cell's number less by one would be the end of the row above
        ((1, 3), RIGHT, (1, 3)),
    ],
)
def test_moves(script, start, action, end):
    for env_id in ("msh-4x4-4h1s", "msg-4x4-5d"):
        scene = Scene(script, env_id, [start, (0, 0), (0, 0), start], PREY)
        scene.step(action, STAY, RIGHT, STAY)
        assert scene.players == [end, (0, 0), (0, 1), start]
        assert scene.items == PREY
        assert scene.reward == NOTHING
        assert scene.state.time.tolist() == [1]


def test_moves_in_a_world_that_is_not_square(script):
    scene = Scene(script, "msh-2x3-4p-0h1s", [(1, 2), (0, 2), (1, 0), (0, 1)], [(0, 0)])
    assert scene.step(UP, DOWN, RIGHT, DOWN).players == [(0, 2), (1, 2), (1, 1), (1, 1)]
    assert scene.step(RIGHT, DOWN, DOWN, LEFT).players == [(0, 2), (1, 2), (1, 1), (1, 0)]


def test_lone_stag_does_nothing(script):
    scene = hunt(script, [(1, 1), (1, 1), (0, 0), (0, 0)]).step(STAG, STAY, STAY, STAY)
    assert scene.reward == NOTHING
    assert scene.items == PREY
    assert scene.players[0] == (1, 1)
    assert scene.state.first_hunt.tolist() == [0]
    assert scene.clock == [1, 34]


def test_lone_hunters_of_two_stags_do_nothing(script):
    items = [(1, 1), (2, 1), (0, 0), (0, 1), (0, 2), (0, 3)]
    players = [(1, 1), (2, 1), (3, 3), (3, 3)]
    scene = hunt(script, players, items=items, env_id="msh-4x4-4h2s").step(STAG, STAG, STAY, STAY)
    assert scene.reward == NOTHING
    assert scene.items == items
    assert scene.players == players


@pytest.mark.parametrize(
    "action, cell, item, worth, least", [(STAG, (1, 1), 0, 10, 2), (HARE, (2, 2), 4, 1, 1)]
)
def test_hunters_split_equally_and_leave(script, action, cell, item, worth, least):
    for size in range(least, 5):
        for hunters in itertools.combinations(range(4), size):
            takes_part = [player in hunters for player in range(4)]
            scene = hunt(script, [cell] * 4)  # who only stands there gets nothing
            scene.step(*(action if takes else STAY for takes in takes_part))
            assert scene.reward == pytest.approx([worth / size * takes for takes in takes_part])
            assert scene.players == [None if takes else cell for takes in takes_part]
            assert scene.items == [None if m == item else at for m, at in enumerate(PREY)]
            assert scene.state.first_hunt.tolist() == [1]
            assert scene.terminated == takes_part
            assert scene.truncated == NOBODY


def test_stag_and_hares_in_one_step(script):
    scene = hunt(script, [(1, 1), (0, 3), (1, 1), (3, 0)]).step(STAG, HARE, STAG, HARE)
    assert scene.reward == [5.0, 1.0, 5.0, 1.0]
    assert scene.players == [None] * 4
    assert scene.items == [None, None, (3, 3), None, (2, 2)]
    assert scene.terminated == EVERYONE  # prey is left, but nobody to hunt it
    assert scene.truncated == NOBODY


def test_two_stags_in_one_step(script):
    items = [(1, 1), (2, 1), (0, 0), (0, 1), (0, 2), (0, 3)]
    players = [(2, 1), (1, 1), (2, 1), (1, 1)]
    scene = hunt(script, players, items=items, env_id="msh-4x4-4h2s").step(STAG, STAG, STAG, STAG)
    assert scene.reward == [5.0] * 4
    assert scene.items == [None, None, *items[2:]]
    assert scene.terminated == EVERYONE


def test_who_moves_onto_an_item_uses_it_from_the_next_step_on(script):
    scene = hunt(script, [(1, 0), (1, 1), (0, 0), (0, 0)]).step(RIGHT, STAG, STAY, STAY)
    assert scene.players[:2] == [(1, 1), (1, 1)]
    assert scene.reward == NOTHING
    scene.step(STAG, STAG, STAY, STAY)
    assert scene.players[:2] == [None, None]
    assert scene.reward == [5.0, 5.0, 0.0, 0.0]
    scene = hunt(script, [(1, 0), (0, 1), (0, 0), (0, 0)]).step(STAG, STAG, STAY, STAY)
    assert scene.reward == NOTHING  # beside it is not on it


def test_who_moves_off_an_item_or_onto_it_takes_no_part(script):
    scene = hunt(script, [(1, 1), (1, 1), (0, 0), (0, 0)]).step(UP, STAG, STAY, STAY)
    assert scene.reward == NOTHING
    assert scene.players[:2] == [(0, 1), (1, 1)]
    scene = hunt(script, [(0, 2), (0, 3), (0, 0), (0, 0)]).step(RIGHT, HARE, STAY, STAY)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0]
    assert scene.players == [(0, 3), None, (0, 0), (0, 0)]
    assert scene.mask[0] == [False, True, True, False, True, False, False]  # the hare is gone
    scene.step(HARE, STAY, STAY, STAY)
    assert scene.reward == NOTHING
    assert scene.players[0] == (0, 3)


def test_interaction_with_the_wrong_item_or_none_is_stay(script):
    players = [(2, 2), (2, 2), (1, 1), (1, 1)]
    scene = hunt(script, players).step(STAG, STAG, HARE, HARE)
    assert scene.reward == NOTHING
    assert scene.items == PREY
    assert scene.players == players
    players = [(1, 1), (1, 1), (0, 0), (0, 0)]
    scene = hunt(script, players).step(STAG, HARE, HARE, STAG)
    assert scene.reward == NOTHING
    assert scene.players == players


def test_who_has_left_does_nothing_more(script):
    items = [None, (0, 3), (3, 3), None, None]
    for action in range(7):  # two that left play where the stag and a hare were
        scene = hunt(script, [None, None, (0, 0), (3, 3)], 4, 3, items)
        scene.step(action, action, STAY, HARE)
        assert scene.reward == [0.0, 0.0, 0.0, 1.0]
        assert scene.players == [None, None, (0, 0), None]
        assert scene.items == [None, (0, 3), None, None, None]
        assert scene.terminated == [True, True, False, True]
        only_stay = [action == STAY for action in range(7)]
        assert scene.mask[0] == scene.mask[1] == scene.mask[3] == only_stay
        assert scene.mask[2] == [False, True, False, True, True, False, False]


def test_ends_when_no_prey_is_left(script):
    players = [(2, 2), (2, 2), (0, 0), (0, 1)]
    scene = hunt(script, players, items=[(2, 2)], env_id="msh-4x4-0h1s")
    scene.step(STAG, STAG, STAY, STAY)
    assert scene.players == [None, None, (0, 0), (0, 1)]
    assert scene.terminated == EVERYONE
    assert scene.truncated == NOBODY


@pytest.mark.parametrize("first", [1, 7, 29, 30])
def test_countdown(script, first):
    """The first hunt in step `first`, a second two later, a third in the last, `first` + 5."""
    scene = hunt(script, [(0, 3), (3, 3), (3, 0), (0, 0)], time=first - 1)
    scene.play_on(HARE, STAY, STAY, STAY)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0]
    assert scene.clock == [first, 5]
    scene.play_on(*STILL).play_on(STAY, HARE, STAY, STAY)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0]
    assert scene.clock == [first + 2, 3]
    scene.play_on(*STILL, steps=2).step(STAY, STAY, HARE, STAY)
    assert scene.reward == [0.0, 0.0, 1.0, 0.0]
    assert scene.clock == [first + 5, 0]
    assert scene.state.first_hunt.tolist() == [first]
    assert scene.terminated == EVERYONE  # by the rule, also where first + 5 is the horizon
    assert scene.truncated == NOBODY


@pytest.mark.parametrize("first", [31, 33, 34])
def test_horizon_cuts_the_countdown_short(script, first):
    scene = hunt(script, [(0, 3), (3, 3), (3, 0), (0, 0)], time=first - 1)
    scene.play_on(HARE, STAY, STAY, STAY)
    assert scene.clock == [first, 35 - first]
    scene.play_on(*STILL, steps=34 - first).step(STAY, HARE, STAY, STAY)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0]
    assert scene.clock == [35, 0]
    assert scene.terminated == [True, True, False, False]
    assert scene.truncated == [False, False, True, True]


def test_hunt_in_the_last_step_of_the_horizon(script):
    scene = hunt(script, [(0, 3), (0, 0), (0, 0), (0, 0)], time=34).step(HARE, STAY, STAY, STAY)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0]
    assert scene.terminated == [True, False, False, False]
    assert scene.truncated == [False, True, True, True]
    scene = hunt(script, [(0, 3), None, None, None], 34, 34).step(HARE, STAY, STAY, STAY)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0]
    assert scene.terminated == EVERYONE  # all have left
    assert scene.truncated == NOBODY
    scene = hunt(script, [(0, 3)] * 4, 34, 0, [(0, 3)], "msh-4x4-0h1s")
    scene.step(STAG, STAY, STAG, STAY)
    assert scene.terminated == EVERYONE  # no prey is left
    assert scene.truncated == NOBODY


@pytest.mark.parametrize(
    "env_id, option, horizon",
    [
        ("msh", None, 35),
        ("msh-4x4-4h1s", None, 35),
        ("msh-2x9-2p-1h1s", None, 35),
        ("msg", None, 50),
        ("msg-3x3-2p-1d", None, 50),
        ("msh-4x4", 12, 12),
        ("msg-3x3", 60, 60),
        ("msg-3x3", 1, 1),
    ],
)
def test_truncated_at_the_horizon(script, env_id, option, horizon):
    game = script.GridGame(env_id, horizon=option)
    assert game.horizon == horizon
    state = game.start(3, generator_of(0))
    still = torch.full((3, game.num_players), STAY)
    for time in range(1, horizon + 1):
        state, reward, terminated, truncated = game.step(state, still)
        assert (truncated == (time == horizon)).all()
        assert not terminated.any()
        assert not reward.any()
        assert game.clock(state).tolist() == [[time, horizon - time]] * 3


def test_lone_player_cannot_hunt_stags(script):
    scene = Scene(script, "msh-2x2-1p-0h2s", [(1, 0)], [(1, 0), (0, 1)])
    scene.play_on(STAG, steps=34).step(STAG)
    assert scene.truncated == [True]
    assert scene.terminated == [False]
    assert scene.reward == [0.0]
    assert scene.players == [(1, 0)]


def test_removers_split_the_cost_and_all_are_paid(script):
    for size in range(1, 5):
        for removers in itertools.combinations(range(4), size):
            takes_part = [player in removers for player in range(4)]
            scene = Scene(script, "msg-4x4", [(2, 2)] * 4, DRIFTS)
            scene.play_on(*(REMOVE if takes else STAY for takes in takes_part))
            assert scene.reward == pytest.approx([6 - 4 / size * takes for takes in takes_part])
            assert scene.items == [*DRIFTS[:4], None, (0, 1)]
            assert scene.players == [(2, 2)] * 4  # nobody leaves
            assert scene.terminated == NOBODY
            assert scene.clock == [1, 49]
            assert scene.state.first_hunt.tolist() == [0]  # no countdown here


def test_several_drifts_are_paid_and_split_separately(script):
    scene = Scene(script, "msg-4x4", [(1, 1), (0, 3), (1, 1), (2, 3)], DRIFTS)
    scene.step(REMOVE, REMOVE, REMOVE, REMOVE)
    assert scene.reward == [10.0, 8.0, 10.0, 12.0]
    assert scene.items == [None, None, *DRIFTS[2:]]
    scene = Scene(script, "msg-4x4", [(1, 1), (0, 3), (3, 3), (2, 2)], DRIFTS)
    scene.step(REMOVE, REMOVE, REMOVE, REMOVE)
    assert scene.reward == [20.0] * 4
    assert scene.items == [None, None, None, (3, 0), None, (0, 1)]


def test_remove_elsewhere_is_stay_and_movers_take_no_part(script):
    players = [(1, 0), (1, 2), (1, 1), (0, 0)]
    items = [None, *DRIFTS[1:]]  # the drift of (1, 1) is gone
    scene = Scene(script, "msg-4x4", players, items).step(REMOVE, REMOVE, REMOVE, REMOVE)
    assert scene.reward == NOTHING
    assert scene.players == players
    assert scene.items == items
    scene = Scene(script, "msg-4x4", [(1, 0), (1, 1), (1, 1), (0, 0)], DRIFTS)
    scene.step(RIGHT, REMOVE, UP, STAY)
    assert scene.reward == [6.0, 2.0, 6.0, 6.0]
    assert scene.players == [(1, 1), (1, 1), (0, 1), (0, 0)]


def test_last_drift_terminates_also_at_the_horizon(script):
    items = [None, None, (3, 3), None, None, (0, 1)]
    for time in (12, 49):
        scene = Scene(script, "msg-4x4", [(3, 3), (0, 1), (0, 0), (0, 0)], items, time)
        scene.step(REMOVE, REMOVE, STAY, STAY)
        assert scene.terminated == EVERYONE
        assert scene.truncated == NOBODY
        assert scene.reward == [8.0, 8.0, 12.0, 12.0]
    scene = Scene(script, "msg-4x4", [(3, 3)] * 4, items, 49).step(REMOVE, STAY, STAY, STAY)
    assert scene.truncated == EVERYONE
    assert scene.terminated == NOBODY
    assert scene.reward == [2.0, 6.0, 6.0, 6.0]


def test_left_player_has_an_empty_plane_everywhere_and_sees_the_rest(script):
    items = [None, (0, 3), (3, 3), None, (2, 2)]
    scene = hunt(script, [(0, 0), None, (2, 2), (0, 1)], 4, 2, items)
    hares = [[0, 3], [2, 2], [3, 3]]
    expected = [
        [[[0, 0]], [], [[2, 2]], [[0, 1]], [], hares],
        [[], [[2, 2]], [[0, 1]], [[0, 0]], [], hares],
        [[[2, 2]], [[0, 1]], [[0, 0]], [], [], hares],
        [[[0, 1]], [[0, 0]], [], [[2, 2]], [], hares],
    ]
    observation = scene.game.observe(scene.state)[0]
    for view, planes in zip(observation, expected, strict=True):
        assert [plane.nonzero().tolist() for plane in view] == planes
    assert observation.unique().tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------
# Ids and fixed facts
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "env_id, height, width, players, item_counts",
    [
        ("msh", 8, 8, 4, [1, 4]),
        ("msh-4h1s", 8, 8, 4, [1, 4]),
        ("msh-4h2s", 8, 8, 4, [2, 4]),
        ("msh-8x8", 8, 8, 4, [1, 4]),
        ("msh-4x4-4h1s", 4, 4, 4, [1, 4]),
        ("msh-3x5", 3, 5, 4, [1, 4]),
        ("msh-2p", 8, 8, 2, [1, 4]),
        ("msh-2p-1h3s", 8, 8, 2, [3, 1]),
        ("msh-10x12-11p-20h10s", 10, 12, 11, [10, 20]),
        ("msh-0h1s", 8, 8, 4, [1, 0]),
        ("msh-1x1-1p-0h1s", 1, 1, 1, [1, 0]),
        ("msh-5x6-3p", 5, 6, 3, [1, 4]),
        ("msg", 8, 8, 4, [6]),
        ("msg-6d", 8, 8, 4, [6]),
        ("msg-3x5", 3, 5, 4, [6]),
        ("msg-2p", 8, 8, 2, [6]),
        ("msg-10d", 8, 8, 4, [10]),
        ("msg-2x3-1p-6d", 2, 3, 1, [6]),
        ("msg-10x99-99p-99d", 10, 99, 99, [99]),
    ],
)
def test_ids(script, env_id, height, width, players, item_counts):
    game = script.GridGame(env_id)
    assert (game.height, game.width) == (height, width)
    assert game.num_players == players
    state = game.start(5, generator_of(0))
    assert state.players.shape == (5, players)
    assert state.items.shape == (5, sum(item_counts))
    planes = game.observe(state)
    assert planes.shape == (5, players, players + len(item_counts), height, width)
    assert planes[0, 0, players:].sum((1, 2)).tolist() == item_counts
    assert game.action_mask(state).shape == (5, players, 5 + len(item_counts))
    assert game.clock(state).shape == (5, 2)
    own, others = game.features(state)
    assert own.shape == (5, players, game.own_size)
    assert others.shape == (5, players, players - 1, game.other_size)
    assert torch.isfinite(own).all()
    assert torch.isfinite(others).all()
    assert game.others.shape == (players, players - 1)


@pytest.mark.parametrize(
    "short, full",
    [
        ("msh", "msh-4h1s"),
        ("msh", "msh-8x8-4p-4h1s"),
        ("msg", "msg-8x8-4p-6d"),
        ("msg-2p", "msg-2p-6d"),
    ],
)
def test_what_is_left_out_of_an_id_is_the_default(script, short, full):
    games = [script.GridGame(short), script.GridGame(full)]
    states = [game.start(20, generator_of(3)) for game in games]
    assert_equal(states[0], states[1])
    assert torch.equal(games[0].observe(states[0]), games[1].observe(states[1]))
    assert games[0].num_actions == games[1].num_actions
    assert games[0].horizon == games[1].horizon
    assert games[0].best_return == games[1].best_return


BAD_IDS = """
    garbage ms MSH mshx xmsh msh- msh--4h1s msh_4h1s msh-4h msh-1s msh-h1s msh-1s4h msh-4H1S msh-8
    msh-8x msh-8x8x8 msh-p msh-4 msg-d msg-6 msh-6d msg-4h1s msh-4h1s-8x8 msh-4p-8x8 msh-4h1s-4p
    msh-4p-4p msh-4h1s-4h1s msg-6d-8x8 msh-08x8 msh-8x08 msh-04p msh-04h1s msh-4h01s msg-06d
    msg-00d msh-4h1.0s msh-+4p msh--1p msh-4h-1s msh-0x4 msh-4x0 msg-0x4 msh-0p msg-0p msg-0d
    msh-0h0s msh-4h0s msh-2x1-4h1s msh-2x2-4h1s msh-1x1 msg-2x2-5d msg-2x2
""".split()
BAD_IDS += ["", " msh", "msh ", "msh\n", "msh-4h1s\n"]
BAD_IDS += ["msh-1\u0664p", "msg-1\u0664d"]  # \u0664 is a digit, but none of ASCII
BAD_IDS += ["msh-9999x9999", "msg-9999p", "msh-100x9", "msh-9x100", "msh-100p"]  # too long
BAD_IDS += ["msh-100h1s", "msh-1h100s", "msg-100d", "msh-33x32", "msg-99x99"]  # or too large


@pytest.mark.parametrize("env_id", BAD_IDS, ids=repr)
def test_bad_ids_raise_usage_error(script, env_id):
    with pytest.raises(script.UsageError) as error:
        script.GridGame(env_id)
    message = str(error.value)
    assert "\n" not in message
    assert repr(env_id) in message


@pytest.mark.parametrize("horizon", [-5, 0])
def test_bad_horizons(script, small, horizon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.UsageError) as error:
        script.train(small(horizon=horizon))
    assert "--horizon" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_usage_error_is_a_value_error(script):
    assert issubclass(script.UsageError, ValueError)


@pytest.mark.parametrize(
    "env_id, best",
    [
        ("msh", 12 / 4),
        ("msh-4h2s", 20 / 4),
        ("msh-4x4-4h1s", 12 / 4),
        ("msh-2p-1h1s", 10 / 2),
        ("msh-3p-2h2s", 11 / 3),
        ("msh-5p-1h1s", 11 / 5),
        ("msh-1p-2h1s", 1.0),
        ("msh-1p-0h1s", 0.0),
        ("msg", 30.0),
        ("msg-2p-3d", 12.0),
        ("msg-1p-5d", 10.0),
    ],
)
def test_best_return(script, env_id, best):
    assert script.GridGame(env_id).best_return == pytest.approx(best)


def test_best_return_is_the_best_of_all_ways_to_share_out_the_hunters(script):
    for players, hares, stags in itertools.product(range(1, 5), range(3), range(1, 3)):
        best = 0.0
        for targets in itertools.product(range(-1, stags + hares), repeat=players):
            total = 0.0
            for item, hunters in Counter(targets).items():
                if 0 <= item < stags and hunters >= 2:
                    total += 10.0
                if item >= stags:
                    total += 1.0
            best = max(best, total)
        game = script.GridGame(f"msh-{players}p-{hares}h{stags}s")
        assert game.best_return == pytest.approx(best / players)


# ------------------------------------------------------------------------------------------------
# Invariances, on random states in the middle of a game
# ------------------------------------------------------------------------------------------------
def random_situations(script, game, batch, seed):
    """States with players gathered on items, some left, some items gone; actions, not all legal."""
    generator = generator_of(seed)

    def chance(probability, shape):
        return torch.rand(shape, generator=generator) < probability

    players, items, _, _ = game.start(batch, generator)
    shape = players.shape
    gathered = torch.randint(game.num_items, shape, generator=generator)
    players = torch.where(chance(0.7, shape), items.gather(1, gathered), players)
    items = items.masked_fill(chance(0.2, items.shape), -1)
    time = torch.randint(1, game.horizon, (batch,), generator=generator)
    first_hunt = torch.zeros_like(time)
    if game.num_actions == 7:
        hunt_time = (time - torch.randint(5, (batch,), generator=generator)).clamp(min=0)
        first_hunt = torch.where(chance(0.5, (batch,)), hunt_time, 0)
        has_left = chance(0.2, shape) & (first_hunt > 0).unsqueeze(1)
        players = players.masked_fill(has_left, -1)
    anything = torch.randint(game.num_actions, shape, generator=generator)
    interaction = torch.randint(5, game.num_actions, shape, generator=generator)
    actions = torch.where(chance(0.6, shape), interaction, anything)
    return script.GridState(players, items, time, first_hunt), actions


def views(game, state):
    own, others = game.features(state)
    seen = [game.observe(state), game.action_mask(state), game.clock(state), game.alive(state)]
    return [*seen, own, others]


def all_outputs(game, state, actions):
    """Everything that the game makes of a state and of the state after it."""
    after, reward, terminated, truncated = game.step(state, actions)
    reached = game.reached(state, actions, after, reward)
    outputs = [*after, reward, terminated, truncated, reached]
    return outputs + views(game, state) + views(game, after)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


def rows_of(state, index):
    return type(state)(*(field[index] for field in state))


@every_game
@quick
@given(seed=seeds, data=st.data())
def test_relabelling_the_players_changes_nothing_else(script, env_id, seed, data):
    game = script.GridGame(env_id)
    n = game.num_players
    order = data.draw(st.permutations(range(n)))  # new seat k is old seat order[k]
    state, actions = random_situations(script, game, 50, seed)
    relabelled = state._replace(players=state.players[:, order])
    after, *outputs = game.step(state, actions)
    after_2, *outputs_2 = game.step(relabelled, actions[:, order])
    assert torch.equal(after_2.players, after.players[:, order])
    assert_equal(after_2[1:], after[1:])
    assert_equal(outputs_2, [output[:, order] for output in outputs])
    reached = game.reached(state, actions, after, outputs[0])
    reached_2 = game.reached(relabelled, actions[:, order], after_2, outputs_2[0])
    assert torch.equal(reached_2, reached[:, order])
    for old, new in ((state, relabelled), (after, after_2)):
        assert torch.equal(game.action_mask(new), game.action_mask(old)[:, order])
        assert torch.equal(game.alive(new), game.alive(old)[:, order])
        assert torch.equal(game.clock(new), game.clock(old))
        planes = game.observe(old)
        planes_2 = game.observe(new)
        own, others = game.features(old)
        own_2, others_2 = game.features(new)
        assert torch.equal(own_2, own[:, order])
        for k in range(n):
            distance = [(order[(k + j) % n] - order[k]) % n for j in range(n)]
            moved = [*distance, *range(n, planes.shape[2])]
            assert torch.equal(planes_2[:, k], planes[:, order[k], moved])
            slots = [d - 1 for d in distance[1:]]
            assert torch.equal(others_2[:, k], others[:, order[k], slots])


@every_game
@quick
@given(seed=seeds)
def test_a_game_does_not_depend_on_the_rest_of_the_batch(script, env_id, seed):
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 30, seed)
    whole = all_outputs(game, state, actions)
    index = torch.randperm(30, generator=generator_of(seed))[:7]  # another order, another size
    for rows in (index, index[:1]):
        part = all_outputs(game, rows_of(state, rows), actions[rows])
        assert_equal(part, [output[rows] for output in whole])


@every_game
def test_situations_are_eventful(script, env_id):
    """The invariances above would say little about states in which nothing happens."""
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 2000, 0)
    after, reward, terminated, truncated = game.step(state, actions)
    taken = (after.items != state.items).any(1).float().mean()
    assert (after.players != state.players).float().mean() > 0.05
    assert truncated.any()
    if env_id == "msh-2x2-1p-0h2s":  # no hunt can succeed there
        assert taken == 0
        assert not reward.any()
    else:
        assert terminated.any() or env_id == "msg-7x7-1p-9d"  # whose drifts are too many
        assert taken > 0.03
        assert (reward != 0).any(1).float().mean() > 0.03


@every_game
def test_pure(script, env_id):
    """No argument is changed, no random number drawn; the same arguments give the same results."""
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 100, 1)
    before = [field.clone() for field in (*state, actions)]
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()[1].tolist()
    first = all_outputs(game, state, actions)
    second = all_outputs(game, state, actions)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state
    assert_equal([*state, actions], before)
    assert_equal(first, second)


@every_game
def test_fields_of_the_state(script, env_id):
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 6, 2)
    for one in (game.start(6, generator_of(0)), game.step(state, actions)[0]):
        assert type(one) is script.GridState
        assert one._fields == ("players", "items", "time", "first_hunt")
        assert [field.dtype for field in one] == [torch.int64] * 4
        shapes = [(6, game.num_players), (6, game.num_items), (6,), (6,)]
        assert [tuple(field.shape) for field in one] == shapes
    assert game.observe(state).dtype == torch.float32
    assert game.action_mask(state).dtype == torch.bool
    assert game.clock(state).dtype == torch.int64


# ------------------------------------------------------------------------------------------------
# Starts
# ------------------------------------------------------------------------------------------------
def chi_square(*columns, sizes):
    """Joint counts of integer columns against uniform: standard deviations above the mean."""
    joint = np.ravel_multi_index([column.numpy() for column in columns], sizes)
    counts = np.bincount(joint, minlength=int(np.prod(sizes)))
    freedom = len(counts) - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("again", [False, True])
def test_starts_are_uniform(script, again):
    game = script.GridGame("msh-2x3-3p-1h1s")
    batch = 36000
    generator = generator_of(0)
    state = game.start(batch, generator)
    if again:
        state = game.restart(state, torch.ones(batch, dtype=torch.bool), generator)
    assert not state.time.any()
    assert not state.first_hunt.any()
    for cells in (state.players, state.items):
        assert (cells.min(), cells.max()) == (0, 5)
    stag, hare = state.items.unbind(1)
    assert (stag != hare).all()
    other = hare - (hare > stag).long()  # the hare's place among the five cells left by the stag
    players = state.players.unbind(1)
    assert chi_square(*players, stag, other, sizes=(6, 6, 6, 6, 5)) < 5  # and independent
    assert chi_square(*players, sizes=(6, 6, 6)) < 5
    assert chi_square(stag, other, sizes=(6, 5)) < 5
    for cells in (players[0], stag):  # and from one game of the batch to the next
        assert chi_square(cells[:-1], cells[1:], sizes=(6, 6)) < 5
    assert (players[0] == players[1]).any()
    assert (players[0] == stag).any()


def test_restart_touches_the_ended_games_alone(script):
    game = script.GridGame("msh-3x3-4h1s")
    state, _ = random_situations(script, game, 400, 5)
    state = state._replace(time=state.time.clamp(min=1))
    ended = torch.rand(400, generator=generator_of(1)) < 0.5
    begun = game.restart(state, ended, generator_of(2))
    assert_equal(rows_of(begun, ~ended), rows_of(state, ~ended))
    assert not begun.time[ended].any()
    assert not begun.first_hunt[ended].any()
    assert (begun.items[ended] >= 0).all()
    assert (begun.players[ended] >= 0).all()
    assert len(begun.players[ended].unique(dim=0)) > 100


def test_replaced(script):
    """Fields of any shape and type, game by game, NaN included."""
    generator = generator_of(0)
    states = []
    for time in (3, 0):
        observation = torch.randn(5, 2, 4, generator=generator)
        observation[:, 1] = math.nan
        mask = torch.rand(5, 2, 3, generator=generator) < 0.5
        playing = torch.rand(5, 2, generator=generator) < 0.5
        states.append(script.ParallelState(observation, mask, playing, torch.full((5,), time)))
    ended = torch.tensor([True, False, False, True, False])
    result = script.replaced(*states, ended)
    assert type(result) is script.ParallelState
    for b in range(5):
        for field, truth in zip(result, states[int(ended[b])], strict=True):
            assert field.dtype == truth.dtype
            torch.testing.assert_close(field[b], truth[b], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("env_id", ["msh-2x4-4h4s", "msg-2x4-8d", "msg-3x3-6d"])
def test_items_are_on_distinct_cells(script, env_id):
    game = script.GridGame(env_id)
    rows = game.start(500, generator_of(0)).items.tolist()
    for row in rows:
        assert len(set(row)) == game.num_items
        assert set(row) <= set(range(game.height * game.width))
    assert len(set(map(tuple, rows))) > 100


def test_start_draws_from_its_generator_alone(script):
    game = script.GridGame("msh")
    before = torch.get_rng_state()
    first = game.start(9, generator_of(7))
    second = game.start(9, generator_of(7))
    other = game.start(9, generator_of(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(first, second)
    assert not torch.equal(first.players, other.players)
    assert not torch.equal(first.items, other.items)
    generator = generator_of(7)
    assert_equal(game.start(9, generator), first)
    assert not torch.equal(game.start(9, generator).players, first.players)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------
def test_features_of_who_has_left_and_what_is_gone_are_zero(script):
    """A game with a left player and gone items looks like one without them."""
    full = script.GridGame("msh-4x5-3p-3h2s")
    fewer = script.GridGame("msh-4x5-2p-2h1s")
    zero = torch.tensor([0])
    time = torch.tensor([7])
    items = torch.tensor([[-1, 9, 2, -1, 17]])
    state = script.GridState(torch.tensor([[6, -1, 13]]), items, time, zero)
    other = script.GridState(torch.tensor([[6, 13]]), torch.tensor([[9, 2, 17]]), time, zero)
    own, others = full.features(state)
    own_fewer, others_fewer = fewer.features(other)
    assert torch.equal(own[0, [0, 2]], own_fewer[0])
    assert own.abs().sum() > 0
    assert torch.equal(others[0, 0, 1], others_fewer[0, 0, 0])
    assert torch.equal(others[0, 2, 0], others_fewer[0, 1, 0])
    assert not others[0, 0, 0].any()  # the player that left is not seen
    assert not others[0, 2, 1].any()
    gone = state._replace(items=torch.full_like(items, -1))
    own_gone, _ = full.features(gone)
    assert torch.equal(own[0, 1], own_gone[0, 1])  # it sees no items, and still the clock
    assert own[0, 1].any()


def test_features_depend_on_relative_cells_alone(script):
    """The scene one row down and two columns to the right: only the walls look different."""
    game = script.GridGame("msh-6x8-3p-2h1s")
    zero = torch.tensor([0])
    players = torch.tensor([[9, 20, 26]])
    items = torch.tensor([[18, 25, 10]])
    walls = slice(8, 13)  # legal moves, behind the clock
    own, others = game.features(script.GridState(players, items, zero, zero))
    moved, others_moved = game.features(script.GridState(players + 10, items + 10, zero, zero))
    own[..., walls] = 0.0
    moved[..., walls] = 0.0
    assert torch.equal(own, moved)
    assert torch.equal(others, others_moved)
    seen = set()
    for cell in range(48):  # every relative cell looks different
        place = torch.tensor([[27, cell, 27]])
        _, others = game.features(script.GridState(place, items, zero, zero))
        seen.add(tuple(others[0, 0, 0].tolist()))
    assert len(seen) == 48


@pytest.mark.parametrize("env_id", ["msh-3x3-3p-2h1s", "msg-2x2-3p-3d"])
def test_clock_at_the_time_limit_is_read_as_one_step_before(script, env_id):
    """No step begins with 0 steps left: there V, by which truncation bootstraps, is untrained."""
    game = script.GridGame(env_id)
    state = game.start(1, generator_of(0))
    limit = torch.tensor([game.horizon])
    at_limit, _ = game.features(state._replace(time=limit))
    before, _ = game.features(state._replace(time=limit - 1))
    earlier, _ = game.features(state._replace(time=limit - 2))
    assert 1 <= int((at_limit != before)[0, 0].sum()) <= 2  # the steps done, and a flag
    assert int((at_limit != earlier)[0, 0].sum()) > 3
    clock = script.clock_features(game, state._replace(time=limit))
    assert clock.shape == (1, 3, 8)
    assert torch.equal(at_limit[..., :8], clock)


def test_the_clock_by_hand(script):
    """Shares done and left, soon, at most five left, one, two, three left, an end before the
    horizon."""
    game = script.GridGame("msh-4x4-2p-1h1s")
    state = game.start(4, generator_of(0))
    times = torch.tensor([0, 7, 32, 34])
    hunts = torch.tensor([0, 4, 0, 30])  # 35, 2, 3 and 1 steps are left
    clock = script.clock_features(game, state._replace(time=times, first_hunt=hunts))
    expected = []
    for time, left in zip(times.tolist(), (35, 2, 3, 1), strict=True):
        numbers = [time / 35, left / 35, math.exp(-left / 8), left <= 5]
        numbers += [left == k for k in (1, 2, 3)]
        expected.append([*map(float, numbers), float(time == 7)])
    for seat in range(2):
        torch.testing.assert_close(clock[:, seat], torch.tensor(expected))


def test_subgoals(script):
    """Each item as each player sees it, and whether it is there."""
    game = script.GridGame("msh-4x4-3p-3h2s")
    items = torch.tensor([[1, 14, 3, -1, 9]])
    zero = torch.tensor([0])
    state = script.GridState(torch.tensor([[5, 0, 7]]), items, zero + 4, zero)
    features, present = game.subgoals(state)
    assert features.shape == (1, 3, 5, game.subgoal_size)
    assert present.tolist() == [[[True, True, True, False, True]] * 3]
    assert not features[:, :, 3].any()
    for i, j in itertools.combinations([0, 1, 2, 4], 2):
        assert (features[:, :, i] != features[:, :, j]).any(2).all()
    order = [1, 0, 4, 2, 3]
    moved, present = game.subgoals(state._replace(items=items[:, order]))
    assert torch.equal(moved, features[:, :, order])
    assert present.tolist() == [[[True, True, True, True, False]] * 3]
    seats = [2, 0, 1]
    relabelled, _ = game.subgoals(state._replace(players=state.players[:, seats]))
    assert torch.equal(relabelled, features[:, seats])
    shifted = state._replace(players=state.players[:, :1] + 1, items=items + 1)
    beside, _ = game.subgoals(shifted)
    assert torch.equal(beside[0, 0, :2], features[0, 0, :2])  # relative cells alone count

"""The rules of the games: hand-made scenes, a slow reference written from the rules, and invariances.

Cells are (row, column) in this file, and None for a player that has left or an item that is gone.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1), STAY: (0, 0)}

# id: family, height, width, players, first kind (stags or drifts), hares
GAMES = {
    "msh-3x3-4h1s": ("msh", 3, 3, 4, 1, 4),
    "msh-4x4-4h2s": ("msh", 4, 4, 4, 2, 4),
    "msh-2x5-3p-2h2s": ("msh", 2, 5, 3, 2, 2),
    "msh-3x2-6p-1h3s": ("msh", 3, 2, 6, 3, 1),
    "msh-5x1-2p-0h1s": ("msh", 5, 1, 2, 1, 0),
    "msh-2x2-1p-0h2s": ("msh", 2, 2, 1, 2, 0),
    "msg-3x3-6d": ("msg", 3, 3, 4, 6, 0),
    "msg-1x6-2p-3d": ("msg", 1, 6, 2, 3, 0),
    "msg-4x3-5p-4d": ("msg", 4, 3, 5, 4, 0),
    "msg-7x7-1p-9d": ("msg", 7, 7, 1, 9, 0),
}
every_game = pytest.mark.parametrize("env_id", GAMES)
quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one game, plain Python, from the rules
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Reference:
    family: str
    height: int
    width: int
    players: list
    items: list
    kinds: list  # "stag", "hare" or "drift", one an item
    time: int = 0
    first_hunt: int = 0
    events: Counter = field(default_factory=Counter)

    @property
    def horizon(self):
        return {"msh": 35, "msg": 50}[self.family]

    @property
    def kind_of_action(self):
        return {STAG: "stag", HARE: "hare"} if self.family == "msh" else {REMOVE: "drift"}

    def item_here(self, player, kind):
        """Number of the item of that kind on the player's cell, or None."""
        cell = self.players[player]
        found = [m for m, at in enumerate(self.items) if cell is not None and at == cell and self.kinds[m] == kind]
        return found[0] if found else None

    def mask(self, player):
        if self.players[player] is None:
            return [False] * 4 + [True] + [False] * len(self.kind_of_action)
        row, column = self.players[player]
        moves = [row > 0, row < self.height - 1, column > 0, column < self.width - 1, True]
        return moves + [self.item_here(player, kind) is not None for kind in self.kind_of_action.values()]

    def clock(self):
        end = self.horizon if self.first_hunt == 0 else min(self.horizon, self.first_hunt + 5)
        return [self.time, end - self.time]

    def observe(self, player):
        """Nested lists [C][H][W]."""
        n = len(self.players)
        cells = [[self.players[(player + k) % n]] for k in range(n)]
        kinds = ["stag", "hare"] if self.family == "msh" else ["drift"]
        cells += [[at for at, kind in zip(self.items, self.kinds, strict=True) if kind == k] for k in kinds]
        return [[[float((r, c) in on) for c in range(self.width)] for r in range(self.height)] for on in cells]

    def step(self, actions):
        """Rewards, terminated, truncated."""
        actors, after = {}, list(self.players)
        for player, action in enumerate(actions):
            if not self.mask(player)[action]:
                self.events["illegal"] += 1
                action = STAY
            if action in OFFSETS and self.players[player] is not None:
                after[player] = tuple(np.add(self.players[player], OFFSETS[action]).tolist())
            elif action in self.kind_of_action:
                actors.setdefault(self.item_here(player, self.kind_of_action[action]), []).append(player)
        rewards, taken = [0.0] * len(actions), 0
        for item, group in actors.items():
            kind = self.kinds[item]
            if kind == "stag" and len(group) < 2:
                self.events["lone stag"] += 1
                continue
            taken += 1
            self.events[f"{kind} by {len(group)}"] += 1
            self.items[item] = None
            if kind == "drift":
                for player in range(len(actions)):
                    rewards[player] += 6.0
            for player in group:
                rewards[player] += {"stag": 10.0, "hare": 1.0, "drift": -4.0}[kind] / len(group)
                if kind != "drift":
                    after[player] = None
        self.players, self.time = after, self.time + 1
        if taken > 1:
            self.events["several at once"] += 1
        if taken and self.family == "msh":
            self.events["later hunt"] += self.first_hunt > 0
            self.first_hunt = self.first_hunt or self.time
        ends = {
            "no item left": not any(self.items),
            "all left": not any(self.players),
            "countdown": self.first_hunt > 0 and self.time == self.first_hunt + 5,
        }
        terminated = any(ends.values())
        truncated = self.time == self.horizon and not terminated
        self.events.update([name for name, so in ends.items() if so] + ["truncated"] * truncated)
        return rewards, terminated, truncated


def kinds_of(env_id):
    family, _, _, _, first, hares = GAMES[env_id]
    return ["stag"] * first + ["hare"] * hares if family == "msh" else ["drift"] * first


def to_cell(index, width):
    return None if index < 0 else (index // width, index % width)


def reference_of(env_id, state, b):
    """Game b of a batched state as a Reference."""
    family, height, width, *_ = GAMES[env_id]
    players, items = ([to_cell(i, width) for i in cells[b].tolist()] for cells in (state.players, state.items))
    return Reference(
        family, height, width, players, items, kinds_of(env_id), int(state.time[b]), int(state.first_hunt[b])
    )


def assert_same_view(game, state, references, live):
    """State, mask, clock and observations of the batched games in `live` are those of the references."""
    observation, mask, clock = game.observe(state), game.action_mask(state), game.clock(state)
    for b in live:
        reference = references[b]
        assert [to_cell(i, game.width) for i in state.players[b].tolist()] == reference.players
        assert [to_cell(i, game.width) for i in state.items[b].tolist()] == reference.items
        assert (int(state.time[b]), int(state.first_hunt[b])) == (reference.time, reference.first_hunt)
        assert clock[b].tolist() == reference.clock()
        for player in range(len(reference.players)):
            assert mask[b, player].tolist() == reference.mask(player)
            assert observation[b, player].tolist() == reference.observe(player)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------
class Scene:
    """One game that is set up and played by hand."""

    def __init__(self, script, env_id, players, items, time=0, first_hunt=0):
        self.game = script.GridGame(env_id)

        def cells(places):
            width = self.game.width
            return torch.tensor([[-1 if at is None else at[0] * width + at[1] for at in places]])

        self.state = script.GameState(cells(players), cells(items), torch.tensor([time]), torch.tensor([first_hunt]))
        assert self.state.players.shape[1] == self.game.num_players
        assert self.state.items.shape[1] == self.game.num_items

    def step(self, *actions):
        self.state, reward, terminated, truncated = self.game.step(self.state, torch.tensor([actions]))
        self.reward, self.terminated, self.truncated = reward[0].tolist(), bool(terminated), bool(truncated)
        return self

    def play_on(self, actions, steps):
        """`steps` times the same actions, none of which may end the game."""
        for _ in range(steps):
            self.step(*actions)
            assert not (self.terminated or self.truncated)
        return self

    @property
    def players(self):
        return [to_cell(i, self.game.width) for i in self.state.players[0].tolist()]

    @property
    def items(self):
        return [to_cell(i, self.game.width) for i in self.state.items[0].tolist()]

    @property
    def mask(self):
        return self.game.action_mask(self.state)[0].tolist()

    @property
    def clock(self):
        return self.game.clock(self.state)[0].tolist()


PREY = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2)]  # the stag, four hares
STILL = (STAY,) * 4


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
        ((2, 0), LEFT, (2, 0)),  # a cell number less by one would be the end of the row above
        ((1, 3), RIGHT, (1, 3)),
    ],
)
def test_moves(script, start, action, end):
    for env_id, items in (("msh-4x4-4h1s", PREY), ("msg-4x4-5d", PREY)):
        scene = Scene(script, env_id, [start, (0, 0), (0, 0), start], items).step(action, STAY, RIGHT, STAY)
        assert scene.players == [end, (0, 0), (0, 1), start]
        assert scene.items == PREY and scene.reward == [0.0] * 4 and scene.state.time.tolist() == [1]


def test_move_in_a_world_that_is_not_square(script):
    scene = Scene(script, "msh-2x3-4p-0h1s", [(1, 2), (0, 2), (1, 0), (0, 1)], [(0, 0)])
    assert scene.step(UP, DOWN, RIGHT, DOWN).players == [(0, 2), (1, 2), (1, 1), (1, 1)]
    assert scene.step(RIGHT, DOWN, DOWN, LEFT).players == [(0, 2), (1, 2), (1, 1), (1, 0)]


def test_lone_stag_does_nothing(script):
    scene = hunt(script, [(1, 1), (1, 1), (0, 0), (0, 0)]).step(STAG, STAY, STAY, STAY)
    assert scene.reward == [0.0] * 4 and scene.items == PREY and scene.players[0] == (1, 1)
    assert scene.state.first_hunt.tolist() == [0] and scene.clock == [1, 34]


def test_two_lone_hunters_of_two_stags_do_nothing(script):
    items = [(1, 1), (2, 1), (0, 0), (0, 1), (0, 2), (0, 3)]
    scene = hunt(script, [(1, 1), (2, 1), (3, 3), (3, 3)], items=items, env_id="msh-4x4-4h2s").step(STAG, STAG, 4, 4)
    assert scene.reward == [0.0] * 4 and scene.items == items and not any(at is None for at in scene.players)


@pytest.mark.parametrize("action, cell, number, worth, least", [(STAG, (1, 1), 0, 10, 2), (HARE, (2, 2), 4, 1, 1)])
def test_hunters_split_equally_and_leave(script, action, cell, number, worth, least):
    for hunters in itertools.chain.from_iterable(itertools.combinations(range(4), k) for k in range(least, 5)):
        actions = [action if player in hunters else STAY for player in range(4)]
        scene = hunt(script, [cell] * 4).step(*actions)  # who only stands there gets nothing
        assert scene.reward == pytest.approx([worth / len(hunters) * (p in hunters) for p in range(4)])
        assert scene.players == [None if player in hunters else cell for player in range(4)]
        assert scene.items == [None if m == number else at for m, at in enumerate(PREY)]
        assert scene.state.first_hunt.tolist() == [1]
        assert scene.terminated == (len(hunters) == 4) and not scene.truncated


def test_stag_and_hares_in_one_step(script):
    scene = hunt(script, [(1, 1), (0, 3), (1, 1), (3, 0)]).step(STAG, HARE, STAG, HARE)
    assert scene.reward == [5.0, 1.0, 5.0, 1.0] and scene.players == [None] * 4
    assert scene.items == [None, None, (3, 3), None, (2, 2)]
    assert scene.terminated and not scene.truncated  # prey is left, but nobody to hunt it


def test_two_stags_in_one_step(script):
    items = [(1, 1), (2, 1), (0, 0), (0, 1), (0, 2), (0, 3)]
    scene = hunt(script, [(2, 1), (1, 1), (2, 1), (1, 1)], items=items, env_id="msh-4x4-4h2s").step(*[STAG] * 4)
    assert scene.reward == [5.0] * 4 and scene.items == [None, None] + items[2:] and scene.terminated


def test_who_moves_onto_an_item_uses_it_from_the_next_step_on(script):
    scene = hunt(script, [(1, 0), (1, 1), (0, 0), (0, 0)])
    scene.step(RIGHT, STAG, STAY, STAY)
    assert scene.players[:2] == [(1, 1), (1, 1)] and scene.reward == [0.0] * 4 and scene.items == PREY
    scene.step(STAG, STAG, STAY, STAY)
    assert scene.players[:2] == [None, None] and scene.reward == [5.0, 5.0, 0.0, 0.0]
    scene = hunt(script, [(1, 0), (0, 1), (0, 0), (0, 0)]).step(STAG, STAG, STAY, STAY)  # beside it is not on it
    assert scene.reward == [0.0] * 4 and scene.items == PREY


def test_who_moves_off_an_item_or_onto_it_takes_no_part(script):
    scene = hunt(script, [(1, 1), (1, 1), (0, 0), (0, 0)]).step(UP, STAG, STAY, STAY)
    assert scene.reward == [0.0] * 4 and scene.items == PREY and scene.players[:2] == [(0, 1), (1, 1)]
    scene = hunt(script, [(0, 2), (0, 3), (0, 0), (0, 0)]).step(RIGHT, HARE, STAY, STAY)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0] and scene.players == [(0, 3), None, (0, 0), (0, 0)]
    assert scene.mask[0] == [False, True, True, False, True, False, False]  # the hare is gone
    scene.step(HARE, STAY, STAY, STAY)
    assert scene.reward == [0.0] * 4 and scene.players[0] == (0, 3)


def test_interaction_with_the_wrong_item_or_none_is_stay(script):
    scene = hunt(script, [(2, 2), (2, 2), (1, 1), (1, 1)]).step(STAG, STAG, HARE, HARE)
    assert scene.reward == [0.0] * 4 and scene.items == PREY and scene.players == [(2, 2), (2, 2), (1, 1), (1, 1)]
    scene = hunt(script, [(1, 1), (1, 1), (0, 0), (0, 0)]).step(STAG, HARE, HARE, STAG)
    assert scene.reward == [0.0] * 4 and scene.items == PREY and scene.players == [(1, 1), (1, 1), (0, 0), (0, 0)]


def test_who_has_left_does_nothing_more(script):
    items = [None, (0, 3), (3, 3), None, None]
    for action in range(7):  # two that left play STAG where the stag was, and a hare is gone as well
        scene = hunt(script, [None, None, (0, 0), (3, 3)], 4, 3, items).step(action, action, STAY, HARE)
        assert scene.reward == [0.0, 0.0, 0.0, 1.0] and scene.players == [None, None, (0, 0), None]
        assert scene.items == [None, (0, 3), None, None, None] and not scene.terminated
        assert scene.mask[0] == scene.mask[1] == scene.mask[3] == [action == STAY for action in range(7)]
        assert scene.mask[2] == [False, True, False, True, True, False, False]


def test_ends_when_no_prey_is_left(script):
    scene = hunt(script, [(2, 2), (2, 2), (0, 0), (0, 1)], items=[(2, 2)], env_id="msh-4x4-0h1s")
    scene.step(STAG, STAG, STAY, STAY)
    assert scene.terminated and not scene.truncated and scene.players == [None, None, (0, 0), (0, 1)]


@pytest.mark.parametrize("first", [1, 7, 29, 30])
def test_countdown(script, first):
    """The first hunt is in step `first`, a second two steps later, a third in the last step, `first` + 5."""
    scene = hunt(script, [(0, 3), (3, 3), (3, 0), (0, 0)], time=first - 1).play_on([HARE, STAY, STAY, STAY], 1)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0] and scene.clock == [first, 5]
    scene.play_on(STILL, 1).play_on([STAY, HARE, STAY, STAY], 1)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0] and scene.clock == [first + 2, 3]
    scene.play_on(STILL, 2).step(STAY, STAY, HARE, STAY)
    assert scene.reward == [0.0, 0.0, 1.0, 0.0] and scene.clock == [first + 5, 0]
    assert scene.state.first_hunt.tolist() == [first]
    assert scene.terminated and not scene.truncated  # by the rule, also where first + 5 is the horizon


@pytest.mark.parametrize("first", [31, 33, 34])
def test_horizon_cuts_the_countdown_short(script, first):
    scene = hunt(script, [(0, 3), (3, 3), (3, 0), (0, 0)], time=first - 1).play_on([HARE, STAY, STAY, STAY], 1)
    assert scene.clock == [first, 35 - first]
    scene.play_on(STILL, 35 - first - 1).step(STAY, HARE, STAY, STAY)
    assert scene.reward == [0.0, 1.0, 0.0, 0.0] and scene.clock == [35, 0]
    assert scene.truncated and not scene.terminated


def test_hunt_in_the_last_step_of_the_horizon(script):
    scene = hunt(script, [(0, 3), (0, 0), (0, 0), (0, 0)], time=34).step(HARE, STAY, STAY, STAY)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0] and scene.truncated and not scene.terminated
    scene = hunt(script, [(0, 3), None, None, None], 34, 34).step(HARE, STAY, STAY, STAY)
    assert scene.reward == [1.0, 0.0, 0.0, 0.0] and scene.terminated and not scene.truncated  # all have left
    scene = hunt(script, [(0, 3)] * 4, 34, 0, [(0, 3)], "msh-4x4-0h1s").step(STAG, STAY, STAG, STAY)
    assert scene.terminated and not scene.truncated  # no prey is left


@pytest.mark.parametrize(
    "env_id, horizon", [("msh", 35), ("msh-4x4-4h1s", 35), ("msh-2x9-2p-1h1s", 35), ("msg", 50), ("msg-3x3-2p-1d", 50)]
)
def test_truncated_at_the_horizon(script, env_id, horizon):
    game = script.GridGame(env_id)
    assert game.horizon == horizon
    state = game.initial_state(3, torch.Generator().manual_seed(0))
    for time in range(1, horizon + 1):
        state, reward, terminated, truncated = game.step(state, torch.full((3, game.num_players), STAY))
        assert truncated.tolist() == [time == horizon] * 3 and not terminated.any() and not reward.any()
        assert game.clock(state).tolist() == [[time, horizon - time]] * 3


def test_lone_player_cannot_hunt_stags(script):
    scene = Scene(script, "msh-2x2-1p-0h2s", [(1, 0)], [(1, 0), (0, 1)]).play_on([STAG], 34).step(STAG)
    assert scene.truncated and not scene.terminated and scene.reward == [0.0] and scene.players == [(1, 0)]


DRIFTS = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2), (0, 1)]


def test_removers_split_the_cost_and_all_are_paid(script):
    for removers in itertools.chain.from_iterable(itertools.combinations(range(4), k) for k in range(1, 5)):
        actions = [REMOVE if player in removers else STAY for player in range(4)]
        scene = Scene(script, "msg-4x4", [(2, 2)] * 4, DRIFTS).step(*actions)
        assert scene.reward == pytest.approx([6 - 4 / len(removers) * (p in removers) for p in range(4)])
        assert scene.items == DRIFTS[:4] + [None, (0, 1)] and scene.players == [(2, 2)] * 4  # nobody leaves
        assert not (scene.terminated or scene.truncated)
        assert scene.clock == [1, 49] and scene.state.first_hunt.tolist() == [0]  # no countdown here


def test_several_drifts_are_paid_and_split_separately(script):
    scene = Scene(script, "msg-4x4", [(1, 1), (0, 3), (1, 1), (2, 3)], DRIFTS).step(*[REMOVE] * 4)
    assert scene.reward == [10.0, 8.0, 10.0, 12.0] and scene.items == [None, None] + DRIFTS[2:]
    scene = Scene(script, "msg-4x4", [(1, 1), (0, 3), (3, 3), (2, 2)], DRIFTS).step(*[REMOVE] * 4)
    assert scene.reward == [20.0] * 4 and scene.items == [None, None, None, (3, 0), None, (0, 1)]


def test_remove_elsewhere_is_stay_and_movers_take_no_part(script):
    scene = Scene(script, "msg-4x4", [(1, 0), (1, 2), (1, 1), (0, 0)], [None] + DRIFTS[1:])
    scene.step(REMOVE, REMOVE, REMOVE, REMOVE)  # the drift of (1, 1) is gone
    assert scene.reward == [0.0] * 4 and scene.players == [(1, 0), (1, 2), (1, 1), (0, 0)]
    assert scene.items == [None] + DRIFTS[1:]
    scene = Scene(script, "msg-4x4", [(1, 0), (1, 1), (1, 1), (0, 0)], DRIFTS).step(RIGHT, REMOVE, UP, STAY)
    assert scene.reward == [6.0, 2.0, 6.0, 6.0] and scene.players == [(1, 1), (1, 1), (0, 1), (0, 0)]


def test_last_drift_terminates_also_at_the_horizon(script):
    for time in (12, 49):
        items = [None, None, (3, 3), None, None, (0, 1)]
        scene = Scene(script, "msg-4x4", [(3, 3), (0, 1), (0, 0), (0, 0)], items, time)
        assert scene.step(REMOVE, REMOVE, STAY, STAY).terminated and not scene.truncated
        assert scene.reward == [8.0, 8.0, 12.0, 12.0]
    scene = Scene(script, "msg-4x4", [(3, 3)] * 4, items, 49).step(REMOVE, STAY, STAY, STAY)
    assert scene.truncated and not scene.terminated and scene.reward == [2.0, 6.0, 6.0, 6.0]


@every_game
def test_numbers_that_are_no_actions_raise(script, env_id):
    game = script.GridGame(env_id)
    state = game.initial_state(3, torch.Generator().manual_seed(0))
    assert game.num_actions == {"msh": 7, "msg": 6}[GAMES[env_id][0]]
    for number in (-1, game.num_actions, 99):
        for place in ((0, 0), (2, game.num_players - 1)):
            actions = torch.full((3, game.num_players), STAY)
            actions[place] = number
            with pytest.raises(ValueError):
                game.step(state, actions)
    state = state._replace(players=torch.full_like(state.players, -1))  # one that has left is no exception
    with pytest.raises(ValueError):
        game.step(state, torch.full((3, game.num_players), game.num_actions))


def test_left_player_has_an_empty_plane_everywhere_and_sees_the_rest(script):
    scene = hunt(script, [(0, 0), None, (2, 2), (0, 1)], 4, 2, [None, (0, 3), (3, 3), None, (2, 2)])
    observation = scene.game.observe(scene.state)[0]
    places = [[[tuple(at) for at in plane.nonzero().tolist()] for plane in view] for view in observation]
    hares = [(0, 3), (2, 2), (3, 3)]
    assert places[0] == [[(0, 0)], [], [(2, 2)], [(0, 1)], [], hares]
    assert places[1] == [[], [(2, 2)], [(0, 1)], [(0, 0)], [], hares]
    assert places[2] == [[(2, 2)], [(0, 1)], [(0, 0)], [], [], hares]
    assert places[3] == [[(0, 1)], [(0, 0)], [], [(2, 2)], [], hares]
    assert observation.unique().tolist() == [0.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# Ids and fixed facts
# ---------------------------------------------------------------------------------------------------------------------
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
    ],
)
def test_ids(script, env_id, height, width, players, item_counts):
    game = script.GridGame(env_id)
    assert (game.height, game.width, game.num_players, list(game.item_counts)) == (height, width, players, item_counts)
    assert game.num_items == sum(item_counts)
    assert tuple(game.obs_shape) == (players + len(item_counts), height, width)
    state = game.initial_state(5, torch.Generator().manual_seed(0))
    assert state.players.shape == (5, players) and state.items.shape == (5, sum(item_counts))
    assert game.observe(state).shape == (5, players, *game.obs_shape)
    assert game.action_mask(state).shape == (5, players, game.num_actions) and game.clock(state).shape == (5, 2)


@pytest.mark.parametrize(
    "short, full", [("msh", "msh-4h1s"), ("msh", "msh-8x8-4p-4h1s"), ("msg", "msg-8x8-4p-6d"), ("msg-2p", "msg-2p-6d")]
)
def test_what_is_left_out_of_an_id_is_the_default(script, short, full):
    a, b = script.GridGame(short), script.GridGame(full)
    first, second = (game.initial_state(20, torch.Generator().manual_seed(3)) for game in (a, b))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(a.observe(first), b.observe(second)) and a.num_actions == b.num_actions
    assert a.horizon == b.horizon and a.best_return == b.best_return


BAD_IDS = """
    garbage ms MSH mshx xmsh msh- msh--4h1s msh_4h1s msh-4h msh-1s msh-h1s msh-1s4h msh-4H1S msh-8 msh-8x msh-8x8x8
    msh-p msh-4 msg-d msg-6 msh-6d msg-4h1s msh-4h1s-8x8 msh-4p-8x8 msh-4h1s-4p msh-4p-4p msh-4h1s-4h1s msg-6d-8x8
    msh-08x8 msh-8x08 msh-04p msh-04h1s msh-4h01s msg-06d msg-00d msh-4h1.0s msh-+4p msh--1p msh-4h-1s
    msh-0x4 msh-4x0 msg-0x4 msh-0p msg-0p msg-0d msh-0h0s msh-4h0s
    msh-2x1-4h1s msh-2x2-4h1s msh-1x1 msg-2x2-5d msg-2x2
""".split()
BAD_IDS += ["", " msh", "msh ", "msh\n", "msh-4h1s\n", "msh-1\u0664p", "msg-1\u0664d"]  # \u0664 is a digit, not ASCII


@pytest.mark.parametrize("env_id", BAD_IDS, ids=repr)
def test_bad_ids_raise_usage_error(script, env_id):
    with pytest.raises(script.UsageError) as error:
        script.GridGame(env_id)
    assert "\n" not in str(error.value) and repr(env_id) in str(error.value)  # one clear line that names the id


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
            groups = Counter(target for target in targets if target >= 0)
            best = max(best, sum(10.0 * (n >= 2) if item < stags else 1.0 for item, n in groups.items()))
        assert script.GridGame(f"msh-{players}p-{hares}h{stags}s").best_return == pytest.approx(best / players)


# ---------------------------------------------------------------------------------------------------------------------
# The batched games against the reference
# ---------------------------------------------------------------------------------------------------------------------
def random_actions(references, rng):
    """Mostly legal, interactions preferred; some blind interactions and some of everything, legal or not."""
    actions = []
    for reference in references:
        actions.append([])
        for player in range(len(reference.players)):
            mask, roll = reference.mask(player), rng.random()
            legal = [a for a, allowed in enumerate(mask) if allowed]
            if roll < 0.15:
                legal = range(len(mask))
            elif roll < 0.3:
                legal = range(5, len(mask))
            elif roll < 0.6 and max(legal) >= 5:
                legal = [a for a in legal if a >= 5]
            actions[-1].append(rng.choice(legal))
    return actions


def test_whole_episodes_agree_with_the_reference(script):
    events = {"msh": Counter(), "msg": Counter()}
    for env_id in GAMES:
        game, rng, batch = script.GridGame(env_id), random.Random(env_id), 24
        state = game.initial_state(batch, torch.Generator().manual_seed(rng.randrange(2**31)))
        references = [reference_of(env_id, state, b) for b in range(batch)]
        live = list(range(batch))
        assert_same_view(game, state, references, live)
        while live:  # games that are over stay in the batch, their outputs are of no account
            actions = random_actions(references, rng)
            state, reward, terminated, truncated = game.step(state, torch.tensor(actions))
            assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
            assert reward.shape == (batch, game.num_players) and terminated.shape == truncated.shape == (batch,)
            expected = {b: references[b].step(actions[b]) for b in live}
            assert_same_view(game, state, references, live)
            for b in live:
                assert reward[b].tolist() == pytest.approx(expected[b][0], abs=1e-5)
                assert (bool(terminated[b]), bool(truncated[b])) == expected[b][1:]
            live = [b for b in live if not any(expected[b][1:])]
        for reference in references:
            events[GAMES[env_id][0]].update(reference.events)
    hunts = [
        "stag by 2",
        "stag by 3",
        "hare by 1",
        "hare by 2",
        "lone stag",
        "several at once",
        "later hunt",
        "illegal",
    ]
    for event in hunts + ["countdown", "all left", "no item left", "truncated"]:
        assert events["msh"][event] > 0, event
    for event in ["drift by 1", "drift by 2", "several at once", "illegal", "no item left", "truncated"]:
        assert events["msg"][event] > 0, event


# ---------------------------------------------------------------------------------------------------------------------
# Invariances, on random states in the middle of a game
# ---------------------------------------------------------------------------------------------------------------------
def random_situations(script, game, batch, seed):
    """Random state with players gathered on items, some left and some items gone; random actions, not all legal."""
    generator = torch.Generator().manual_seed(seed)

    def chance(p, *shape):
        return torch.rand(*shape, generator=generator) < p

    players, items, _, _ = game.initial_state(batch, generator)
    gather = torch.randint(game.num_items, players.shape, generator=generator)
    players = torch.where(chance(0.7, *players.shape), items.gather(1, gather), players)
    items = items.masked_fill(chance(0.2, *items.shape), -1)
    time = torch.randint(1, game.horizon, (batch,), generator=generator)
    first_hunt = torch.zeros_like(time)
    if game.item_names[0] == "stag":
        first_hunt = torch.where(chance(0.5, batch), (time - torch.randint(5, (batch,), generator=generator)), 0)
        first_hunt = first_hunt.clamp(min=0)
        players = players.masked_fill(chance(0.2, *players.shape) & (first_hunt > 0).unsqueeze(1), -1)
    actions = torch.randint(game.num_actions, players.shape, generator=generator)
    interaction = torch.randint(5, game.num_actions, players.shape, generator=generator)
    actions = torch.where(chance(0.6, *players.shape), interaction, actions)
    return script.GameState(players, items, time, first_hunt), actions


def all_outputs(game, state, actions):
    """Everything the game makes of a state and of the state after it."""
    after, reward, terminated, truncated = game.step(state, actions)
    views = [view(s) for s in (state, after) for view in (game.observe, game.action_mask, game.clock)]
    return [*after, reward, terminated, truncated, *views]


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@every_game
@quick
@given(seed=seeds, data=st.data())
def test_relabelling_the_players_changes_nothing_else(script, env_id, seed, data):
    game = script.GridGame(env_id)
    n = game.num_players
    order = data.draw(st.permutations(range(n)))  # new seat k is old seat order[k]
    state, actions = random_situations(script, game, 50, seed)
    after, reward, terminated, truncated = game.step(state, actions)
    relabelled = state._replace(players=state.players[:, order])
    after_2, reward_2, terminated_2, truncated_2 = game.step(relabelled, actions[:, order])
    assert torch.equal(reward_2, reward[:, order]) and torch.equal(after_2.players, after.players[:, order])
    assert_equal([*after_2[1:], terminated_2, truncated_2], [*after[1:], terminated, truncated])
    for old, new in ((state, relabelled), (after, after_2)):
        assert torch.equal(game.action_mask(new), game.action_mask(old)[:, order])
        assert torch.equal(game.clock(new), game.clock(old))
        seen, expected = game.observe(new), game.observe(old)
        for k in range(n):
            planes = [(order[(k + j) % n] - order[k]) % n for j in range(n)] + list(range(n, game.obs_shape[0]))
            assert torch.equal(seen[:, k], expected[:, order[k], planes])


@every_game
@quick
@given(seed=seeds)
def test_a_game_does_not_depend_on_the_rest_of_the_batch(script, env_id, seed):
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 30, seed)
    whole = all_outputs(game, state, actions)
    index = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:7]  # another order, another size
    for rows in (index, index[:1]):
        part = all_outputs(game, script.GameState(*(x[rows] for x in state)), actions[rows])
        assert_equal(part, [x[rows] for x in whole])


@every_game
def test_situations_are_eventful(script, env_id):
    """The invariances above would say little about states in which nothing happens."""
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 2000, 0)
    after, reward, _, _ = game.step(state, actions)
    moved, taken = (after.players != state.players).float().mean(), (after.items != state.items).any(1).float().mean()
    assert moved > 0.05
    if env_id == "msh-2x2-1p-0h2s":  # no hunt can succeed there
        assert taken == 0 and not reward.any()
    else:
        assert taken > 0.03 and (reward != 0).any(1).float().mean() > 0.03


@every_game
def test_pure(script, env_id):
    """No argument is changed, no random number drawn, and the same arguments give the same results."""
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 100, 1)
    before = [x.clone() for x in (*state, actions)]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second = all_outputs(game, state, actions), all_outputs(game, state, actions)
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]
    assert_equal([*state, actions], before)
    assert_equal(first, second)


@every_game
def test_state_fields(script, env_id):
    game = script.GridGame(env_id)
    state, actions = random_situations(script, game, 6, 2)
    for s in (game.initial_state(6), game.step(state, actions)[0]):
        assert type(s) is script.GameState and s._fields == ("players", "items", "time", "first_hunt")
        assert [x.dtype for x in s] == [torch.int64] * 4
        assert [tuple(x.shape) for x in s] == [(6, game.num_players), (6, game.num_items), (6,), (6,)]
    assert game.observe(state).dtype == torch.float32 and game.action_mask(state).dtype == torch.bool
    assert game.clock(state).dtype == torch.int64


def test_rows_and_replaced(script):
    game = script.GridGame("msh-3x3-4h1s")
    a, b = random_situations(script, game, 6, 3)[0], random_situations(script, game, 6, 4)[0]
    which = torch.tensor([True, False, False, True, True, False])
    assert_equal(a.rows(which), [x[[0, 3, 4]] for x in a])
    assert_equal(a.rows(torch.tensor([5, 0, 0])), [x[[5, 0, 0]] for x in a])
    mixed = a.replaced(which, b)
    for k in range(6):
        assert_equal([x[k] for x in mixed], [x[k] for x in (b if which[k] else a)])


# ---------------------------------------------------------------------------------------------------------------------
# Resets
# ---------------------------------------------------------------------------------------------------------------------
def chi_square(*columns, sizes):
    """Chi-square of the joint counts of integer columns against uniform, in standard deviations above its mean."""
    joint = np.ravel_multi_index([c.numpy() for c in columns], sizes)
    counts = np.bincount(joint, minlength=int(np.prod(sizes)))
    freedom = len(counts) - 1
    return (((counts - counts.mean()) ** 2 / counts.mean()).sum() - freedom) / (2 * freedom) ** 0.5


def test_initial_state_is_uniform(script):
    game, batch = script.GridGame("msh-2x3-3p-1h1s"), 36000
    state = game.initial_state(batch, torch.Generator().manual_seed(0))
    assert state.time.tolist() == state.first_hunt.tolist() == [0] * batch
    for cells in (state.players, state.items):
        assert cells.min() == 0 and cells.max() == 5
    stag, hare = state.items.unbind(1)
    assert (stag != hare).all()
    other = hare - (hare > stag).long()  # the hare's place among the five cells that the stag leaves
    players = state.players.unbind(1)
    assert chi_square(*players, stag, other, sizes=(6, 6, 6, 6, 5)) < 5  # all at once: uniform and independent
    assert chi_square(*players, sizes=(6, 6, 6)) < 5 and chi_square(stag, other, sizes=(6, 5)) < 5
    for cells, sizes in ((players[0], (6, 6)), (stag, (6, 6))):  # and from one game of the batch to the next
        assert chi_square(cells[:-1], cells[1:], sizes=sizes) < 5
    assert (players[0] == players[1]).any() and (players[0] == stag).any()


@pytest.mark.parametrize("env_id", ["msh-2x4-4h4s", "msg-2x4-8d", "msg-3x3-6d"])
def test_items_are_on_distinct_cells(script, env_id):
    game = script.GridGame(env_id)
    items = game.initial_state(500, torch.Generator().manual_seed(0)).items
    assert all(len(set(row)) == game.num_items and set(row) <= set(range(game.num_cells)) for row in items.tolist())
    assert len(set(map(tuple, items.tolist()))) > 100


def test_initial_state_draws_from_its_generator_alone(script):
    game = script.GridGame("msh")
    before = torch.get_rng_state()
    first, second, other = (game.initial_state(9, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(first, second)
    assert not torch.equal(first.players, other.players) and not torch.equal(first.items, other.items)
    generator = torch.Generator().manual_seed(7)
    a, b = game.initial_state(9, generator), game.initial_state(9, generator)
    assert_equal(a, first)
    assert not torch.equal(a.players, b.players) and not torch.equal(a.items, b.items)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["msh-3x3-4h1s"])
def test_compiled_step_is_the_step(script, env_id):
    game = script.GridGame(env_id)
    compiled = torch.compile(game.step, fullgraph=True)
    for seed in range(3):
        state, actions = random_situations(script, game, 300, seed)
        (after, *rest), (after_2, *rest_2) = game.step(state, actions), compiled(state, actions)
        assert_equal([*after_2, rest_2[1], rest_2[2]], [*after, rest[1], rest[2]])
        torch.testing.assert_close(rest_2[0], rest[0], rtol=1e-6, atol=1e-6)

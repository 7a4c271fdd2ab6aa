"""Scripted co-players, the dealing of seats, agents and callables as co-players.

Cells are (row, column) here, and None for a player that has left or an item that is gone."""

import itertools
import math
from collections import Counter

import pytest
import torch

from run_tools import generator_of

pytestmark = pytest.mark.only("hop_onestep")

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
MSH = "msh-4x4-4h1s"
MSG = "msg-4x4-5d"
PREY = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2)]  # the stag, four hares; or five drifts
ONLY_STAG = [(1, 1), None, None, None, None]
NOISE = 0.2
BAD = {  # what is no action of `r` rows
    "long": lambda r: torch.zeros(r + 1, dtype=torch.int64),
    "scalar": lambda r: torch.zeros((), dtype=torch.int64),
    "list": lambda r: [0] * r,
    "above": lambda r: torch.full((r,), 7),
    "float": lambda r: torch.zeros(r),
}


def scene(game, place, items, batch):
    """`batch` times one game, every player on the cell `place`."""
    cells = [-1 if cell is None else cell[0] * game.width + cell[1] for cell in (place, *items)]
    players = torch.full((batch, game.num_players), cells[0])
    zeros = torch.zeros(batch, dtype=torch.int64)
    return game.state_type(players, torch.tensor(cells[1:]).expand(batch, -1), zeros + 3, zeros)


def crowd(script, name, env_id=MSH, batch=2000):
    """Many games in which one kind plays every seat but the learner's, the first."""
    game = script.GridGame(env_id)
    players = script.CoPlayers(game, [name], batch, 3, generator_of(0))
    players.kind = (torch.arange(game.num_players) > 0).long().expand(batch, -1)
    return players


def act(players, place, items=PREY):
    """Actions [B, N] when all stand on `place`."""
    state = scene(players.game, place, items, len(players.kind))
    return players.act(state, players.game.action_mask(state))


def assert_shares(rows, shares):
    """Rows of an integer tensor are those of `shares`, {row: probability}, and as frequent."""
    count = Counter(tuple(row) if isinstance(row, list) else row for row in rows.tolist())
    assert set(count) == set(shares)
    for row, share in shares.items():
        deviation = math.sqrt(len(rows) * share * (1 - share))
        assert abs(count[row] - share * len(rows)) <= 5 * deviation + 1e-6, row


def even(*actions):
    return dict.fromkeys(actions, 1 / len(actions))


def noisy(shares, *legal):
    """The shares of a kind with noise: uniform over the `legal` actions one time in five."""
    return {a: (1 - NOISE) * shares.get(a, 0.0) + NOISE / len(legal) for a in legal}


ADDED = {"hs": (2, 1), "walker": (-1, -1)}  # kinds that a user adds to the table
CORNER = [UP, LEFT, STAY, HARE]  # what is legal on the hare at (3, 3)
CHOICES = [
    (MSH, "ns", (3, 3), PREY, even(UP, LEFT)),  # on a hare, but a stag is left
    (MSH, "ns", (1, 1), PREY, even(STAG)),
    (MSH, "ns", (3, 2), [None, *PREY[1:]], even(RIGHT, UP)),  # as nh
    (MSH, "nh", (1, 1), PREY, even(DOWN, RIGHT)),  # on the stag
    (MSH, "nh", (1, 1), ONLY_STAG, even(STAY)),
    (MSH, "random", (1, 2), PREY, even(UP, DOWN, LEFT, RIGHT, STAY)),
    (MSH, "nh-noisy", (3, 3), PREY, noisy(even(HARE), *CORNER)),
    (MSH, "ns-noisy", None, PREY, even(STAY)),  # who has left
    (MSH, "hs", (1, 1), PREY, even(DOWN, RIGHT)),  # on the stag, but hares are left
    (MSH, "walker", (3, 3), PREY, even(UP, LEFT, STAY)),
    (MSG, "cleaner", (2, 2), PREY, even(REMOVE)),
    # ties are uniform over targets, not over moves: three of the four lead up
    (MSG, "cleaner", (3, 0), [(1, 0), (2, 1), (0, 0), (0, 3), None], {UP: 3 / 4, RIGHT: 1 / 4}),
    (MSG, "exploiter", (2, 2), PREY, even(UP, DOWN, LEFT, RIGHT, STAY)),  # on a drift
    (MSG, "exploiter-noisy", (1, 1), PREY, noisy(even(*range(5)), *range(6))),
]


@pytest.mark.parametrize("env_id, name, place, items, shares", CHOICES)
def test_choices(script, monkeypatch, env_id, name, place, items, shares):
    monkeypatch.setitem(script.SCRIPTED, "msh", {**script.SCRIPTED["msh"], **ADDED})
    assert_shares(act(crowd(script, name, env_id), place, items)[:, 1:].flatten(), shares)


@pytest.mark.parametrize("env_id", ["msh-5x4-5p-3h2s", "msg-3x5-3p-4d"])
def test_every_seat_of_every_game_plays_its_own_kind(script, env_id):
    """Scattered players go to, or take, a nearest item of the kind that they prefer."""
    game = script.GridGame(env_id)
    pool = ["ns", "nh"] if game.family == "msh" else ["cleaner"]
    players = script.CoPlayers(game, pool, 200, 1, generator_of(0))
    state = game.start(200, generator_of(1))
    state.items[:100, 0] = -1
    actions = players.act(state, game.action_mask(state))
    for b, seat in (players.kind != 0).nonzero().tolist():
        kind = players.names[players.kind[b, seat]]
        wanted = {"ns": slice(2), "nh": slice(2, None), "cleaner": slice(None)}[kind]
        distance = game.distance[:, state.items[b, wanted]].amin(1)
        cell, action = state.players[b, seat], actions[b, seat]
        if distance[cell] == 0:
            assert action == (HARE if kind == "nh" else STAG)  # or REMOVE
        else:
            assert distance[game.next_cell[cell, action]] == distance[cell] - 1


def test_each_player_draws_its_own_target_and_noise(script):
    """Two hares equally far, all on one cell: eight ways of three players, all as frequent. On a
    corner's hare everyone does something else with a probability of 0.15."""
    rows = act(crowd(script, "nh", "msh-1x5-4p-2h1s"), (0, 2), [(0, 2), (0, 0), (0, 4)])
    assert_shares(rows[:, 1:], even(*itertools.product((LEFT, RIGHT), repeat=3)))
    missed = (act(crowd(script, "nh-noisy", batch=6000), (3, 3))[:, 1:] != HARE).sum(1)
    assert_shares(missed, {k: math.comb(3, k) * 0.15**k * 0.85 ** (3 - k) for k in range(4)})


def test_a_target_is_kept_until_it_is_gone_or_the_game_begins_anew(script):
    """Both targets lie in one row; the players are put elsewhere between the steps."""
    stag = (0, 8)
    items = [stag, (0, 1), (0, 7)]
    players = crowd(script, "nh", "msh-1x9-2p-2h1s", batch=50)

    def assert_moves(column, action, items=items):
        assert (act(players, (0, column), items)[:, 1] == action).all()
        players.advance(torch.zeros(50).bool())

    assert_moves(3, LEFT)
    assert_moves(6, LEFT)  # the other is nearer now
    assert_moves(7, LEFT)  # on the other
    assert_moves(3, RIGHT, [stag, None, (0, 7)])
    assert_moves(2, RIGHT)  # the new one is kept as well
    players.advance(torch.ones(50).bool())
    assert_moves(2, LEFT)


def test_oracle_goals_tell_the_kinds_apart(script, monkeypatch):
    """Also one that a user adds, and the learner from all of them."""
    monkeypatch.setitem(script.SCRIPTED, "msh", {**script.SCRIPTED["msh"], "hs": (2, 1)})
    game = script.GridGame(MSH)
    players = script.CoPlayers(game, ["nh", "nh-noisy", "hs"], 50, 1, generator_of(0), fixed=True)
    act(players, (2, 2))
    oracle = game.oracle(scene(game, (2, 2), PREY, 50), *players.scripted())
    assert oracle.shape == (50, 4, game.oracle_size)
    rows = [oracle[players.kind == kind].unique(dim=0) for kind in range(4)]
    assert [len(row) for row in rows] == [1] * 4
    assert len(torch.cat(rows).unique(dim=0)) == 4
    assert rows[0].sum() == rows[0][0, len(game.kinds)] == 1.0  # behind the scripted kinds


def test_fixed_co_players_play_every_match_at_seats_dealt_uniformly(script):
    game = script.GridGame(MSH)
    pool = ["ns", "random-noisy", "nh"]
    players = script.CoPlayers(game, pool, 6000, 1, generator_of(0), fixed=True)
    before = players.kind
    assert players.advance(torch.ones(6000).bool()).all()
    orders = even(*itertools.permutations(range(4)))
    assert_shares(before, orders)
    assert_shares(players.kind[(before == torch.arange(4)).all(1)], orders)  # whatever was before
    assert torch.equal(players.kind == 0, torch.arange(4) == players.focal.unsqueeze(1))


def test_half_of_the_matches_have_one_kind_of_co_player(script):
    """Each kind as often as it is named; the learner is at one seat at least, any."""
    game = script.GridGame(MSH)
    players = script.CoPlayers(game, ["nh", "self", "nh"], 8000, 1, generator_of(0))
    assert (players.kind.gather(1, players.focal.unsqueeze(1)) == 0).all()
    assert_shares(players.focal, even(*range(4)))
    share = [1 / 3, 2 / 3]
    ways = {}
    for way in itertools.product((0, 1), repeat=3):
        alike = share[way[0]] if len(set(way)) == 1 else 0.0
        ways[way] = 0.5 * math.prod(share[kind] for kind in way) + 0.5 * alike
    assert_shares(players.kind.gather(1, game.others[players.focal]), ways)


class Noting:
    """Stands for a Player: plays one action everywhere, and notes what it is told."""

    def __init__(self, action):
        self.action = action

    def act(self, state, mask, seats, players):
        self.told = [seats]
        return {"action": torch.full(seats.shape, self.action)}

    def remember(self, actions):
        self.told.append(actions)

    def forget(self, ended, match_ended):
        self.told += [ended, match_ended]


def test_agents_play_their_seats_and_remember_what_all_played(script):
    """The learner, agent 0, at its own seats as the others at theirs."""
    players = script.CoPlayers(script.GridGame(MSH), ["self", "ns", "nh"], 12, 2, generator_of(5))
    agents = {0: Noting(UP), 2: Noting(DOWN)}
    players.agents.update(agents)
    for ended in (torch.arange(12) < 6, torch.arange(12) % 2 == 0):
        kind = players.kind
        assert set(kind.flatten().tolist()) == {0, 1, 2}
        actions = act(players, (2, 2))
        assert (actions[kind == 0] == UP).all() and (actions[kind == 2] == DOWN).all()
        match_ended = players.advance(ended)
        for number, agent in agents.items():
            told = [kind == number, actions, ended, match_ended]
            assert all(map(torch.equal, agent.told, told))


class Walker:
    """Acts by its own cell, as it sees it; notes what it is shown; strikes out what it is given."""

    def __init__(self):
        self.seen = []
        self.started = []

    def start_match(self, which):
        self.started.append(which.clone())

    def __call__(self, observation, action_mask, clock, generator):
        self.seen.append([observation.clone(), action_mask.clone(), clock.clone(), generator])
        chosen = observation[:, 0].flatten(1).argmax(1) % 5
        for given in (observation, action_mask, clock):
            given.zero_()
        return chosen


def callables(script, pool, fixed=True):
    """Game, generator and co-players of twelve games."""
    game, generator = script.GridGame("msh-4x4-3p-3h1s"), generator_of(5)
    return game, generator, script.CoPlayers(game, pool, 12, 2, generator, fixed=fixed)


def test_a_callable_sees_a_row_for_each_seat_and_plays_its_own(script):
    """An illegal action is STAY; what it does to its arguments stays with it; it is told of the
    seats at which its matches start. These are so many episodes in one seating; every game counts
    for itself. It is a copy, so that two runs do not share what it remembers."""
    own = Walker()
    game, generator, players = callables(script, ["self", own, "random"], fixed=False)
    ((kind, walker),) = players.callables.items()
    over = torch.ones(12).bool()
    count = torch.zeros(12, dtype=torch.int64)
    illegal = 0
    changed = []
    for _ in range(40):
        assert torch.equal(players.episode, count)
        starts = over.unsqueeze(1) & (players.kind == kind)
        assert torch.equal(torch.stack(walker.started).sum(0).bool(), starts.flatten())
        walker.started = [torch.zeros(36).bool()]
        state = game.start(12, generator)._replace(time=torch.arange(12))
        mask = game.action_mask(state)
        before = [field.clone() for field in (*state, mask)]
        actions = players.act(state, mask)
        assert all(map(torch.equal, (*state, mask), before))
        observation, action_mask, clock, drawn_from = walker.seen[-1]
        assert drawn_from is generator
        assert torch.equal(observation, game.observe(state).flatten(0, 1))
        assert torch.equal(action_mask, mask.flatten(0, 1))
        assert torch.equal(clock.unflatten(0, (12, 3)), game.clock(state)[:, None].expand(12, 3, 2))
        asked = state.players % 5
        legal = mask.gather(2, asked[:, :, None])[:, :, 0]
        seats = players.kind == kind
        assert torch.equal(actions[seats], torch.where(legal, asked, STAY)[seats])
        illegal += int((seats & ~legal).sum())
        seated = players.kind.clone()
        ended = torch.rand(12, generator=generator) < 0.3
        over = players.advance(ended)
        count += ended
        assert torch.equal(over, count == 2)
        count[over] = 0
        other = (players.kind != seated).any(1)
        assert not (other & ~over).any()
        changed += other[over].tolist()
    assert not own.seen and illegal > 10 and sum(changed) > 0.7 * len(changed) > 20


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_what_is_no_action_raises_a_usage_error(script, value):
    def player(observation, action_mask, clock, generator):
        return value(len(observation))

    *_, players = callables(script, [player] * 2)
    with pytest.raises(script.UsageError, match="'player'"):
        act(players, (0, 2), PREY[:4])


def test_names_of_co_players(script, tmp_path):
    """Modules of the working directory are found; what is no co-player is named in one line."""
    text = "def right(observation, action_mask, *others):\n    return action_mask[:, 0] * 0 + 3\n"
    (tmp_path / "friends_of_tests.py").write_text(text)
    *_, players = callables(script, ["friends_of_tests:right"] * 2)
    assert (act(players, (0, 2), PREY[:4])[players.kind == 1] == RIGHT).all()
    wrong = ["", "NS", "-noisy", "cleaner", "self-noisy", "no/such.pt", ":x", "no_such_module:x"]
    for name in [*wrong, "friends_of_tests:nobody"]:
        with pytest.raises(script.UsageError) as error:
            callables(script, ["ns", name])
        assert "\n" not in str(error.value) and repr(name) in str(error.value)

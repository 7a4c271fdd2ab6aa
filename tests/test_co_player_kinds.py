"""Scripted co-players against a slow reference, the dealing of seats, and callables.

Cells are (row, column) in this file, and None for a player that has left or an item that is gone.
"""

import itertools
import math
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.only("hop_onestep")

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1), STAY: (0, 0)}
MSH = "msh-4x4-4h1s"
MSG = "msg-4x4-5d"
PREY = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2)]  # the stag, four hares; or five drifts
PREFERENCES = {
    "ns": ["stag", "hare"],
    "nh": ["hare"],
    "cleaner": ["drift"],
    "hs": ["hare", "stag"],  # a kind that the tests add
}
NOISE = 0.2


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def number_of(place, width):
    return -1 if place is None else place[0] * width + place[1]


def scene(script, game, place, items, batch):
    """`batch` times one game, every player on the cell `place`."""
    players = torch.full((batch, game.num_players), number_of(place, game.width))
    cells = torch.tensor([number_of(item, game.width) for item in items]).expand(batch, -1)
    zeros = torch.zeros(batch, dtype=torch.int64)
    return script.GridState(players, cells, zeros + 3, zeros)


class Crowd:
    """Many games in which every seat but the learner's is played by one kind."""

    def __init__(self, script, name, env_id=MSH, batch=2000, seed=0):
        self.script = script
        self.game = script.GridGame(env_id)
        self.batch = batch
        pool = [name] * (self.game.num_players - 1)
        self.players = script.CoPlayers(self.game, pool, batch, 3, generator_of(seed), fixed=True)
        self.others = self.players.kind != 0

    def act(self, place, items=PREY):
        """int64 [R]: what the co-players play when all stand on `place`."""
        self.others = self.players.kind != 0
        state = scene(self.script, self.game, place, items, self.batch)
        self.actions = self.players.act(state, self.game.action_mask(state))
        return self.actions[self.others]

    def observe(self, ended=False):
        return self.players.observe(torch.full((self.batch,), ended))


def assert_shares(actions, shares):
    """The actions [R] are those of `shares`, {action: probability}, and as frequent as that."""
    count = Counter(actions.tolist())
    total = len(actions)
    assert set(count) == set(shares)
    for action, share in shares.items():
        deviation = math.sqrt(total * share * (1 - share))
        assert abs(count[action] - share * total) <= 5 * deviation + 1e-6


def assert_frequencies(rows, probabilities):
    """Rows of an integer tensor [R, ..] have these probabilities {row: probability}."""
    count = Counter(map(tuple, rows.tolist()))
    assert set(count) <= set(probabilities)
    for row, p in probabilities.items():
        assert abs(count[row] - p * len(rows)) <= 5 * math.sqrt(len(rows) * p * (1 - p))


def even(*actions):
    return dict.fromkeys(actions, 1 / len(actions))


def noisy(shares, legal):
    """The shares of a kind with noise: uniform over the `legal` actions one time in five."""
    return {a: (1 - NOISE) * shares.get(a, 0.0) + NOISE / len(legal) for a in legal}


@pytest.fixture
def hare_then_stag(script, monkeypatch):
    """A kind added to the table of scripted kinds, as a user would."""
    monkeypatch.setitem(script.SCRIPTED["msh"], "hs", (2, 1))


# ------------------------------------------------------------------------------------------------
# Scripted choices in hand-made scenes
# ------------------------------------------------------------------------------------------------
def test_kinds(script):
    kinds = {family: list(table) for family, table in script.SCRIPTED.items()}
    assert kinds == {"msh": ["ns", "nh", "random"], "msg": ["cleaner", "exploiter", "random"]}
    for family, names in kinds.items():
        default = script.GridGame(family).defaults["co_players"].split(",")
        assert default == ["self", *names, f"{names[0]}-noisy", f"{names[1]}-noisy"]


ON_STAG = [UP, DOWN, LEFT, RIGHT, STAY, STAG]
ON_HARE = [UP, DOWN, LEFT, RIGHT, STAY, HARE]
ON_CORNER_HARE = [UP, LEFT, STAY, HARE]
ONLY_STAG = [(1, 1), None, None, None, None]


@pytest.mark.parametrize(
    "name, place, items, shares",
    [
        ("ns", (1, 0), PREY, even(RIGHT)),
        ("ns", (3, 3), PREY, even(UP, LEFT)),  # on a hare, but a stag is left
        ("ns", (0, 2), PREY, even(DOWN, LEFT)),  # beside a hare
        ("ns", (1, 1), PREY, even(STAG)),
        ("ns", (3, 2), [None, *PREY[1:]], even(RIGHT, UP)),  # as nh
        ("ns", (2, 2), [None, *PREY[1:]], even(HARE)),
        ("ns", (1, 1), ONLY_STAG, even(STAG)),
        ("nh", (1, 1), PREY, even(DOWN, RIGHT)),  # on the stag
        ("nh", (0, 3), PREY, even(HARE)),
        ("nh", (0, 0), PREY, even(DOWN, RIGHT)),
        ("nh", (1, 2), ONLY_STAG, even(STAY)),
        ("nh", (1, 1), ONLY_STAG, even(STAY)),
        ("random", (1, 2), PREY, even(UP, DOWN, LEFT, RIGHT, STAY)),
        ("random", (1, 1), PREY, even(*ON_STAG)),
        ("random", (3, 3), PREY, even(*ON_CORNER_HARE)),
        ("random-noisy", (3, 0), PREY, even(UP, RIGHT, STAY, HARE)),
        ("ns-noisy", (1, 1), PREY, noisy(even(STAG), ON_STAG)),
        ("ns-noisy", (2, 2), PREY, noisy(even(UP, LEFT), ON_HARE)),
        ("nh-noisy", (3, 3), PREY, noisy(even(HARE), ON_CORNER_HARE)),
        ("nh-noisy", (1, 1), ONLY_STAG, noisy(even(STAY), ON_STAG)),
    ],
)
def test_choices_in_the_stag_hunt(script, name, place, items, shares):
    assert_shares(Crowd(script, name).act(place, items), shares)


@pytest.mark.parametrize(
    "name, place, items, shares",
    [
        ("hs", (0, 3), PREY, even(HARE)),
        ("hs", (1, 1), PREY, even(DOWN, RIGHT)),  # on the stag, but hares are left
        ("hs", (3, 1), ONLY_STAG, even(UP)),
        ("hs", (1, 1), ONLY_STAG, even(STAG)),
        ("hs-noisy", (1, 1), ONLY_STAG, noisy(even(STAG), ON_STAG)),
    ],
)
def test_an_added_kind_plays_as_told(script, hare_then_stag, name, place, items, shares):
    assert_shares(Crowd(script, name).act(place, items), shares)


@pytest.mark.parametrize(
    "ranks, place, shares",
    [
        ((-1, -1), (3, 3), even(UP, LEFT, STAY)),
        ((0, 0), (3, 3), even(*ON_CORNER_HARE)),
        ((1, 0), (3, 3), even(UP, LEFT)),
    ],
)
def test_an_added_kind_that_walks_or_seeks_one_item(script, monkeypatch, ranks, place, shares):
    monkeypatch.setitem(script.SCRIPTED["msh"], "new", ranks)
    assert_shares(Crowd(script, "new").act(place), shares)
    others = Crowd(script, "nh").act((0, 3))  # the kinds before it play as they did
    assert_shares(others, even(HARE))


def test_an_added_kind_has_a_goal_of_its_own(script, hare_then_stag):
    """What `--goal oracle` is told tells it from the other kinds."""
    game = script.GridGame(MSH)
    players = script.CoPlayers(game, ["ns", "nh", "hs"], 50, 1, generator_of(0), fixed=True)
    state = scene(script, game, (2, 2), PREY, 50)
    players.act(state, game.action_mask(state))
    oracle = game.oracle(state, *players.scripted())
    assert oracle.shape == (50, 4, game.oracle_size)
    rows = {}
    for name, kind in zip(players.names, range(4), strict=True):
        rows[name] = oracle[players.kind == kind].unique(dim=0)
        assert len(rows[name]) == 1 or name == "ns"
    assert not torch.equal(rows["hs"], rows["nh"])
    nobody = torch.zeros(game.oracle_size)
    nobody[len(game.kinds)] = 1.0  # behind the scripted kinds
    assert torch.equal(rows["self"][0], nobody)
    different = torch.cat(list(rows.values()))
    assert len(different.unique(dim=0)) == len(different)


@pytest.mark.parametrize(
    "name, place, items, shares",
    [
        ("cleaner", (3, 0), [(1, 0), (2, 1), (0, 0), (0, 3), None], {UP: 3 / 4, RIGHT: 1 / 4}),
        ("cleaner", (0, 2), PREY, even(RIGHT)),
        ("cleaner", (2, 2), PREY, even(REMOVE)),
        ("cleaner", (0, 0), [None, None, (3, 3), None, None], even(DOWN, RIGHT)),
        ("exploiter", (2, 2), PREY, even(UP, DOWN, LEFT, RIGHT, STAY)),  # on a drift
        ("exploiter", (0, 3), PREY, even(DOWN, LEFT, STAY)),
        ("random", (3, 3), PREY, even(UP, LEFT, STAY, REMOVE)),
        ("cleaner-noisy", (3, 3), PREY, noisy(even(REMOVE), [UP, LEFT, STAY, REMOVE])),
        ("exploiter-noisy", (1, 1), PREY, noisy(even(*range(5)), range(6))),
    ],
)
def test_choices_in_the_snowdrift_game(script, name, place, items, shares):
    assert_shares(Crowd(script, name, MSG).act(place, items), shares)


@pytest.mark.parametrize("name, env_id", [("nh", "msh-4x4-3h1s"), ("cleaner", "msg-4x4-4d")])
def test_ties_are_uniform_over_targets_and_not_over_moves(script, name, env_id):
    """One target lies straight to the right, one diagonal: RIGHT in 1/2 + 1/2 * 1/2 of choices."""
    crowd = Crowd(script, name, env_id)
    items = [(3, 3), (0, 2), (1, 1), (3, 2)]
    assert_shares(crowd.act((0, 0), items), {RIGHT: 3 / 4, DOWN: 1 / 4})
    around = [(0, 1), (2, 1), (1, 2)]
    if name == "nh":
        assert_shares(Crowd(script, name, env_id).act((1, 1), [(3, 3), *around]), even(0, 1, 3))
    else:
        assert_shares(Crowd(script, name, env_id).act((1, 1), [(1, 0), *around]), even(0, 1, 2, 3))


def test_each_player_draws_its_own_target(script):
    """Two hares equally far, all on one cell: eight ways of three players, all as frequent."""
    crowd = Crowd(script, "nh", "msh-1x5-4p-2h1s", batch=4000)
    rows = crowd.act((0, 2), [(0, 2), (0, 0), (0, 4)]).view(-1, 3)
    ways = itertools.product((LEFT, RIGHT), repeat=3)
    assert_frequencies(rows, dict.fromkeys(ways, 1 / 8))


@pytest.mark.parametrize(
    "name, env_id",
    [("nh", "msh-1x9-2p-2h1s"), ("cleaner", "msg-1x9-2p-3d"), ("ns", "msh-1x9-2p-1h2s")],
)
def test_a_target_is_kept_until_it_is_gone_or_the_game_begins_anew(script, name, env_id):
    """Both targets lie in one row; the players are put elsewhere between the steps."""
    near = (0, 1)
    other = (0, 7)
    far = (0, 8)
    items = {
        "nh": [far, near, other],
        "cleaner": [near, other, None],
        "ns": [near, other, far],
    }[name]
    crowd = Crowd(script, name, env_id, batch=50)
    assert_shares(crowd.act((0, 3), items), even(LEFT))
    crowd.observe()
    assert_shares(crowd.act((0, 6), items), even(LEFT))  # the other is nearer now
    crowd.observe()
    assert_shares(crowd.act((0, 7), items), even(LEFT))  # on the other
    crowd.observe()
    gone = [None if item == near else item for item in items]
    assert_shares(crowd.act((0, 3), gone), even(RIGHT))
    crowd.observe()
    assert_shares(crowd.act((0, 2), items), even(RIGHT))  # the new one is kept as well
    crowd.observe(ended=True)
    assert_shares(crowd.act((0, 2), items), even(LEFT))
    crowd.observe()
    assert not crowd.observe(ended=True).any()
    assert_shares(crowd.act((0, 6), items), even(RIGHT))
    assert crowd.observe(ended=True).all()  # the third episode, and so the match
    assert_shares(crowd.act((0, 3), items), even(LEFT))


def test_a_target_is_drawn_before_the_noise(script):
    """Noisy players that are put beside the other hare still walk to the first, mostly."""
    crowd = Crowd(script, "nh-noisy", "msh-1x9-2p-2h1s")
    items = [(0, 4), (0, 1), (0, 7)]
    crowd.act((0, 3), items)
    crowd.observe()
    assert_shares(crowd.act((0, 6), items), noisy(even(LEFT), [LEFT, RIGHT, STAY]))


def test_noise_is_drawn_by_each_player_for_itself(script):
    """Two of three on a corner's hare do something else in 3 * 0.15 ** 2 * 0.85 of the games."""
    crowd = Crowd(script, "nh-noisy", batch=6000)
    missed = (crowd.act((3, 3)) != HARE).view(-1, 3).sum(1, keepdim=True)
    shares = {}
    for k in range(4):
        shares[(k,)] = math.comb(3, k) * 0.15**k * 0.85 ** (3 - k)
    assert_frequencies(missed, shares)


STEMS = {MSH: ["ns", "nh", "random", "hs"], MSG: ["cleaner", "exploiter", "random"]}


@pytest.mark.parametrize("end", ["", "-noisy"])
@pytest.mark.parametrize("env_id", [MSH, MSG])
def test_who_has_left_stays(script, hare_then_stag, env_id, end):
    for stem in STEMS[env_id]:
        crowd = Crowd(script, stem + end, env_id, batch=300)
        assert_shares(crowd.act(None), even(STAY))


# ------------------------------------------------------------------------------------------------
# Whole matches against a reference
# ------------------------------------------------------------------------------------------------
class Reference:
    """One scripted player: what it may do, by the rules. `targets` are the numbers of the items
    that it may be walking to, by what it did so far; empty before it has one."""

    def __init__(self, name, kinds):
        self.name = name
        self.kinds = kinds
        self.targets = set()

    def wanted(self, items):
        """Numbers of the items of the kind that it prefers among those left."""
        for kind in PREFERENCES.get(self.name, []):
            numbers = [m for m, item in enumerate(items) if item is not None]
            found = [m for m in numbers if self.kinds[m] == kind]
            if found:
                return found
        return []

    def targets_now(self, place, items):
        wanted = self.wanted(items)
        if not wanted:
            return {None}
        distance = {}
        for m in wanted:
            distance[m] = abs(place[0] - items[m][0]) + abs(place[1] - items[m][1])
        nearest = {m for m in wanted if distance[m] == min(distance.values())}
        now = {m for m in self.targets if m in wanted}
        if now != self.targets or not now:
            now |= nearest
        return now

    def choices(self, place, items, target, legal):
        """The actions between which it draws, with `target` its target."""
        if self.name == "random":
            return legal
        if self.name == "exploiter":
            return legal - {REMOVE}
        if target is None:
            return {STAY}
        goal = items[target]
        if place == goal:
            return {{"stag": STAG, "hare": HARE, "drift": REMOVE}[self.kinds[target]]}
        distance = {}
        for action, (row, column) in OFFSETS.items():
            away = abs(place[0] + row - goal[0]) + abs(place[1] + column - goal[1])
            distance[action] = away
        return {a for a in OFFSETS if a in legal and distance[a] < distance[STAY]}

    def check(self, place, items, legal, action):
        """Asserts that `action` is one of its choices, and takes in what it tells of the target."""
        consistent = set()
        for target in self.targets_now(place, items):
            if action in self.choices(place, items, target, legal):
                consistent.add(target)
        assert consistent, (self.name, place, items, action)
        self.targets = consistent - {None}


@pytest.mark.parametrize(
    "env_id, pool, busy",
    [
        ("msh-5x4-5p-3h2s", "ns,nh,random,hs", ["ns", "nh", "hs"]),
        ("msg-3x5-3p-4d", "cleaner,exploiter,random", ["cleaner"]),
    ],
)
def test_whole_matches_follow_the_rules(script, hare_then_stag, env_id, pool, busy):
    """Every co-player's every action of several matches; the learner stays where it is."""
    game = script.GridGame(env_id)
    batch = 8
    generator = generator_of(4)
    players = script.CoPlayers(game, pool.split(","), batch, 2, generator)
    state = game.start(batch, generator)
    kinds = ["drift"] * game.num_items
    if game.family == "msh":
        kinds = ["stag"] * 2 + ["hare"] * 3
    seen = Counter()
    matches = 0
    members = {}
    for _ in range(150):
        mask = game.action_mask(state)
        actions = players.act(state, mask)
        for b, seat in itertools.product(range(batch), range(game.num_players)):
            name = players.names[players.kind[b, seat]]
            action = int(actions[b, seat])
            cell = int(state.players[b, seat])
            if name == "self":
                continue
            member = members.setdefault((b, seat), Reference(name, kinds))
            assert member.name == name  # within a match a seat keeps its kind
            if cell < 0:
                assert action == STAY
                continue
            items = [None if c < 0 else divmod(c, game.width) for c in state.items[b].tolist()]
            legal = set(mask[b, seat].nonzero().flatten().tolist())
            member.check(divmod(cell, game.width), items, legal, action)
            seen[name, action] += 1
        learner = players.kind == 0
        actions = torch.where(learner, STAY, actions)
        state, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        match_ended = players.observe(ended)
        for b, seat in list(members):
            if match_ended[b]:
                del members[b, seat]
            elif ended[b]:
                members[b, seat].targets = set()
        matches += int(match_ended.sum())
        state = game.restart(state, ended, generator)
    assert matches >= 8
    for name in busy:
        assert min(seen[name, action] for action in (UP, DOWN, LEFT, RIGHT)) > 0
        assert max(seen[name, action] for action in range(5, game.num_actions)) > 0


# ------------------------------------------------------------------------------------------------
# Dealing
# ------------------------------------------------------------------------------------------------
def test_seats_are_dealt_uniformly_and_fixed_co_players_play_every_match(script):
    game = script.GridGame(MSH)
    batch = 6000
    pool = ["ns", "random-noisy", "nh"]
    players = script.CoPlayers(game, pool, batch, 1, generator_of(0), fixed=True)
    assert players.names == ["self", *pool]
    orders = dict.fromkeys(itertools.permutations(range(4)), 1 / 24)
    everyone = torch.ones(batch, dtype=torch.bool)
    before = torch.zeros(batch, 4, dtype=torch.int64)
    for _ in range(2):  # the first deal and a later one
        assert_frequencies(players.kind, orders)
        assert torch.equal(players.kind == 0, torch.arange(4) == players.focal.unsqueeze(1))
        same = int((players.kind == before).all(1).sum())
        before = players.kind.clone()
        state = game.start(batch, generator_of(0))
        players.act(state, game.action_mask(state))
        assert players.observe(everyone).all()
    assert abs(same - batch / 24) <= 5 * math.sqrt(batch * 23 / 576)


def test_half_of_the_matches_have_one_kind_of_co_player(script):
    game = script.GridGame(MSH)
    batch = 8000
    players = script.CoPlayers(game, ["nh", "self"], batch, 1, generator_of(0))
    assert players.names == ["self", "nh"]
    games = torch.arange(batch)
    assert (players.kind[games, players.focal] == 0).all()  # the focal player is the learner
    others = players.kind[games.unsqueeze(1), game.others[players.focal]]
    ways = {}
    for way in itertools.product((0, 1), repeat=3):
        ways[way] = 0.5 / 8 + 0.25 * (len(set(way)) == 1)
    assert_frequencies(others, ways)
    assert_frequencies(players.focal.unsqueeze(1), {(seat,): 1 / 4 for seat in range(4)})
    players = script.CoPlayers(game, ["nh", "random", "nh"], batch, 1, generator_of(0))
    assert players.names == ["self", "nh", "random"]
    others = players.kind[games.unsqueeze(1), game.others[players.focal]]
    assert_frequencies(others[:, 2:], {(1,): 2 / 3, (2,): 1 / 3})  # named twice, drawn so
    alike = float((others == others[:, :1]).all(1).float().mean())
    assert abs(alike - (0.5 + 0.5 * (8 + 1) / 27)) < 5 * 0.5 / math.sqrt(batch)


def test_a_match_is_so_many_episodes_in_one_seating(script):
    """Episodes end at random; every game counts for itself."""
    game = script.GridGame(MSH)
    batch = 40
    generator = generator_of(1)
    pool = ["ns", "nh", "random", "self"]
    players = script.CoPlayers(game, pool, batch, 3, generator)
    state = game.start(batch, generator)
    count = torch.zeros(batch, dtype=torch.int64)
    matches = 0
    changed = 0
    for _ in range(60):
        assert torch.equal(players.episode, count)
        focal = players.focal.clone()
        kind = players.kind.clone()
        players.act(state, game.action_mask(state))
        ended = torch.rand(batch, generator=generator) < 0.3
        over = players.observe(ended)
        count += ended
        assert torch.equal(over, ended & (count == 3))
        count[over] = 0
        assert torch.equal(players.focal[~over], focal[~over])
        assert torch.equal(players.kind[~over], kind[~over])
        matches += int(over.sum())
        changed += int(((players.focal != focal) | (players.kind != kind).any(1)).sum())
    assert matches > 100
    assert changed > 0.8 * matches


def test_who_joins_plays_in_coming_matches(script):
    """As the next kind, and as one named from the start would."""
    game = script.GridGame(MSH)
    batch = 3000
    players = script.CoPlayers(game, ["nh", "self"], batch, 2, generator_of(0))
    players.join("ns-noisy", batch)
    players.join(Walker, batch)
    assert players.names == ["self", "nh", "ns-noisy", "Walker"]
    assert players.pool.tolist() == [1, 0, 2, 3]
    everyone = torch.ones(batch, dtype=torch.bool)
    kind = players.kind
    assert not players.observe(everyone).any()
    assert torch.equal(players.kind, kind) and kind.max() == 1
    assert players.observe(everyone).all()
    others = players.kind[torch.arange(batch), (players.focal + 1) % 4]
    assert_frequencies(others.unsqueeze(1), {(k,): 1 / 4 for k in range(4)})
    state = scene(script, game, (1, 1), PREY, batch)
    actions = players.act(state, game.action_mask(state))
    assert_shares(actions[players.kind == 1], even(DOWN, RIGHT))
    assert_shares(actions[players.kind == 2], noisy(even(STAG), ON_STAG))
    assert_shares(actions[players.kind == 3], even(UP))  # by its cell, number 5


@pytest.mark.parametrize("number", [0, 1, 3])
def test_fixed_co_players_are_one_fewer_than_the_players(script, number):
    with pytest.raises(script.UsageError):
        callables(script, ["ns"] * number, fixed=True)


# ------------------------------------------------------------------------------------------------
# Agents
# ------------------------------------------------------------------------------------------------
class Noting:
    """Stands for a Player: plays one action everywhere, and notes what it is told."""

    def __init__(self, action):
        self.action = action
        self.told = []

    def act(self, state, mask, seats, players):
        self.told.append(("act", seats, players))
        return {"action": torch.full(seats.shape, self.action)}

    def remember(self, actions):
        self.told.append(("remember", actions))

    def forget(self, ended, match_ended):
        self.told.append(("forget", ended, match_ended))


def test_agents_play_their_seats_and_remember_what_all_played(script):
    """The learner, agent 0, at its own seats as the others at theirs."""
    game = script.GridGame("msh-4x4-4h1s")
    players = script.CoPlayers(game, ["self", "ns", "nh"], 12, 2, generator_of(5))
    agents = {0: Noting(UP), 2: Noting(DOWN)}
    players.agents.update(agents)
    kinds = []
    for ended in (torch.arange(12) < 6, torch.arange(12) % 2 == 0, torch.zeros(12) > 0):
        state = scene(script, game, (2, 2), PREY, 12)
        kind = players.kind
        kinds.append(kind)
        actions = players.act(state, game.action_mask(state))
        assert (actions[kind == 0] == UP).all() and (actions[kind == 2] == DOWN).all()
        assert set(kind.flatten().tolist()) == {0, 1, 2}
        match_ended = players.observe(ended)
        for number, agent in agents.items():
            acted, remembered, forgot = agent.told
            agent.told = []
            assert acted[0] == "act" and torch.equal(acted[1], kind == number)
            assert acted[2] is players
            assert remembered[0] == "remember" and torch.equal(remembered[1], actions)
            assert forgot[0] == "forget" and torch.equal(forgot[1], ended)
            assert torch.equal(forgot[2], match_ended)
    assert torch.equal(kinds[0], kinds[1])
    changed = (kinds[1] != kinds[2]).any(1).nonzero().flatten().tolist()
    assert changed and set(changed) <= {0, 2, 4}  # whose second episode ended with the second step


# ------------------------------------------------------------------------------------------------
# Callables
# ------------------------------------------------------------------------------------------------
class Walker:
    """Acts by its own cell, as it sees it; notes what it is shown."""

    made = 0

    def __init__(self):
        self.seen = []
        self.started = []
        Walker.made += 1

    def start_match(self, which):
        self.started.append(which.clone())

    def __call__(self, observation, action_mask, clock, generator):
        shown = [observation.clone(), action_mask.clone(), clock.clone(), generator]
        self.seen.append(shown)
        return observation[:, 0].flatten(1).argmax(1) % 5


def callables(script, pool, batch=12, episodes=2, fixed=False, env_id="msh-4x4-3p-3h1s"):
    """Game, generator and co-players."""
    game = script.GridGame(env_id)
    generator = generator_of(5)
    players = script.CoPlayers(game, pool, batch, episodes, generator, fixed=fixed)
    return game, generator, players


def walkers_of(players):
    """Kind and object of every co-player that is a Walker."""
    found = []
    for kind, player in players.callables.items():
        if isinstance(player, Walker):
            found.append((kind, player))
    return found


@pytest.mark.parametrize("fixed", [True, False])
def test_a_callable_sees_a_row_for_each_seat_and_plays_its_own(script, fixed):
    pool = [Walker, "random"] if fixed else ["self", Walker, "random"]
    game, generator, players = callables(script, pool, fixed=fixed)
    ((kind, walker),) = walkers_of(players)
    state = game.start(12, generator)._replace(time=torch.arange(12))
    total = 0
    for _ in range(3):
        mask = game.action_mask(state)
        seats = players.kind == kind
        actions = players.act(state, mask)
        observation, action_mask, clock, drawn_from = walker.seen[-1]
        assert drawn_from is generator
        assert torch.equal(observation, game.observe(state).flatten(0, 1))
        assert torch.equal(action_mask, mask.flatten(0, 1))
        for b, seat in itertools.product(range(12), range(3)):
            row = 3 * b + seat
            assert torch.equal(clock[row], game.clock(state)[b])
            if seats[b, seat]:
                asked = int(state.players[b, seat]) % 5
                legal = bool(mask[b, seat, asked])
                assert int(actions[b, seat]) == (asked if legal else STAY)
                total += 1
        players.observe(torch.rand(12, generator=generator) < 0.6)
        state = game.start(12, generator)
    assert total == 36 if fixed else 0 < total < 72


def test_a_class_is_made_and_an_object_is_copied(script):
    """So that two runs with one object do not share what it remembers."""
    made = Walker.made
    _, _, players = callables(script, [Walker, "ns"], fixed=True)
    assert len(walkers_of(players)) == 1
    assert Walker.made == made + 1
    own = Walker()
    game, generator, players = callables(script, [own], env_id="msh-4x4-4p-4h1s")
    ((_, copied),) = walkers_of(players)
    assert copied is not own
    state = game.start(12, generator)
    players.act(state, game.action_mask(state))
    assert len(own.seen) == 0
    assert len(copied.seen) == 1


@pytest.mark.parametrize("fixed", [True, False])
def test_start_match_tells_which_rows_start(script, fixed):
    pool = [Walker, Walker] if fixed else [Walker, "random"]
    game, generator, players = callables(script, pool, fixed=fixed)
    ((kind, walker),) = walkers_of(players)
    assert len(walker.started) == 1  # before the first action
    assert torch.equal(walker.started[0], (players.kind == kind).flatten())
    started = 0
    matches = 0
    for _ in range(20):
        walker.started.clear()
        state = game.start(12, generator)
        players.act(state, game.action_mask(state))
        over = players.observe(torch.rand(12, generator=generator) < 0.3)
        begins = (over.unsqueeze(1) & (players.kind == kind)).flatten()
        told = torch.zeros_like(begins)
        for which in walker.started:
            assert which.shape == (36,)
            told |= which
        assert torch.equal(told, begins)
        matches += int(over.sum())
        started += int(told.sum())
    assert matches > 20
    assert started == 2 * matches if fixed else 0.3 * matches < started < 1.7 * matches


def actions_of(value):
    """A co-player whose actions are value(R)."""

    def player(observation, action_mask, clock, generator):
        return value(len(observation))

    return player


def failing(rows):
    raise KeyError("no\nidea")


@pytest.mark.parametrize(
    "value",
    [
        lambda r: torch.zeros(r + 1, dtype=torch.int64),
        lambda r: torch.zeros(r, 2, dtype=torch.int64),
        lambda r: torch.zeros((), dtype=torch.int64),
        lambda r: [0] * r,
        lambda r: None,
        lambda r: torch.full((r,), 7),
        lambda r: torch.full((r,), -1),
        lambda r: torch.arange(r) - 1,
        lambda r: torch.zeros(r),
        lambda r: torch.zeros(r, dtype=torch.bool),
        lambda r: "left",
        failing,
    ],
    ids="long wide scalar list none above below one_below float bool text raising".split(),
)
def test_what_is_no_action_raises_a_usage_error(script, value):
    game, generator, players = callables(script, [actions_of(value)] * 2, fixed=True)
    state = game.start(12, generator)
    with pytest.raises(script.UsageError) as error:
        players.act(state, game.action_mask(state))
    assert "\n" not in str(error.value)
    assert "'player'" in str(error.value)


def test_what_cannot_be_made_raises_a_usage_error(script):
    class Impossible:
        def __init__(self):
            raise RuntimeError("no\nsuch thing")

    with pytest.raises(script.UsageError) as error:
        callables(script, [Impossible])
    assert "\n" not in str(error.value)
    assert "Impossible" in str(error.value)


def test_an_illegal_action_is_stay_before_anyone_sees_it(script, small, monkeypatch, tmp_path):
    up = actions_of(lambda r: torch.zeros(r, dtype=torch.int64))
    game, _, players = callables(script, [up] * 2, fixed=True)
    others = players.kind != 0
    for place, action in (((0, 2), STAY), ((1, 2), UP), (None, STAY)):
        state = scene(script, game, place, PREY[:4], 12)
        actions = players.act(state, game.action_mask(state))
        assert (actions[others] == action).all()
    # the MOA learns what was done in the game, not what was asked for
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "climbers", types.SimpleNamespace(up=up))
    shown = {}

    def watch(buffer, co_players, **others):
        shown["buffer"] = buffer
        shown["seats"] = co_players.kind != 0

    options = {"num_steps": 32, "total_timesteps": 128, "match_episodes": 99}
    script.train(small(env_id="msh-2x2-3p-1h1s", co_players="climbers:up", **options), watch)
    ring = shown["buffer"].ring
    steps = shown["buffer"].now
    assert steps == 32
    seats = shown["seats"].expand(steps, -1, -1)
    done = ring["action"][:steps][seats]
    row = ring["players"][:steps][seats] // 2
    assert torch.equal(done == UP, row == 1)
    assert torch.equal(done == STAY, row != 1)
    assert 0 < int((done == UP).sum()) < len(done)


def test_what_a_callable_does_to_its_arguments_stays_with_it(script):
    """One that strikes out actions in the mask it is shown, to draw from the rest."""

    def restless(observation, action_mask, clock, generator):
        action_mask[:, STAY:] = False
        observation.zero_()
        clock.zero_()
        return action_mask.int().argmax(1)

    game, generator, players = callables(script, [restless] * 2, fixed=True)
    state = game.start(12, generator)._replace(time=torch.full((12,), 3))
    mask = game.action_mask(state)
    before = [field.clone() for field in (*state, mask)]
    actions = players.act(state, mask)
    for field, kept in zip((*state, mask), before, strict=True):
        assert torch.equal(field, kept)
    assert (actions[players.kind != 0] < STAY).all()


def test_a_name_in_a_module(script, tmp_path, monkeypatch):
    (tmp_path / "friends_of_tests.py").write_text(
        "import torch\n"
        "class Left:\n"
        "    def __call__(self, observation, action_mask, clock, generator):\n"
        "        return torch.full((len(observation),), 2)\n"
        "def right(observation, action_mask, clock, generator):\n"
        "    return torch.full((len(observation),), 3)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)  # modules of the working directory are found
    pool = ["friends_of_tests:Left", "friends_of_tests:right"]
    game, generator, players = callables(script, pool, fixed=True)
    assert players.names == ["self", *pool]
    state = scene(script, game, (0, 2), PREY[:4], 12)
    actions = players.act(state, game.action_mask(state))
    assert (actions[players.kind == 1] == LEFT).all()
    assert (actions[players.kind == 2] == RIGHT).all()
    for name in ("friends_of_tests:nobody", "no_such_module:x", "friends_of_tests:", ":right"):
        with pytest.raises(script.UsageError) as error:
            callables(script, [name])
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(script.UsageError):
        game, generator, players = callables(script, ["friends_of_tests:number"])
        players.act(state, game.action_mask(state))


@pytest.mark.parametrize(
    "name",
    ["", "NS", "ns-", "noisy", "-noisy", "cleaner", "exploiter-noisy", "self-noisy", "no/such.pt"],
)
def test_unknown_co_players(script, name):
    with pytest.raises(script.UsageError) as error:
        callables(script, ["ns", name])
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)


def test_a_bad_callable_is_refused_before_anything_is_written(script, small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    player = actions_of(lambda r: np.zeros(r))
    monkeypatch.setitem(sys.modules, "strangers", types.SimpleNamespace(player=player))
    with pytest.raises(script.UsageError):
        script.train(small(co_players="ns,strangers:player"))
    assert not list(tmp_path.iterdir())

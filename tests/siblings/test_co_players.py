"""Scripted co-players against a slow reference, the dealing of seats, and co-players that are callables.

Cells are (row, column) in this file, and None for a player that has left or an item that is gone.
"""

import itertools
import math
import sys
import types
from collections import Counter

import pytest
import torch

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1), STAY: (0, 0)}
MSH, MSG = "msh-4x4-4h1s", "msg-4x4-5d"
PREY = [(1, 1), (0, 3), (3, 3), (3, 0), (2, 2)]  # the stag, four hares; or five drifts
FAMILIES = {"msh": ["ns", "nh", "random"], "msg": ["cleaner", "exploiter", "random"]}
NOISE = 0.2


def cell_of(game, place):
    return -1 if place is None else place[0] * game.width + place[1]


def scene(script, game, place, items, batch):
    """`batch` times one game, every player on the cell `place`."""
    players = torch.full((batch, game.num_players), cell_of(game, place))
    cells = torch.tensor([cell_of(game, item) for item in items]).expand(batch, -1)
    zeros = torch.zeros(batch, dtype=torch.int64)
    return script.GameState(players, cells, zeros + 3, zeros)


class Crowd:
    """Many games in which every seat but the learner's is played by one kind."""

    def __init__(self, script, name, env_id=MSH, batch=2000, seed=0):
        self.script, self.game, self.batch = script, script.GridGame(env_id), batch
        pool = [name] * (self.game.num_players - 1)
        generator = torch.Generator().manual_seed(seed)
        self.players = script.CoPlayers(self.game, pool, batch, 3, generator, fixed=True)

    def act(self, place, items=PREY):
        """int64 [R]: what the co-players play when all stand on `place`."""
        self.state = scene(self.script, self.game, place, items, self.batch)
        self.actions = self.players.act(self.state, self.game.action_mask(self.state))
        return self.actions[~self.players.learner]

    def observe(self, ended=False):
        which = torch.full((self.batch,), ended)
        return self.players.observe(self.state, self.actions, which)


def assert_shares(actions, shares):
    """The actions [R] are those of `shares` {action: probability}, as frequent as that (five standard deviations)."""
    count, total = Counter(actions.tolist()), len(actions)
    assert set(count) == set(shares)
    for action, share in shares.items():
        assert abs(count[action] - share * total) <= 5 * math.sqrt(total * share * (1 - share)) + 1e-6


def even(*actions):
    return dict.fromkeys(actions, 1 / len(actions))


# ---------------------------------------------------------------------------------------------------------------------
# Scripted choices in hand-made scenes
# ---------------------------------------------------------------------------------------------------------------------
def test_names(script):
    assert {name: list(kinds) for name, kinds in script.SCRIPTED_OF.items()} == FAMILIES
    assert script.NOISE == NOISE


@pytest.mark.parametrize(
    "name, place, items, shares",
    [
        ("ns", (1, 0), PREY, even(RIGHT)),
        ("ns", (3, 3), PREY, even(UP, LEFT)),  # on a hare, but a stag is left
        ("ns", (0, 2), PREY, even(DOWN, LEFT)),  # beside a hare
        ("ns", (1, 1), PREY, even(STAG)),
        ("ns", (3, 2), [None, *PREY[1:]], even(RIGHT, UP)),  # as nh
        ("ns", (2, 2), [None, *PREY[1:]], even(HARE)),
        ("ns", (1, 1), [(1, 1), None, None, None, None], even(STAG)),
        ("nh", (1, 1), PREY, even(DOWN, RIGHT)),  # on the stag
        ("nh", (0, 3), PREY, even(HARE)),
        ("nh", (0, 0), PREY, even(DOWN, RIGHT)),
        ("nh", (1, 2), [(1, 1), None, None, None, None], even(STAY)),
        ("nh", (1, 1), [(1, 1), None, None, None, None], even(STAY)),
        ("random", (1, 2), PREY, even(UP, DOWN, LEFT, RIGHT, STAY)),
        ("random", (1, 1), PREY, even(UP, DOWN, LEFT, RIGHT, STAY, STAG)),
        ("random", (3, 3), PREY, even(UP, LEFT, STAY, HARE)),
        ("random-noisy", (3, 0), PREY, even(UP, RIGHT, STAY, HARE)),
        ("ns-noisy", (1, 1), PREY, {STAG: 0.8 + 0.2 / 6, **dict.fromkeys(range(5), 0.2 / 6)}),
        ("ns-noisy", (2, 2), PREY, {UP: 0.4 + 0.2 / 6, LEFT: 0.4 + 0.2 / 6, **dict.fromkeys((1, 3, 4, HARE), 0.2 / 6)}),
        ("nh-noisy", (3, 3), PREY, {HARE: 0.8 + 0.05, UP: 0.05, LEFT: 0.05, STAY: 0.05}),
        ("nh-noisy", (0, 0), [(0, 0), None, None, None, None], {STAY: 0.85, DOWN: 0.05, RIGHT: 0.05, STAG: 0.05}),
    ],
)
def test_choices_in_the_stag_hunt(script, name, place, items, shares):
    assert_shares(Crowd(script, name).act(place, items), shares)


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
        ("cleaner-noisy", (3, 3), PREY, {REMOVE: 0.85, UP: 0.05, LEFT: 0.05, STAY: 0.05}),
        ("exploiter-noisy", (1, 1), PREY, {**dict.fromkeys(range(5), 0.8 / 5 + 0.2 / 6), REMOVE: 0.2 / 6}),
    ],
)
def test_choices_in_the_snowdrift_game(script, name, place, items, shares):
    assert_shares(Crowd(script, name, MSG).act(place, items), shares)


@pytest.mark.parametrize("name, env_id", [("nh", "msh-4x4-3h1s"), ("cleaner", "msg-4x4-4d")])
def test_ties_are_uniform_over_targets_and_not_over_moves(script, name, env_id):
    """One target lies straight to the right, the other diagonal: RIGHT in 1/2 + 1/2 * 1/2 of all choices."""
    items = [(3, 3), (0, 2), (1, 1), (3, 2)]
    assert_shares(Crowd(script, name, env_id).act((0, 0), items), {RIGHT: 3 / 4, DOWN: 1 / 4})
    items = [(3, 3), (0, 1), (2, 1), (1, 2)] if name == "nh" else [(1, 0), (0, 1), (2, 1), (1, 2)]
    shares = even(UP, DOWN, RIGHT) if name == "nh" else even(UP, DOWN, LEFT, RIGHT)
    assert_shares(Crowd(script, name, env_id).act((1, 1), items), shares)


def test_each_player_draws_its_own_target(script):
    """Two hares equally far, four players on one cell: all eight ways of three co-players are equally frequent."""
    crowd = Crowd(script, "nh", "msh-1x5-4p-2h1s", batch=4000)
    crowd.act((0, 2), [(0, 2), (0, 0), (0, 4)])
    ways = Counter(tuple(a for a, me in zip(*row, strict=True) if not me) for row in rows_of(crowd))
    assert len(ways) == 8
    assert all(abs(count - 500) <= 5 * math.sqrt(4000 * 7 / 64) for count in ways.values())


def rows_of(crowd):
    return zip(crowd.actions.tolist(), crowd.players.learner.tolist(), strict=True)


@pytest.mark.parametrize(
    "name, env_id", [("nh", "msh-1x9-2p-2h1s"), ("cleaner", "msg-1x9-2p-3d"), ("ns", "msh-1x9-2p-1h2s")]
)
def test_a_target_is_kept_until_it_is_gone_or_the_game_is_reset(script, name, env_id):
    """Both targets lie in one row; the players are put elsewhere between the steps."""
    left, right, far = (0, 1), (0, 7), (0, 8)
    items = {"nh": [far, left, right], "cleaner": [left, right, None], "ns": [left, right, far]}[name]
    crowd = Crowd(script, name, env_id, batch=50)
    assert_shares(crowd.act((0, 3), items), even(LEFT))
    crowd.observe()
    assert_shares(crowd.act((0, 6), items), even(LEFT))  # the other is nearer now
    crowd.observe()
    assert_shares(crowd.act((0, 7), items), even(LEFT))  # on the other
    crowd.observe()
    gone = [None if item == left else item for item in items]
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
    """Noisy players that are put beside the other hare for their second step still walk to the first, mostly."""
    crowd = Crowd(script, "nh-noisy", "msh-1x9-2p-2h1s")
    items = [(0, 4), (0, 1), (0, 7)]
    crowd.act((0, 3), items)
    crowd.observe()
    assert_shares(crowd.act((0, 6), items), {LEFT: 0.8 + 0.2 / 3, RIGHT: 0.2 / 3, STAY: 0.2 / 3})


def test_noise_is_drawn_by_each_player_for_itself(script):
    """Two of three noisy hunters on a hare do something else together in 3 * 0.15 ** 2 * 0.85 of all games."""
    crowd = Crowd(script, "nh-noisy", batch=6000)
    others = (crowd.act((3, 3)) != HARE).view(-1, 3).sum(1)
    shares = {(k,): math.comb(3, k) * 0.15**k * 0.85 ** (3 - k) for k in range(4)}
    assert_frequencies(others.unsqueeze(1), shares)


@pytest.mark.parametrize(
    "family, name", [(f, n + e) for f, names in FAMILIES.items() for n in names for e in ("", "-noisy")]
)
def test_who_has_left_stays(script, family, name):
    crowd = Crowd(script, name, {"msh": MSH, "msg": MSG}[family], batch=300)
    assert_shares(crowd.act(None), even(STAY))


# ---------------------------------------------------------------------------------------------------------------------
# Whole matches against a reference
# ---------------------------------------------------------------------------------------------------------------------
class Reference:
    """One scripted player: what it may do, from the rules. `target` is the number of an item or None."""

    def __init__(self, name, kinds):
        self.name, self.kinds, self.target = name, kinds, None

    def wanted(self, items):
        here = {kind for kind, item in zip(self.kinds, items, strict=True) if item is not None}
        preference = {"ns": ["stag", "hare"], "nh": ["hare"], "cleaner": ["drift"]}.get(self.name, [])
        return next((kind for kind in preference if kind in here), None)

    def targets(self, at, items):
        """Numbers of the items that the player may have as its target in this step."""
        kind = self.wanted(items)
        around = [m for m, item in enumerate(items) if item is not None and self.kinds[m] == kind]
        if self.target in around:
            return {self.target}
        away = {m: abs(at[0] - items[m][0]) + abs(at[1] - items[m][1]) for m in around}
        return {m for m in around if away[m] == min(away.values())}

    def actions(self, at, items, target, legal):
        """The actions between which it draws, with `target` its target."""
        if self.name == "random":
            return legal
        if self.name == "exploiter":
            return legal - {REMOVE}
        if target is None:
            return {STAY}
        goal = items[target]
        if at == goal:
            return {{"stag": STAG, "hare": HARE, "drift": REMOVE}[self.kinds[target]]}
        away = {a: abs(at[0] + r - goal[0]) + abs(at[1] + c - goal[1]) for a, (r, c) in OFFSETS.items() if a in legal}
        return {a for a in away if away[a] < away[STAY]}


@pytest.mark.parametrize(
    "env_id, pool", [("msh-5x4-5p-3h2s", "ns,nh,random"), ("msg-3x5-3p-4d", "cleaner,exploiter,random")]
)
def test_whole_matches_follow_the_rules(script, env_id, pool):
    """Every co-player's every action of several matches, against its possible targets; the learner's are random."""
    game, batch = script.GridGame(env_id), 6
    generator = torch.Generator().manual_seed(4)
    players = script.CoPlayers(game, pool.split(","), batch, 2, generator)
    state = game.initial_state(batch, generator)
    kinds = [game.item_names[kind] for kind in game.item_kind.tolist()]
    seen, matches, members = Counter(), 0, {}
    for _ in range(150):
        mask, names = game.action_mask(state), [[players.names[k] for k in row] for row in players.kind.tolist()]
        actions = players.act(state, mask)
        for b, seat in itertools.product(range(batch), range(game.num_players)):
            name, action = names[b][seat], int(actions[b, seat])
            if name == "self":
                continue
            me = members.setdefault((b, seat), Reference(name, kinds))
            assert me.name == name  # within a match a seat keeps its kind
            legal, cell = set(mask[b, seat].nonzero().flatten().tolist()), int(state.players[b, seat])
            if cell < 0:
                assert action == STAY
                continue
            items = [None if c < 0 else divmod(c, game.width) for c in state.items[b].tolist()]
            at, ways = divmod(cell, game.width), []
            for target in me.targets(at, items) or {None}:
                if action in me.actions(at, items, target, legal):
                    ways.append(target)
            assert ways, (name, at, items, action)
            if len(ways) == 1:  # else the target is not known yet
                me.target = ways[0]
            seen[name, action] += 1
        state, _, terminated, truncated = game.step(state, actions)
        ended = terminated | truncated
        match_ended = players.observe(state, actions, ended)
        for key, me in list(members.items()):
            if match_ended[key[0]]:
                del members[key]
            elif ended[key[0]]:
                me.target = None
        matches += int(match_ended.sum())
        state = state.replaced(ended, game.initial_state(batch, generator))
    assert matches >= 8
    first, second = ("ns", "nh") if game.family == "msh" else ("cleaner", "exploiter")
    assert all(seen[first, a] > 0 for a in (UP, DOWN, LEFT, RIGHT, 5)) and all(seen[second, a] for a in range(4))


# ---------------------------------------------------------------------------------------------------------------------
# Dealing
# ---------------------------------------------------------------------------------------------------------------------
def assert_frequencies(rows, probabilities):
    """Rows of an integer tensor [R, ..] have these probabilities {row: probability} (five standard deviations)."""
    count = Counter(map(tuple, rows.tolist()))
    assert set(count) <= set(probabilities)
    for row, p in probabilities.items():
        assert abs(count[row] - p * len(rows)) <= 5 * math.sqrt(len(rows) * p * (1 - p))


def test_seats_are_dealt_uniformly_and_fixed_co_players_play_every_match(script):
    game, batch = script.GridGame(MSH), 6000
    generator = torch.Generator().manual_seed(0)
    players = script.CoPlayers(game, ["ns", "random-noisy", "nh"], batch, 1, generator, fixed=True)
    orders = list(itertools.permutations(range(4)))
    everyone = torch.ones(batch, dtype=torch.bool)
    for _ in range(2):  # the first deal and a later one
        assert_frequencies(players.seat, {order: 1 / 24 for order in orders})
        by_slot = players.kind.gather(1, players.seat)
        assert [players.names[k] for k in by_slot[0].tolist()] == ["self", "ns", "random-noisy", "nh"]
        assert (by_slot == by_slot[0]).all()
        assert torch.equal(players.learner, torch.arange(4) == players.seat[:, :1])
        before = players.seat.clone()
        players.start_matches(everyone)
    assert abs(int((players.seat == before).all(1).sum()) - batch / 24) <= 5 * math.sqrt(batch * 23 / 576)


def test_half_of_the_matches_have_one_kind_of_co_player(script):
    game, batch = script.GridGame(MSH), 8000
    players = script.CoPlayers(game, ["nh", "self"], batch, 1, torch.Generator().manual_seed(0))
    kinds = players.kind.gather(1, players.seat)
    assert (kinds[:, 0] == 0).all()  # the focal player is the learner
    ways = {way: 0.5 / 8 + 0.25 * (len(set(way)) == 1) for way in itertools.product((0, 1), repeat=3)}
    assert players.names == ["self", "nh"]
    assert_frequencies(kinds[:, 1:], ways)
    players = script.CoPlayers(game, ["nh", "random", "nh"], batch, 1, torch.Generator().manual_seed(0))
    names = torch.tensor([["self", "nh", "random"].index(name) for name in players.names])
    kinds = names[players.kind.gather(1, players.seat)][:, 1:]
    assert_frequencies(kinds[:, 2:], {(1,): 2 / 3, (2,): 1 / 3})  # named twice, drawn twice as often
    assert abs(float((kinds == kinds[:, :1]).all(1).float().mean()) - (0.5 + 0.5 * (8 + 1) / 27)) < 5 * 0.5 / batch**0.5


def test_a_match_is_so_many_episodes_in_one_seating(script):
    """Episodes end at random; every game counts for itself."""
    game, batch, episodes = script.GridGame(MSH), 40, 3
    generator = torch.Generator().manual_seed(1)
    players = script.CoPlayers(game, ["ns", "nh", "random", "self"], batch, episodes, generator)
    state = game.initial_state(batch, generator)
    count, changed, matches = torch.zeros(batch, dtype=torch.int64), 0, 0
    for _ in range(60):
        assert torch.equal(players.episode, count)
        seat, kind = players.seat.clone(), players.kind.clone()
        actions = players.act(state, game.action_mask(state))
        ended = torch.rand(batch, generator=generator) < 0.3
        over = players.observe(state, actions, ended)
        count += ended
        assert torch.equal(over, ended & (count == episodes))
        count[over] = 0
        assert torch.equal(players.seat[~over], seat[~over]) and torch.equal(players.kind[~over], kind[~over])
        matches += int(over.sum())
        changed += int((players.seat != seat).any(1).sum())
    assert matches > 100 and changed > 0.9 * matches  # 1 in 24 deals is the one before


# ---------------------------------------------------------------------------------------------------------------------
# Callables
# ---------------------------------------------------------------------------------------------------------------------
class Walker:
    """Acts by its own cell, as it sees it; notes what it is shown."""

    made = 0

    def __init__(self):
        self.seen, self.started, self.number = [], [], Walker.made
        Walker.made += 1

    def start_match(self, which):
        self.started.append(which.clone())

    def __call__(self, observation, action_mask, clock, generator):
        self.seen.append((observation.clone(), action_mask.clone(), clock.clone(), generator))
        return observation[:, 0].flatten(1).argmax(1) % 5


def callables(script, pool, batch=12, episodes=2, fixed=False, env_id="msh-4x4-3p-3h1s"):
    game, generator = script.GridGame(env_id), torch.Generator().manual_seed(5)
    return game, generator, script.CoPlayers(game, pool, batch, episodes, generator, fixed=fixed)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_callable_sees_and_plays_its_own_seat(script, fixed):
    pool = [Walker, Walker] if fixed else ["self", Walker, "random"]
    game, generator, players = callables(script, pool, fixed=fixed)
    games = torch.arange(players.batch)
    state = game.initial_state(players.batch, generator)._replace(time=games)
    for _ in range(3):
        actions, mask = players.act(state, game.action_mask(state)), game.action_mask(state)
        total = 0
        for k, objects in enumerate(players.players):
            for slot, walker in enumerate(objects if isinstance(objects, list) else [], start=1):
                seat = players.seat[:, slot]
                observation, action_mask, clock, drawn_from = walker.seen[-1]
                mine = players.kind[games, seat] == k
                assert observation.shape == (players.batch, *game.obs_shape) and drawn_from is generator
                assert torch.equal(observation, game.observe(state)[games, seat])
                assert torch.equal(action_mask, mask[games, seat]) and torch.equal(clock, game.clock(state))
                asked = state.players[games, seat] % 5
                legal = action_mask[games, asked]
                assert torch.equal(actions[games, seat][mine], torch.where(legal, asked, STAY)[mine])
                total += int(mine.sum())
        assert total == 2 * players.batch if fixed else 0 < total < 2 * players.batch
        players.observe(state, actions, torch.rand(players.batch, generator=generator) < 0.6)
        state = game.initial_state(players.batch, generator)


def test_one_object_for_each_co_player(script):
    made = Walker.made
    _, _, players = callables(script, [Walker, Walker], fixed=True)
    used = [w for objects in players.players if isinstance(objects, list) for w in objects]
    assert len({id(w) for w in used}) == len(used) and Walker.made > made  # a class is instantiated for each
    own = Walker()
    game, generator, players = callables(script, [own], env_id="msh-4x4-4p-4h1s")
    (objects,) = [objects for objects in players.players if isinstance(objects, list)]
    assert len({id(w) for w in [own, *objects]}) == 4  # an instance is copied for each
    state = game.initial_state(players.batch, generator)
    players.act(state, game.action_mask(state))
    assert [len(w.seen) for w in [own, *objects]] == [0, 1, 1, 1]

    def stag(observation, action_mask, clock, generator):
        calls.append(len(observation))
        return torch.full((len(observation),), STAG)

    calls = []
    game, generator, players = callables(script, [stag])
    state = scene(script, game, PREY[0], PREY[:4], players.batch)
    actions = players.act(state, game.action_mask(state))
    assert calls == [players.batch] * 2 and (actions[~players.learner] == STAG).all()


@pytest.mark.parametrize("fixed", [True, False])
def test_start_match_tells_which_matches_start(script, fixed):
    game, generator, players = callables(script, [Walker] * 2 if fixed else [Walker, "random"], fixed=fixed)
    slots = [
        (k, slot, w)
        for k, objects in enumerate(players.players)
        for slot, w in enumerate(objects if isinstance(objects, list) else [], start=1)
    ]
    games = torch.arange(players.batch)

    def plays(k, slot):
        return players.kind[games, players.seat[:, slot]] == k

    for k, slot, w in slots:
        assert len(w.started) == 1 and torch.equal(w.started[0], plays(k, slot))  # before the first action
    started = ended_matches = 0
    for _ in range(20):
        for _, _, w in slots:
            w.started.clear()
        state = game.initial_state(players.batch, generator)
        actions = players.act(state, game.action_mask(state))
        over = players.observe(state, actions, torch.rand(players.batch, generator=generator) < 0.3)
        ended_matches += int(over.sum())
        for k, slot, w in slots:
            told = torch.stack([*w.started, torch.zeros_like(over)]).any(0)
            assert torch.equal(told, over & plays(k, slot))
            started += int(told.sum())
    assert ended_matches > 20
    assert started == 2 * ended_matches if fixed else 0.3 * ended_matches < started < 1.7 * ended_matches


def actions_of(value):
    return lambda observation, action_mask, clock, generator: value(len(observation))


@pytest.mark.parametrize(
    "value",
    [
        lambda b: torch.zeros(b + 1, dtype=torch.int64),
        lambda b: torch.zeros(b, 1, dtype=torch.int64),
        lambda b: torch.zeros((), dtype=torch.int64),
        lambda b: [0] * b,
        lambda b: None,
        lambda b: torch.full((b,), 7),
        lambda b: torch.full((b,), -1),
        lambda b: torch.arange(b) - 1,
    ],
    ids=["long", "column", "scalar", "list", "none", "above", "below", "one below"],
)
def test_what_is_no_action_raises_a_usage_error(script, value):
    game, generator, players = callables(script, [actions_of(value)] * 2, fixed=True)
    state = game.initial_state(players.batch, generator)
    with pytest.raises(script.UsageError):
        game.step(state, players.act(state, game.action_mask(state)))


def test_an_illegal_action_of_a_callable_is_stay(script, small, monkeypatch):
    up = actions_of(lambda b: torch.zeros(b, dtype=torch.int64))
    game, _, players = callables(script, [up] * 2, fixed=True)
    state = scene(script, game, (0, 2), PREY[:4], players.batch)
    actions = players.act(state, game.action_mask(state))
    after, *_ = game.step(state, actions)
    assert torch.equal(after.players[~players.learner], state.players[~players.learner])
    assert (actions[~players.learner] == STAY).all()
    byte = actions_of(lambda b: torch.zeros(b, dtype=torch.uint8))  # an index of this type would be a mask
    for one, place, action in ((byte, (0, 2), STAY), (byte, (1, 2), UP), (up, None, STAY)):
        game, _, players = callables(script, [one] * 2, fixed=True)
        state = scene(script, game, place, PREY[:4], players.batch)
        assert (players.act(state, game.action_mask(state))[~players.learner] == action).all()
    # the MOA learns what was done in the game, not what was asked for
    monkeypatch.setitem(sys.modules, "climbers", types.SimpleNamespace(up=up))
    trainer = script.Trainer(
        small(env_id="msh-2x2-3p-1h1s", co_players="climbers:up", num_steps=80, total_timesteps=9**9)
    )
    metrics = [trainer.iterate() for _ in range(4)]
    assert 0 < max(float(one["moa/nll"]) for one in metrics if "moa/nll" in one) < 10


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
    monkeypatch.syspath_prepend(tmp_path)
    game, generator, players = callables(script, ["friends_of_tests:Left", "friends_of_tests:right"], fixed=True)
    state = scene(script, game, (0, 2), PREY[:4], players.batch)
    actions = players.act(state, game.action_mask(state)).gather(1, players.seat)
    assert (actions[:, 1] == LEFT).all() and (actions[:, 2] == RIGHT).all()
    names = ["friends_of_tests:nobody", "friends_of_tests:number", "no_such_module:x", "friends_of_tests:", ":right"]
    for name in names:
        with pytest.raises(script.UsageError):
            callables(script, [name])


@pytest.mark.parametrize(
    "name", ["", "NS", "ns-", "noisy", "-noisy", "cleaner", "exploiter-noisy", "self-noisy", "no/such.pt", 3]
)
def test_unknown_co_players(script, name):
    with pytest.raises(script.UsageError) as caught:
        callables(script, ["ns", name])
    assert "\n" not in str(caught.value) and str(name) in str(caught.value)
    callables(script, ["ns", "self"], fixed=True)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_fixed_co_players_are_one_fewer_than_the_players(script, number):
    with pytest.raises(script.UsageError):
        callables(script, ["ns"] * number, fixed=True)

"""Rules of the grid games: a slow reference written from the rules, views by hand, invariances.

Cells are (row, column) here, and None for a player that has left or an item that is gone."""

import itertools
import random
from collections import Counter, defaultdict

import pytest
import torch

from run_tools import generator_of, situations

pytestmark = pytest.mark.only("hop_onestep")

UP, DOWN, LEFT, RIGHT, STAY, STAG, HARE = range(7)
REMOVE = 5
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1), STAY: (0, 0)}
RULES = {  # item: the action that takes it, how many players must, what they split, bonus to all
    "stag": (STAG, 2, 10.0, 0.0),
    "hare": (HARE, 1, 1.0, 0.0),
    "drift": (REMOVE, 1, -4.0, 6.0),
}
GAMES = {  # id: height, width, players, kinds of the items
    "msh-3x3-4h1s": (3, 3, 4, ["stag"] + ["hare"] * 4),
    "msh-4x4-4h2s": (4, 4, 4, ["stag"] * 2 + ["hare"] * 4),
    "msh-2x5-3p-2h2s": (2, 5, 3, ["stag"] * 2 + ["hare"] * 2),
    "msh-3x2-6p-1h3s": (3, 2, 6, ["stag"] * 3 + ["hare"]),
    "msh-5x1-2p-0h1s": (5, 1, 2, ["stag"]),
    "msg-3x3-6d": (3, 3, 4, ["drift"] * 6),
    "msg-4x3-5p-4d": (4, 3, 5, ["drift"] * 4),
}
EVENTS = """stag by 1,stag by 2,stag by 3,hare by 1,hare by 2,drift by 1,drift by 2,illegal,
    later hunt,countdown,truncated,truncated with leavers,no item left"""
IDS = [  # height, width, players, numbers of items, highest mean return of a player
    ("msh", 8, 8, 4, [1, 4], (10 + 2) / 4),
    ("msh-3x5-3p", 3, 5, 3, [1, 4], (10 + 1) / 3),
    ("msh-2p-1h3s", 8, 8, 2, [3, 1], 10 / 2),
    ("msh-1x1-1p-0h1s", 1, 1, 1, [1, 0], 0),
    ("msh-10x12-11p-20h10s", 10, 12, 11, [10, 20], (50 + 1) / 11),
    ("msg", 8, 8, 4, [6], 6 * (6 - 4 / 4)),
    ("msg-5x6-2p-10d", 5, 6, 2, [10], 10 * (6 - 4 / 2)),
]
BAD_IDS = """
    garbage ms MSH mshx msh- msh--4h1s msh_4h1s msh-4h msh-1s msh-1s4h msh-4H1S msh-8 msh-8x
    msh-8x8x8 msh-p msg-d msg-6 msh-6d msg-4h1s msh-4h1s-8x8 msh-4p-4p msh-08x8 msh-4h01s msg-00d
    msh-4h1.0s msh-+4p msh--1p msh-0x4 msh-0p msg-0d msh-4h0s msh-2x2-4h1s msg-2x2-5d msh-9999x9999
    msg-9999p msh-100h1s msh-33x32 msg-99x99 msh-1\u0664p""".split()  # \u0664: a digit, not ASCII


def places_of(cells, width):
    return [None if cell < 0 else divmod(cell, width) for cell in cells.tolist()]


class Reference:
    """One game of plain Python, from the rules; `events` counts what happened."""

    def __init__(self, env_id, state, b, events):
        self.height, self.width, _, self.kinds = GAMES[env_id]
        self.hunt = env_id.startswith("msh")
        self.horizon = 35 if self.hunt else 50
        self.players = places_of(state.players[b], self.width)
        self.items = places_of(state.items[b], self.width)
        self.time = int(state.time[b])
        self.first_hunt = 0
        self.events = events
        self.over = False

    def item_for(self, player, action):
        """Number of the item that the player can take with this action, or None."""
        for m, kind in enumerate(self.kinds):
            if self.items[m] == self.players[player] and RULES[kind][0] == action:
                return m
        return None

    def legal(self, player, action):
        if self.players[player] is None or action == STAY:
            return action == STAY
        if action > STAY:
            return self.item_for(player, action) is not None
        row, column = self.moved(player, action)
        return 0 <= row < self.height and 0 <= column < self.width

    def moved(self, player, action):
        down, right = OFFSETS[action]
        return self.players[player][0] + down, self.players[player][1] + right

    def masks(self):
        actions = range(7 if self.hunt else 6)
        return [[self.legal(i, action) for action in actions] for i in range(len(self.players))]

    def clock(self):
        end = self.first_hunt + 5 if self.first_hunt else self.horizon
        return [self.time, min(end, self.horizon) - self.time]

    def step(self, actions):
        """Rewards, terminated, truncated, subgoals: lists of one entry a player."""
        after = list(self.players)
        groups = defaultdict(list)  # item: players that act on it
        for player, action in enumerate(actions):
            if not self.legal(player, action):
                self.events["illegal"] += 1
            elif action > STAY:
                groups[self.item_for(player, action)].append(player)
            elif self.players[player] is not None:
                after[player] = self.moved(player, action)
        rewards = [0.0] * len(actions)
        subgoals = [-1] * len(actions)
        for item, group in groups.items():
            _, least, split, bonus = RULES[self.kinds[item]]
            self.events[f"{self.kinds[item]} by {len(group)}"] += 1
            if len(group) >= least:
                self.items[item] = None
                rewards = [reward + bonus for reward in rewards]
                for player in group:
                    rewards[player] += split / len(group)
                    subgoals[player] = item
                    after[player] = None if self.hunt else after[player]
        self.time += 1
        if self.hunt and max(subgoals) >= 0:
            self.events["later hunt"] += self.first_hunt > 0
            self.first_hunt = self.first_hunt or self.time
        self.players = after
        countdown = self.first_hunt > 0 and self.time == self.first_hunt + 5
        self.events["countdown"] += countdown
        self.events["no item left"] += not any(self.items)
        over = countdown or not any(after) or not any(self.items)
        late = self.time == self.horizon and not over
        terminated = [over or place is None for place in after]
        truncated = [late and place is not None for place in after]
        self.events["truncated"] += late
        self.events["truncated with leavers"] += late and not all(truncated)
        self.over = over or late
        return rewards, terminated, truncated, subgoals


def eventful_action(mask, rng):
    """Mostly legal, interactions preferred; some blind interactions, some of everything."""
    legal = [action for action, allowed in enumerate(mask) if allowed]
    interactions = [action for action in legal if action > STAY]
    roll = rng.random()
    if roll < 0.3:
        return rng.randrange(5 if roll < 0.15 else 0, len(mask))
    return rng.choice(interactions if interactions and roll < 0.6 else legal)


def test_whole_episodes_agree_with_the_reference(script):
    """Rewards, ends, subgoals, and of every state places, clock, legal actions and who is there."""
    events = Counter()
    for env_id in GAMES:
        game = script.GridGame(env_id)
        rng = random.Random(env_id)
        late = torch.tensor([rng.randrange(game.horizon) * (b % 2) for b in range(24)])
        state = game.start(24, generator_of(len(env_id)))._replace(time=late)
        references = [Reference(env_id, state, b, events) for b in range(24)]
        while not all(reference.over for reference in references):
            masks = [reference.masks() for reference in references]
            actions = [[eventful_action(mask, rng) for mask in seats] for seats in masks]
            played = torch.tensor(actions)
            mask, clock, alive = game.action_mask(state), game.clock(state), game.alive(state)
            after, reward, terminated, truncated = game.step(state, played)
            reached = game.reached(state, played, after)
            for b, reference in enumerate(references):
                if reference.over:  # it stays in the batch, its outputs are of no account
                    continue
                assert mask[b].tolist() == masks[b]
                assert clock[b].tolist() == reference.clock()
                assert alive[b].tolist() == [place is not None for place in reference.players]
                rewards, *others = reference.step(actions[b])
                assert reward[b].tolist() == pytest.approx(rewards, abs=1e-5)
                assert [x[b].tolist() for x in (terminated, truncated, reached)] == others
                assert bool((terminated | truncated)[b].all()) == reference.over
                assert places_of(after.players[b], game.width) == reference.players
                assert places_of(after.items[b], game.width) == reference.items
            state = after
    for name in EVENTS.split(","):
        assert events[name.strip()] > 0, name


def scene(script, players, items):
    """One game, seven steps after its start, with players and items in these cells."""
    return script.GridState(*map(torch.tensor, ([players], [items], [7], [0])))


def test_observations(script):
    """Planes: the player itself, those after it, kinds of items; who has left is nowhere."""
    game = script.GridGame("msh-4x4-4h1s")
    view = game.observe(scene(script, [0, -1, 10, 1], [-1, 3, 15, 12, 10]))[0, 2]
    places = [[[2, 2]], [[0, 1]], [[0, 0]], [], [], [[0, 3], [2, 2], [3, 0], [3, 3]]]
    assert [plane.nonzero().tolist() for plane in view] == places


@pytest.mark.parametrize("env_id, height, width, players, item_counts, best", IDS)
def test_ids(script, env_id, height, width, players, item_counts, best):
    game = script.GridGame(env_id)
    assert game.horizon == (35 if env_id.startswith("msh") else 50)
    assert script.GridGame(env_id, horizon=12).horizon == 12
    assert game.best_return == pytest.approx(best)
    planes = game.observe(game.start(5, generator_of(0)))
    assert planes.shape == (5, players, players + len(item_counts), height, width)
    assert planes[0, 0, players:].sum((1, 2)).tolist() == item_counts


@pytest.mark.parametrize("env_id", [*BAD_IDS, "", " msh", "msh\n"], ids=repr)
def test_bad_ids_raise_usage_error(script, env_id):
    with pytest.raises(script.UsageError) as error:
        script.GridGame(env_id)
    assert "\n" not in str(error.value)
    assert repr(env_id) in str(error.value)


def by_seat(game, state, actions):
    """All that is [B, N, ..] of a state and of the one after it, and both states."""
    after, reward, terminated, truncated = game.step(state, actions)
    reached = game.reached(state, actions, after)
    seats = [reward, terminated, truncated, reached, state.players, after.players]
    for one in (state, after):
        seats += [game.action_mask(one), game.alive(one), game.observe(one), *game.features(one)]
    return seats, [*state[1:], *after[1:], game.clock(state), game.clock(after)]


@pytest.mark.parametrize("env_id", GAMES)
def test_no_seat_and_no_game_of_the_batch_is_special(script, env_id):
    """Seats in another order, games in another order and fewer of them: the same outputs, in that
    order, from arguments that stay as they were, with no random number drawn."""
    game = script.GridGame(env_id)
    n = game.num_players
    state = situations(script, game, batch=200)
    state.time[:50] = game.horizon - 1
    actions = torch.randint(game.num_actions, (200, n), generator=generator_of(0))
    kept = [field.clone() for field in (*state, actions)]
    drawn = torch.get_rng_state()
    seats, games = by_seat(game, state, actions)
    assert all(torch.equal(a, b) for a, b in zip((*state, actions), kept))
    index = torch.randperm(200, generator=generator_of(1))[:7]
    part = by_seat(game, script.GridState(*(field[index] for field in state)), actions[index])
    for found, whole in zip(itertools.chain(*part), itertools.chain(seats, games)):
        assert torch.equal(found, whole[index])
    order = random.Random(0).sample(range(n), n)  # new seat k is old seat order[k]
    moved = state._replace(players=state.players[:, order])
    seats_2, games_2 = by_seat(game, moved, actions[:, order])
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(map(torch.equal, games_2, games))
    for found, whole in zip(seats_2, seats):
        for k, old in enumerate(order):
            distance = [(order[(k + j) % n] - old) % n for j in range(n)]
            expected = whole[:, old]
            if whole.dim() == 5:  # planes: the players from this one on, then items
                expected = expected[:, [*distance, *range(n, whole.shape[2])]]
            elif whole.dim() == 4:  # features of the co-players
                expected = expected[:, [d - 1 for d in distance[1:]]]
            assert torch.equal(found[:, k], expected)
    assert seats[2].any()
    assert seats[0].any() or n < 3


def test_starts_are_uniform(script):
    """Players on any cells, items on distinct ones, all independent: by chi square."""
    state = script.GridGame("msh-2x3-3p-1h1s").start(36000, generator_of(0))
    assert not state.time.any() and not state.first_hunt.any()
    assert (state.items[:, 0] != state.items[:, 1]).all()
    found = torch.cat([state.players, state.items], 1).unique(dim=0, return_counts=True)[1]
    counts = torch.zeros(6**4 * 5)
    counts[: len(found)] = found.float()
    freedom = len(counts) - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_features_of_who_has_left_and_what_is_gone_are_zero(script):
    """A game with a left player and gone items looks like one without them."""
    full = script.GridGame("msh-4x5-3p-3h2s")
    fewer = script.GridGame("msh-4x5-2p-2h1s")
    own, others = full.features(scene(script, [6, -1, 13], [-1, 9, 2, -1, 17]))
    own_fewer, others_fewer = fewer.features(scene(script, [6, 13], [9, 2, 17]))
    assert torch.equal(own[0, [0, 2]], own_fewer[0])
    assert torch.equal(others[0, [0, 2], [1, 0]], others_fewer[0, :, 0])
    assert not others[0, [0, 2], [0, 1]].any()  # the player that left is not seen
    own_gone, _ = full.features(scene(script, [6, -1, 13], [-1] * 5))
    assert torch.equal(own[0, 1], own_gone[0, 1])  # it sees no items, and still the clock
    assert own[0, 1].any()


def test_how_another_looks_tells_where_it_is_from_here(script):
    """Every relative cell looks different, and the same from everywhere."""
    game = script.GridGame("msh-3x4-2p-1h1s")
    looks = defaultdict(set)
    for here, there in itertools.product(range(12), repeat=2):
        _, others = game.features(scene(script, [here, there], [0, 11]))
        place = (there // 4 - here // 4, there % 4 - here % 4)
        looks[place].add(tuple(others[0, 0, 0, : game.subgoal_size].tolist()))
    assert all(len(seen) == 1 for seen in looks.values())
    assert len(set.union(*looks.values())) == len(looks)


def test_the_clock_by_hand(script):
    """Shares done and left, soon, at most five left, one, two, three left, an end before the
    horizon. With 0 left V is not trained: it reads, to bootstrap, as with 1 left."""
    game = script.GridGame("msh-4x4-2p-1h1s")
    state = game.start(5, generator_of(0))
    times = torch.tensor([0, 7, 32, 30, 35])
    hunts = torch.tensor([0, 4, 0, 30, 0])
    left = torch.tensor([35, 2, 3, 5, 1])
    numbers = [times / 35, left / 35, (-left / 8).exp(), left <= 5]
    numbers += [left == 1, left == 2, left == 3, times == 7]
    expected = torch.stack([number.float() for number in numbers], 1)
    own, _ = game.features(state._replace(time=times, first_hunt=hunts))
    torch.testing.assert_close(own[..., :8], expected[:, None].expand(5, 2, 8))


def test_subgoals(script):
    """Each item as each player sees it, like a player on its cell, and whether it is there."""
    game = script.GridGame("msh-4x4-3p-3h2s")
    players, items = [5, 0, 7], [1, 14, 3, -1, 9]
    features, present = game.subgoals(scene(script, players, items))
    assert present.tolist() == [[[True, True, True, False, True]] * 3]
    for i, m in itertools.product(range(3), range(5)):
        _, others = game.features(scene(script, [players[i], items[m], 0], items))
        assert torch.equal(features[0, i, m], others[0, 0, 0, : game.subgoal_size])
    own, _ = game.features(scene(script, players, items))
    kinds = [features[:, :, :2].sum(2), features[:, :, 2:].sum(2)]
    torch.testing.assert_close(own[..., 13:], torch.cat(kinds, 2))

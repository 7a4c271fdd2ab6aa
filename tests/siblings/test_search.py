"""The tree search against slow references: its arithmetic on small invented worlds, and what it asks of the games."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from siblings.test_planner import situations, some_goals

HUNT, DRIFTS = "msh-3x3-3p-2h1s", "msg-2x3-3p-3d"
STAY = 4


# ---------------------------------------------------------------------------------------------------------------------
# Invented worlds: what follows depends on the path alone, one world for each tree
# ---------------------------------------------------------------------------------------------------------------------
class World:
    """What a search meets after the actions of `path`, drawn from `seed` and the path, or as `known` has it."""

    def __init__(self, seed, actions, known=None, flat=False, ends=0.15):
        self.seed, self.actions, self.known, self.flat, self.ends = seed, actions, known or {}, flat, ends

    def prior(self, path):
        """Of every action; -1: illegal. `flat`: 0 for most of the legal ones."""
        rng = random.Random(f"{self.seed} prior {path}")
        legal = [rng.random() < 0.7 for _ in range(self.actions)]
        legal[rng.randrange(self.actions)] = True
        weight = [rng.random() ** 2 * ok for ok in legal]
        if self.flat:
            weight = [w * (w == max(weight)) for w in weight]
        return [w / sum(weight) if ok else -1.0 for w, ok in zip(weight, legal, strict=True)]

    def after(self, path):
        """Reward on the way to `path`, value there, and whether anything follows."""
        if path in self.known:
            return self.known[path]
        rng = random.Random(f"{self.seed} after {path}")
        reward, value, end = rng.choice([0.0, 0.0, rng.uniform(-3, 3)]), rng.uniform(-2, 2), rng.random()
        return reward, value * (end >= self.ends), end >= 1.5 * self.ends  # it ends, is cut, or goes on


class Model:
    """The worlds as a search sees them; notes what it asks for."""

    def __init__(self, worlds, dtype=torch.float64):
        self.worlds, self.dtype, self.path = worlds, dtype, {t: () for t in range(len(worlds))}
        self.expanded, self.taken = [], []

    def expand(self, nodes):
        self.expanded += nodes.tolist()
        priors = [self.worlds[node % len(self.worlds)].prior(self.path[node]) for node in nodes.tolist()]
        return torch.tensor(priors, dtype=self.dtype)

    def step(self, nodes, actions, simulation):
        results = []
        for node, action in zip(nodes.tolist(), actions.tolist(), strict=True):
            t = node % len(self.worlds)
            assert self.worlds[t].prior(self.path[node])[action] >= 0
            path = self.path[simulation * len(self.worlds) + t] = (*self.path[node], action)
            self.taken.append((t, path))
            results.append(self.worlds[t].after(path))
        reward, value, goes_on = zip(*results, strict=True)
        return torch.tensor(reward, dtype=self.dtype), torch.tensor(value, dtype=self.dtype), torch.tensor(goes_on)


def roots_of(worlds):
    prior = torch.tensor([world.prior(()) for world in worlds], dtype=torch.float64)
    return prior, torch.tensor([world.after(())[1] for world in worlds], dtype=torch.float64)


def grown(script, worlds, simulations, constant=1.25, gamma=0.9, most=50, dtype=torch.float64):
    """A search that has run on the worlds: itself, Q and visits of the roots, and the model."""
    model, (prior, value) = Model(worlds, dtype), roots_of(worlds)
    search = script.TreeSearch(model, prior.to(dtype), value.to(dtype), simulations, constant, gamma, most)
    return search, *search.run(), model


class Node:
    """A node of the reference: plain recursion over one tree."""

    def __init__(self, world, path, most):
        self.world, self.path, self.prior, self.most = world, path, world.prior(path), most
        self.reward, self.value, goes_on = world.after(path)
        self.goes_on = path == () or goes_on and len(path) < most
        self.visits, self.total, self.children = [0] * world.actions, [0.0] * world.actions, {}

    def pick(self, constant):
        """Highest Q scaled to 0..1, plus c pi sqrt(N) / (1 + n); what was not tried has the mean of V and returns."""
        count = sum(self.visits)
        mean = (self.value + sum(self.total)) / (1 + count)
        q = [total / n if n else mean for total, n in zip(self.total, self.visits, strict=True)]
        legal = [a for a, p in enumerate(self.prior) if p >= 0]
        untried = [a for a in legal if not self.visits[a]]
        among = untried if self.path == () and untried else legal  # every action of the root once before any twice
        spread = max(max(q) - min(q), 1e-8)
        score = {a: (q[a] - min(q)) / spread + constant * self.prior[a] * math.sqrt(count) / (1 + self.visits[a])
                 for a in among}  # fmt: skip
        return max(score, key=score.get) if count else max(among, key=lambda a: self.prior[a])

    def simulate(self, constant, gamma):
        """The return of one more simulation through this node."""
        action = self.pick(constant)
        if action not in self.children:
            child = self.children[action] = Node(self.world, (*self.path, action), self.most)
            future = child.value
        else:
            child = self.children[action]
            future = child.simulate(constant, gamma) if child.goes_on else child.value
        self.visits[action] += 1
        self.total[action] += child.reward + gamma * future
        return child.reward + gamma * future


def assert_same_tree(search, number, node):
    assert search.visits[number].tolist() == node.visits, node.path
    assert search.total[number].tolist() == pytest.approx(node.total)
    for action in range(len(node.visits)):
        below = int(search.child[number, action])
        assert (below >= 0) == (action in node.children)
        if below >= 0:
            child = node.children[action]
            assert int(search.depth[below]) == len(child.path)
            assert float(search.reward[below]) == pytest.approx(child.reward)
            assert float(search.value[below]) == pytest.approx(child.value)
            assert_same_tree(search, below, child)


@pytest.mark.parametrize(
    "actions, simulations, constant, gamma, most",
    [(2, 60, 1.25, 0.9, 50), (4, 80, 1.25, 0.99, 50), (5, 70, 8.0, 0.5, 3), (7, 40, 0.3, 1.0, 2), (3, 3, 1.0, 0.9, 50)],
)
def test_trees_equal_a_plain_recursion(script, actions, simulations, constant, gamma, most):
    """Every node of twelve trees: visits to the last one, summed returns, rewards, values, depths and children."""
    worlds = [World(seed, actions) for seed in range(12)]
    search, q, visits, model = grown(script, worlds, simulations, constant, gamma, most)
    deepest = 0
    for t, world in enumerate(worlds):
        root = Node(world, (), most)
        for _ in range(simulations):
            root.simulate(constant, gamma)
        assert_same_tree(search, t, root)
        mean = (root.value + sum(root.total)) / (1 + simulations)
        expected = [total / n if n else mean for total, n in zip(root.total, root.visits, strict=True)]
        assert q[t].tolist() == pytest.approx(expected)
    assert visits.sum(1).tolist() == [simulations] * 12
    deepest = max(len(path) for _, path in model.taken)
    assert deepest == most if most < 5 else deepest > min(4, simulations // actions)
    assert len(model.expanded) == len(set(model.expanded))  # at most once each, and no root


def test_a_stored_tree(script):
    """Figures of the search on three worlds, worked out once by the recursion above and written down here."""
    _, q, visits, _ = grown(script, [World(seed, 4) for seed in ("a", "b", "c")], 30, dtype=torch.float32)
    assert visits.tolist() == STORED_VISITS
    torch.testing.assert_close(q, torch.tensor(STORED_Q), rtol=1e-4, atol=1e-4)


STORED_VISITS = [[0.0, 2.0, 26.0, 2.0], [22.0, 5.0, 2.0, 1.0], [2.0, 2.0, 26.0, 0.0]]
STORED_Q = [
    [-0.18347, -1.64699, -0.1074, -0.38968],  # the first action is illegal, and has the root's mean
    [0.0, -0.12756, -0.48525, -1.9967],
    [-1.78715, -1.28759, 1.33693, 0.90669],
]


@pytest.mark.parametrize("flat", [False, True])
def test_every_legal_root_action_once_before_any_twice(script, flat):
    """And never an illegal one, though the prior be 0 for legal ones."""
    worlds = [World(seed, 6, flat=flat) for seed in range(40)]
    for simulations in (1, 2, 4, 6, 15):
        _, q, visits, model = grown(script, worlds, simulations)
        assert visits.sum(1).tolist() == [simulations] * 40
        for t, world in enumerate(worlds):
            legal = [a for a, p in enumerate(world.prior(())) if p >= 0]
            assert not any(visits[t, a] for a in range(6) if a not in legal)
            first = [path[0] for tree, path in model.taken if tree == t][: len(legal)]
            assert len(set(first)) == len(first) and set(first) <= set(legal)
            if simulations < len(legal):
                (untried,) = {float(q[t, a]) for a in range(6) if not visits[t, a]}  # as the root's mean
                seen = sum(float(q[t, a] * visits[t, a]) for a in first)
                assert untried == pytest.approx((world.after(())[1] + seen) / (1 + simulations))


# ---------------------------------------------------------------------------------------------------------------------
# Values, by hand
# ---------------------------------------------------------------------------------------------------------------------
class Corridor(World):
    """One way only, by action 1 of three, with the rewards, values and ends given for each step."""

    def __init__(self, *steps):
        super().__init__(0, 3)
        self.steps = ((0.0, 100.0, True), *steps)

    def prior(self, path):
        return [-1.0, 1.0, -1.0]

    def after(self, path):
        return self.steps[len(path)]


def test_returns_by_hand(script):
    """Rewards along the path and V at its end, discounted by 0.5 a step; V is 0 after an end and counts after a cut."""
    worlds = [
        Corridor((1.0, 10.0, True), (2.0, 20.0, True), (4.0, 40.0, True)),
        Corridor((1.0, 10.0, True), (2.0, 0.0, False)),  # ends with the second step
        Corridor((1.0, 10.0, True), (2.0, 20.0, False)),  # is cut after the second step
        Corridor((-3.0, 0.0, False)),  # ends with the first step
    ]
    search, q, visits, model = grown(script, worlds, 3, gamma=0.5)
    first, second, third = 1 + 0.5 * 10, 1 + 0.5 * (2 + 0.5 * 20), 1 + 0.5 * (2 + 0.5 * (4 + 0.5 * 40))
    expected = [(first + second + third) / 3, (first + 2 * (1 + 0.5 * 2)) / 3, (first + 2 * second) / 3, -3.0]
    assert q[:, 1].tolist() == pytest.approx(expected)
    assert visits.tolist() == [[0.0, 3.0, 0.0]] * 4
    paths = {t: [path for tree, path in model.taken if tree == t] for t in range(4)}
    assert paths[0] == [(1,), (1, 1), (1, 1, 1)] and paths[1] == paths[2] == [(1,), (1, 1)]
    assert paths[3] == [(1,)]  # nothing follows: the step counts again, and is not taken again
    assert float(search.total[4, 1]) == pytest.approx((2 + 0.5 * 20) + (2 + 0.5 * 24))  # of the node after one step
    assert set(model.expanded) == {4, 5, 6, 8}  # the nodes from which a step was taken: no ends, no leaves
    _, q, _, _ = grown(script, worlds, 3, gamma=0.5, most=1)
    assert q[:, 1].tolist() == pytest.approx([first, first, first, -3.0])
    _, q, _, _ = grown(script, worlds, 3, gamma=0.5, most=2)
    assert q[:, 1].tolist() == pytest.approx([(first + 2 * second) / 3, expected[1], expected[2], -3.0])


def test_one_step_ahead_is_reward_and_value(script):
    """With one step ahead each Q is r + gamma V, however often it is tried."""
    worlds = [World(seed, 5) for seed in range(20)]
    for simulations in (5, 23):
        _, q, visits, _ = grown(script, worlds, simulations, gamma=0.8, most=1)
        for t, world in enumerate(worlds):
            for a in range(5):
                if visits[t, a]:
                    reward, value, _ = world.after((a,))
                    assert float(q[t, a]) == pytest.approx(reward + 0.8 * value)


def test_a_tree_does_not_depend_on_the_rest_of_its_batch(script):
    worlds = [World(seed, 4) for seed in range(9)]
    _, q, visits, _ = grown(script, worlds, 50)
    for chosen in ([4], [8, 0, 3], list(range(8, -1, -1)), [2] * 20):
        _, q_2, visits_2, _ = grown(script, [worlds[t] for t in chosen], 50)
        assert torch.equal(visits_2, visits[chosen]) and torch.equal(q_2, q[chosen])


def best_value(world, path, depth, gamma):
    """What the best actions bring from `path` on, to `depth` more steps and V there."""
    outcomes = []
    for action, p in enumerate(world.prior(path)):
        if p >= 0:
            reward, value, goes_on = world.after((*path, action))
            follows = goes_on and depth > 1
            outcomes.append(
                reward + gamma * (best_value(world, (*path, action), depth - 1, gamma) if follows else value)
            )
    return max(outcomes)


def test_the_search_improves_on_its_prior(script):
    """The action tried most is worth more than one drawn from the prior, and more the longer the search."""
    worlds, gamma, gains = [World(f"gain {seed}", 4) for seed in range(60)], 0.9, []
    runs = [grown(script, worlds, simulations, gamma=gamma, most=3)[2] for simulations in (8, 32, 200)]
    for t, world in enumerate(worlds):
        worth = {}
        for action, p in enumerate(world.prior(())):
            if p >= 0:
                reward, value, goes_on = world.after((action,))
                worth[action] = reward + gamma * (best_value(world, (action,), 2, gamma) if goes_on else value)
        base = sum(world.prior(())[a] * w for a, w in worth.items())
        gains.append([*(worth[int(visits[t].argmax())] - base for visits in runs), max(worth.values()) - base])
    short, middle, long, best = (sum(column) / len(column) for column in zip(*gains, strict=True))
    assert best > long > middle > short and short > 0.35 * best and long > 0.6 * best


# ---------------------------------------------------------------------------------------------------------------------
# What the search asks of the games
# ---------------------------------------------------------------------------------------------------------------------
def seed(number):
    return torch.Generator().manual_seed(number)


def clear(game, state):
    """Those of the games that go on."""
    over = (state.items < 0).all(1) | (state.players < 0).all(1) | (game.clock(state)[:, 1] <= 0)
    return state.rows(~over)


def some_memory(script, agent, batch, number=5):
    """Sums as of several steps, that of the match the larger; the count last."""
    empty = agent.moa.initial_memory(batch)
    sums = [torch.randn(total.shape, generator=seed(number + k)) * (3 - k) for k, total in enumerate(empty)]
    return script.Memory(*(torch.cat([x[..., :-1], 9.0 * x[..., -1:].abs()], -1) for x in sums))


@torch.no_grad()
def moa_chances(agent, state, goal):
    """float32 [B, N, A] pi_hat of every seat."""
    own, others = agent.relative(state)
    return agent.moa.decoder(own, others, goal).masked_fill(~agent.game.action_mask(state), -1e9).softmax(2)


@torch.no_grad()
def values(agent, state, goal):
    """float32 [B, N] of the critic, whoever has left."""
    own, others = agent.relative(state)
    return agent.critic(own, *agent.with_goals(others, goal)).squeeze(2)


ODD_GAMES = [HUNT, DRIFTS, "msh-2x3-4p-2h2s", "msh-1x5-2p-0h2s", "msh-4x1-3p-0h1s", "msg-1x1-2p-1d", "msg-5x2-6p-4d"]


@pytest.mark.parametrize("env_id", ODD_GAMES)
def test_tabulated_networks_are_the_networks(script, lively, env_id):
    """Policy, value and MOA of every seat, whoever has left and whatever is gone."""
    agent = lively(env_id=env_id)
    game, state = situations(script, env_id, batch=20)
    relative, goal, n = agent.relative, some_goals(agent, state), game.num_players
    own, others = relative(state)
    joined, total = agent.with_goals(others, goal)
    clock = game.clock(state)
    with torch.no_grad():
        nodes = {name: script.NodeNetwork(getattr(agent, name), relative) for name in ("actor", "critic")}
        nodes["decoder"] = script.NodeNetwork(agent.moa.decoder, relative)
        for name, network in nodes.items():
            plain = (
                agent.moa.decoder(own, others, goal) if name == "decoder" else getattr(agent, name)(own, joined, total)
            )
            for i in range(n):
                company = relative.others[i]
                kind, size = game.item_kind * len(relative.table), game.num_cells + 1
                rows = [relative.index(state.players[:, [j]], state.items) + kind for j in (i, *company.tolist())]
                seen = torch.stack([network.other[row].sum(1) for row in rows[1:]], 1)
                near = relative.index(state.players[:, [i]], state.players[:, company])
                seen = seen + network.other[near + len(game.item_counts) * len(relative.table)]
                theirs, whole = (
                    (0.0, goal[:, i]) if name == "decoder" else (goal[:, company] @ network.other_goal, total[:, i])
                )
                where = len(game.item_counts) * len(relative.table) + state.players[:, i] % size
                when = len(network.own) + (clock * torch.tensor([game.horizon + 1, 1])).sum(1) - (game.horizon + 1) ** 2
                own_rows = torch.cat([when.unsqueeze(1), where.unsqueeze(1), rows[0]], 1)
                result = network(own_rows, seen + theirs, network.network.goal(whole))
                torch.testing.assert_close(result, plain[:, i], rtol=1e-5, atol=1e-5)
        assert plain.std() > 0.05
    if env_id in ODD_GAMES[:3]:
        assert (state.items < 0).any() and (game.family == "msg" or (state.players < 0).any())


@pytest.mark.parametrize("refresh, horizon", [(0, "bootstrap"), (0, "end"), (1, "bootstrap"), (2, "bootstrap")])
@pytest.mark.parametrize("env_id", [HUNT, DRIFTS, "msh-2x3-4p-2h2s"])
def test_steps_of_the_model(script, lively, env_id, refresh, horizon):
    """Five steps down every tree, each against the game and the networks themselves: what the focal player would do,
    what the co-players do, rewards, values, ends; and goals, kept or inferred again with what was seen on the way."""
    agent = lively(env_id=env_id, goal_refresh=refresh, plan_horizon=horizon, reward_scale=0.37, prosocial=0.3)
    game, state = situations(script, env_id, batch=60, seed=refresh)
    state = clear(game, state)
    trees, n, actions_of = len(state.players), game.num_players, torch.arange(game.num_actions)
    start, events = state, Counter()
    memory, goal = some_memory(script, agent, trees), some_goals(agent, state)
    log_std, noise = some_goals(agent, state, 3) / 4 - 1, some_goals(agent, state, 4)
    draws, roots = torch.rand(trees, 6, n, generator=seed(6)), torch.arange(trees)
    drawn, nodes, nothing = goal + noise * log_std.exp(), roots, torch.zeros(trees, dtype=torch.bool)
    known = known_at_roots = [*memory, goal, drawn]
    with torch.no_grad():
        model = script.GameModel(agent, state, memory, (goal, log_std, drawn), draws)
        for simulation in range(1, 6):
            mask, order = game.action_mask(state), torch.randperm(trees, generator=seed(7))
            *memory, goal, drawn = known
            prior = torch.empty(trees, game.num_actions)
            prior[order] = model.expand(nodes[order])
            own, others = agent.relative(state)
            policy = agent.actor(own, *agent.with_goals(others, goal))[:, 0].masked_fill(~mask[:, 0], -1e9).softmax(1)
            torch.testing.assert_close(prior, policy.masked_fill(~mask[:, 0], -1.0), rtol=1e-4, atol=1e-5)
            # the co-players' draws fall into the parts that pi_hat makes of 0..1
            upto, draw = moa_chances(agent, state, drawn).cumsum(2)[:, 1:], draws[roots, nodes // trees, 1:, None]
            joint, sure = model.joint[nodes], ((upto - draw).abs().amin(2) > 1e-4)
            assert torch.equal(joint[:, 1:][sure], (upto < draw).sum(2)[sure]) and sure.float().mean() > 0.9
            likely = torch.rand(trees, game.num_actions, generator=seed(8 + simulation)) + (actions_of > STAY)
            actions = (likely * mask[:, 0]).argmax(1)
            joint = torch.cat([actions.unsqueeze(1), joint[:, 1:]], 1)
            reward, value, goes_on = model.step(nodes, actions, simulation)
            after, rewards, terminated, truncated = game.step(state, joint)
            left = after.players[:, 0] < 0
            torch.testing.assert_close(reward, (0.7 * rewards[:, 0] + 0.3 * rewards.sum(1) / n) * 0.37)
            memory = agent.remember(script.Memory(*memory), state, joint, nothing, nothing)
            if refresh:
                again = ((after.time - start.time) % refresh == 0).view(-1, 1, 1)
                fresh, fresh_log_std = agent.infer(memory, *agent.relative(after), None)
                drawn = torch.where(again, fresh + noise * fresh_log_std.exp(), drawn)
                goal = torch.where(again, fresh, goal)
            worth = values(agent, after, goal)[:, 0].masked_fill(
                left | terminated | (truncated & (horizon == "end")), 0.0
            )
            torch.testing.assert_close(value, worth, rtol=1e-4, atol=2e-5)
            assert torch.equal(goes_on, ~(left | terminated | truncated))
            events += Counter(left=int((left & ~terminated).sum()), ended=int(terminated.sum()))
            events += Counter(cut=int(truncated.sum()), paid=int((reward != 0).sum()), on=int(goes_on.sum()))
            # down to the new node, or at the root again where nothing follows
            nodes, state = torch.where(goes_on, simulation * trees + roots, roots), start.replaced(goes_on, after)
            pairs = zip([*memory, goal, drawn], known_at_roots, strict=True)
            known = [torch.where(goes_on.view(-1, 1, 1), new, root) for new, root in pairs]
            events["deep"] = max(events["deep"], int((state.time - start.time).max()))
    assert min(events[name] for name in ("ended", "cut", "paid", "on")) > 5 and events["deep"] == 5, events
    assert game.family == "msg" or events["left"] > 5


@pytest.mark.parametrize("co_player_model", ["moa", "uniform"])
def test_co_players_are_drawn_by_their_chances(script, lively, co_player_model):
    """Frequencies over many draws, each seat for itself: the MOA's, or the same for every legal action."""
    trees = 6000
    agent = lively(env_id=HUNT, co_player_model=co_player_model)
    game, state = situations(script, HUNT, batch=2, steps=3)
    state = clear(game, state)
    for b in range(len(state.players)):
        one = state.rows(torch.full((trees,), b))
        goal = some_goals(agent, state.rows(torch.tensor([b])), b).expand(trees, -1, -1)
        draws = torch.rand(trees, 2, 3, generator=seed(b))
        with torch.no_grad():
            memory = agent.moa.initial_memory(trees)
            model = script.GameModel(agent, one, memory, (goal, goal, goal), draws)
            model.expand(torch.arange(trees))
            mask = game.action_mask(one)[0]
            chance = moa_chances(agent, one, goal)[0] if co_player_model == "moa" else mask / mask.sum(1, keepdim=True)
        played = torch.nn.functional.one_hot(model.joint[:trees, 1:], game.num_actions).float()
        spread = (chance[1:] * (1 - chance[1:]) / trees).sqrt()
        assert ((played.mean(0) - chance[1:]).abs() <= 4.5 * spread + 1e-6).all()
        together = (played[:, 0] * played[:, 1]).sum(1).mean()
        assert abs(float(together) - float((chance[1] * chance[2]).sum())) <= 4.5 * 0.5 / trees**0.5


@pytest.mark.parametrize("co_player_model", ["moa", "uniform"])
def test_the_first_and_the_last_draw_are_legal(script, lively, co_player_model):
    agent = lively(env_id="msh-3x3-4p-2h1s", co_player_model=co_player_model)
    game, state = situations(script, "msh-3x3-4p-2h1s", batch=60)
    goal, trees, mask = some_goals(agent, state), len(state.players), game.action_mask(state)
    for draw in (0.0, 1.0 - 2.0**-24):
        with torch.no_grad():
            draws, memory = torch.full((trees, 2, 4), draw), agent.moa.initial_memory(trees)
            model = script.GameModel(agent, state, memory, (goal, goal, goal), draws)
            model.expand(torch.arange(trees))
        joint = model.joint[:trees, 1:]
        assert mask[:, 1:].gather(2, joint.unsqueeze(2)).all()
        if draw == 0.0:
            assert torch.equal(joint, mask[:, 1:].int().argmax(2))
        else:
            assert torch.equal(joint, game.num_actions - 1 - mask[:, 1:].flip(2).int().argmax(2))


# ---------------------------------------------------------------------------------------------------------------------
# Searches of games
# ---------------------------------------------------------------------------------------------------------------------
def search_games(script, agent, state, goals, memory, draws, simulations):
    """Q and visits [T, A] of seat 0 of every game, with the goals, memories and draws given."""
    with torch.no_grad():
        model = script.GameModel(agent, state, memory, goals, draws)
        prior, args = model.expand(torch.arange(len(draws))), agent.args
        value = values(agent, state, goals[0])[:, 0]
        search = script.TreeSearch(model, prior, value, simulations, args.puct_c, args.gamma, args.max_depth)
        return search.run()


@pytest.mark.parametrize("refresh", [0, 1])
def test_searches_do_not_depend_on_the_rest_of_the_batch(script, lively, refresh):
    """Each tree alone, in another order, and among other trees: the same visits and Q."""
    agent = lively(env_id=HUNT, goal_refresh=refresh)
    game, state = situations(script, HUNT, batch=10)
    state = clear(game, state)
    trees = len(state.players)
    inputs = [some_goals(agent, state, k) for k in (1, 2, 3)]
    inputs = [*inputs, *some_memory(script, agent, trees), torch.rand(trees, 31, 3, generator=seed(0))]

    def run(rows):
        goal, log_std, drawn, *memory, draws = (x[rows] for x in inputs)
        memory = script.Memory(*memory)
        return search_games(script, agent, state.rows(rows), (goal, log_std, drawn), memory, draws, 30)

    q, visits = run(torch.arange(trees))
    assert (visits.sum(1) == 30).all() and q.std() > 0.05
    for rows in (torch.tensor([0]), torch.tensor([17]), torch.randperm(trees, generator=seed(1)), torch.arange(0, 9)):
        q_2, visits_2 = run(rows)
        assert torch.equal(visits_2, visits[rows])
        torch.testing.assert_close(q_2, q[rows], rtol=1e-4, atol=1e-5)


def decide(script, agent, state, memory=None, seats=None, number=0, oracle=None):
    """A Decision for every seat, and the visits behind it."""
    mask, plan, seen = agent.game.action_mask(state), agent.plan, []
    memory = agent.moa.initial_memory(len(mask)) if memory is None else memory
    seats = torch.ones_like(mask[..., 0]) if seats is None else seats
    agent.plan = lambda *inputs: seen.append(plan(*inputs)) or seen[0]
    try:
        decision = agent.act(state, mask, memory, seats, seed(number), oracle)
    finally:
        del agent.plan
    return decision, seen[0][1]


def test_parts_of_the_batch_give_the_same_decision(script, lively):
    """As many trees at a time as fit into the cache, or three: nothing else changes."""
    agent = lively(env_id=HUNT, num_simulations=20, num_goal_samples=4).eval()
    game, state = situations(script, HUNT, batch=2)
    state = clear(game, state)
    whole, visits = decide(script, agent, state)
    agent.chunks = lambda count: torch.arange(count).split(7)
    parts, visits_2 = decide(script, agent, state)
    torch.testing.assert_close(parts.q_plan, whole.q_plan, rtol=1e-4, atol=1e-5)
    assert torch.equal(visits, visits_2) and whole.q_plan.abs().max() > 0.1
    del agent.chunks
    for count in (0, 1, 640, 641, 2000):
        assert torch.cat(agent.chunks(count)).tolist() == list(range(count))


@pytest.mark.parametrize("refresh", [0, 1])
@pytest.mark.parametrize("env_id", [HUNT, DRIFTS, "msh-2x3-4p-2h2s"])
def test_no_seat_is_special(script, lively, monkeypatch, env_id, refresh):
    """Seats relabelled, with their goals and memories; one draw for all of a node's co-players: all is relabelled."""
    agent = lively(env_id=env_id, num_simulations=20, goal_refresh=refresh).eval()
    game, state = situations(script, env_id, batch=8)
    state = clear(game, state)
    memory, model = some_memory(script, agent, len(state.players)), script.GameModel
    noise = torch.randn(2, agent.moa.goal_size, generator=seed(0))
    shared = torch.rand(21, generator=seed(1))

    def drawn(goal, log_std, samples, generator):
        return goal.unsqueeze(2) + noise * log_std.exp().unsqueeze(2)

    def same_draws(agent, state, memory, goals, draws):
        return model(agent, state, memory, goals, shared[None, :, None].expand(draws.shape))

    monkeypatch.setattr(script, "GameModel", same_draws)
    agent.sample_goals = drawn
    decision, visits = decide(script, agent, state, memory)
    n = game.num_players
    for seats in ([*range(1, n), 0], [1, 0, *range(2, n)]):
        moved = script.Memory(*(x[:, seats] for x in memory))
        other, visits_2 = decide(script, agent, state._replace(players=state.players[:, seats]), moved)
        torch.testing.assert_close(other.q_plan, decision.q_plan[:, seats], rtol=1e-4, atol=2e-5)
        assert (visits_2 == visits[:, seats]).float().mean() > 0.999
    searched = visits.sum(2) > 0
    assert torch.equal(searched, (state.players >= 0) & (game.action_mask(state).sum(2) > 1))
    assert (visits.sum(2)[searched] == 20 * 2).all() and visits[searched].std() > 1


def test_the_search_runs_where_it_is_asked_to(script, lively):
    """Scores and visits of the seats asked for, in the game and with a choice; else zeros, and yet a policy."""
    for target in ("q", "visits"):
        agent = lively(env_id="msh-2x3-4p-2h2s", policy_target=target, plan_update="hop", num_simulations=9)
        agent.plan_slope.fill_(1.0)
        game, state = situations(script, "msh-2x3-4p-2h2s", batch=10)
        mask = game.action_mask(state)
        some = torch.rand(state.players.shape, generator=seed(0)) < 0.5
        for seats in (some, some & False):
            decision, visits = decide(script, agent, state, seats=seats)
            wanted = seats & (state.players >= 0) & (mask.sum(2) > 1)
            assert torch.equal(visits.sum(2), 9.0 * 2 * wanted)
            assert not visits[~mask].any() and not decision.q_plan[~mask].any() and not decision.q_plan[~wanted].any()
            assert (decision.q_plan[wanted] != 0).any(1).float().sum() >= 0.7 * wanted.sum()
            assert mask.gather(2, decision.action.unsqueeze(2)).all()
            free = -mask.sum(2).float().log()  # uniform where nothing is known
            torch.testing.assert_close(decision.log_prob[~wanted], free[~wanted])
            assert decision.log_prob.isfinite().all() and decision.offset[mask].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# One step ahead
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def expectations(agent, state, goal, b, i):
    """Mean and variance [A] of r + gamma V' of seat `i` of game `b`, over all joint actions of its co-players."""
    game, args = agent.game, agent.args
    mask, chances = game.action_mask(state)[b], moa_chances(agent, state, goal)[b]
    company = [j for j in range(game.num_players) if j != i]
    joint = torch.tensor(list(itertools.product(*(mask[j].nonzero().flatten().tolist() for j in company))))
    weight = math.prod(chances[j][joint[:, k]] for k, j in enumerate(company))
    mean, variance = torch.zeros(game.num_actions), torch.zeros(game.num_actions)
    for action in mask[i].nonzero().flatten().tolist():
        actions = torch.full((len(joint), game.num_players), action)
        actions[:, company] = joint
        rows = torch.full((len(joint),), b)
        after, reward, terminated, _ = game.step(state.rows(rows), actions)
        value = values(agent, after, goal[rows])[:, i].masked_fill((after.players[:, i] < 0) | terminated, 0.0)
        score = reward[:, i] * args.reward_scale + args.gamma * value
        mean[action] = (weight * score).sum()
        variance[action] = (weight * (score - mean[action]).square()).sum()
    return mean, variance


@pytest.mark.parametrize("env_id, simulations, most", [(HUNT, 7, 1), (DRIFTS, 6, 1), (HUNT, 4, 50)])
def test_one_step_ahead_is_the_exact_expectation(script, lively, env_id, simulations, most):
    """Many trees, each with one draw of the co-players' actions: the mean over all joint actions, with true goals. A
    limit of one step, or as many simulations as legal actions."""
    samples = 1500
    agent = lively(env_id=env_id, num_goal_samples=samples, num_simulations=simulations, max_depth=most, goal="oracle")
    game, state = situations(script, env_id, batch=6, seed=3)
    state = clear(game, state)
    mask, goal = game.action_mask(state), some_goals(agent, state)
    wanted = (state.players >= 0) & (mask.sum(2) > 1) & ((mask.sum(2) == simulations) | (most == 1))
    wanted &= wanted.flatten().cumsum(0).view(wanted.shape) <= 12
    decision, visits = decide(script, agent.eval(), state, seats=wanted, oracle=goal)
    spreads = []
    for b, i in wanted.nonzero().tolist():
        mean, variance = expectations(agent, state, goal, b, i)
        legal = mask[b, i]
        error = (decision.q_plan[b, i] - mean).abs()[legal]
        assert (error <= 4.5 * (variance[legal] / samples).sqrt() + 1e-4).all()
        spreads.append(float(variance.max()))
        if most > 1:
            assert (visits[b, i][legal] == samples).all()
    assert len(spreads) == 12 and max(spreads) > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The best action
# ---------------------------------------------------------------------------------------------------------------------
def forced(agent, preferences):
    """The agent with co-players that play by fixed preferences [A], a uniform prior, and no value at the leaves."""
    with torch.no_grad():
        agent.actor.out.weight.zero_()
        agent.actor.out.bias.zero_()
        agent.moa.decoder.out.weight.zero_()
        agent.moa.decoder.out.bias.copy_(torch.tensor(preferences[: agent.game.num_actions]) * 40.0)
        agent.critic.out.weight.zero_()
        agent.critic.out.bias.zero_()
    return agent.eval()


def best_returns(agent, state, b, preferences, steps):
    """[A]: the most that seat 0 can get with each first action, by playing out all its plans."""
    game, gamma = agent.game, agent.args.gamma
    plans = torch.cartesian_prod(*[torch.arange(game.num_actions)] * steps)  # [P, steps]
    now, going = state.rows(torch.full((len(plans),), b)), torch.ones(len(plans), dtype=torch.bool)
    total, valid = torch.zeros(len(plans)), going.clone()
    for k in range(steps):
        mask = game.action_mask(now)
        valid &= mask[:, 0].gather(1, plans[:, k : k + 1]).squeeze(1) | ~going
        joint = torch.tensor(preferences[: game.num_actions]).expand(mask.shape).masked_fill(~mask, -1e9).argmax(2)
        joint[:, 0] = plans[:, k]
        after, reward, terminated, truncated = game.step(now, joint)
        total += gamma**k * reward[:, 0] * going
        going = going & (after.players[:, 0] >= 0) & ~terminated & ~truncated
        now = after
    total = total.masked_fill(~valid, -math.inf).view(game.num_actions, -1)
    return total.amax(1)


HELPING, IDLE = [0.0, 0.0, 0.0, 0.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("preferences", [HELPING, IDLE], ids=["helping", "idle"])
@pytest.mark.parametrize("env_id", ["msh-2x3-2p-1h1s", "msh-1x4-3p-2h1s", "msg-2x3-2p-2d", "msg-2x2-1p-2d"])
def test_the_best_action_is_found(script, lively, env_id, preferences):
    """Co-players of one fixed rule, the last three steps of the game: by the end of a long search the action tried most
    is worth as much as the best of all plans."""
    agent = forced(lively(env_id=env_id, num_simulations=600, num_goal_samples=1, gamma=0.9, puct_c=4.0), preferences)
    game, state = agent.game, agent.game.initial_state(16, seed(0))
    state = state._replace(time=torch.full_like(state.time, game.horizon - 3))
    seats = torch.zeros_like(state.players, dtype=torch.bool)
    seats[:, 0] = True
    decision, visits = decide(script, agent, state, seats=seats)
    mattered = 0
    for b in range(16):
        best = best_returns(agent, state, b, preferences, 3)
        legal = best[best > -math.inf]
        chosen = int(visits[b, 0].argmax())
        assert float(best[chosen]) >= float(best.max()) - 1e-5, (b, best, visits[b, 0])
        mattered += bool(legal.max() > legal.min() + 0.01)
        assert (decision.q_plan[b, 0] <= best.clamp(min=-9) * agent.args.reward_scale + 1e-5)[best > -math.inf].all()
    assert mattered >= 5


# ---------------------------------------------------------------------------------------------------------------------
# From searches to a policy
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def priors(script, monkeypatch):
    """The root priors [T, A] of all searches, in a list."""
    seen, search = [], script.TreeSearch
    monkeypatch.setattr(
        script, "TreeSearch", lambda model, prior, *rest: seen.append(prior) or search(model, prior, *rest)
    )
    return seen


def test_noise_in_the_roots_prior(script, lively, priors):
    """Only in training, of the share asked for, over legal actions alone, each tree its own, by the generator."""
    agent = lively(env_id=HUNT, num_simulations=2, num_goal_samples=40, dirichlet_alpha=0.5, dirichlet_fraction=0.3)
    game, state = situations(script, HUNT, batch=8)
    state = clear(game, state)

    def roots(training, number=0):
        priors.clear()
        decision, _ = decide(script, agent.train(training), state, number=number)
        return torch.cat(priors), decision

    plain, decision = roots(False)
    games, seats = ((state.players >= 0) & (game.action_mask(state).sum(2) > 1)).nonzero(as_tuple=True)
    legal = game.action_mask(state)[games, seats].repeat_interleave(40, 0)
    policy = decision.prior.exp()[games, seats].repeat_interleave(40, 0)
    torch.testing.assert_close(plain, policy.masked_fill(~legal, -1.0))
    noisy, _ = roots(True)
    assert torch.equal(noisy == -1.0, ~legal)
    noise = ((noisy - 0.7 * policy) / 0.3)[legal]
    assert noise.min() > -1e-5
    torch.testing.assert_close((noisy * legal).sum(1), torch.ones(len(noisy)))
    count = legal.sum(1, keepdim=True).float()
    share = 1 / count.expand_as(policy)[legal]
    spread = (share * (1 - share) / (0.5 / share + 1)).sqrt()  # of Dirichlet(0.5, ..)
    away = (noise - share) / spread
    assert abs(float(away.mean())) < 0.05 and 0.9 < float(away.square().mean()) < 1.1
    assert len(noisy[:, STAY].unique()) > 0.99 * len(noisy)  # a draw of its own for each tree
    again, other = roots(True)[0], roots(True, 1)[0]
    assert torch.equal(again, noisy) and ((other != noisy) | ~legal).float().mean() > 0.99
    agent.args.dirichlet_fraction = 0.0
    assert torch.equal(roots(True)[0], plain)


def test_every_tree_has_its_goals_and_its_roots_value(script, lively, monkeypatch):
    """Each tree of a decision plays with its own draw of the goals; all know their mean, and V of the root."""
    agent = lively(env_id=HUNT, num_simulations=2, num_goal_samples=3).eval()
    game, state = situations(script, HUNT, batch=4)
    state = clear(game, state)
    model, search, goals, roots = script.GameModel, script.TreeSearch, [], []

    def watched_model(agent, state, memory, some, draws):
        goals.append(some)
        return model(agent, state, memory, some, draws)

    def watched_search(model, prior, value, *rest):
        roots.append(value)
        return search(model, prior, value, *rest)

    monkeypatch.setattr(script, "GameModel", watched_model)
    monkeypatch.setattr(script, "TreeSearch", watched_search)
    memory = some_memory(script, agent, len(state.players))
    decision, visits = decide(script, agent, state, memory)
    games, seats = (visits.sum(2) > 0).nonzero(as_tuple=True)
    torch.testing.assert_close(torch.cat(roots).view(-1, 3), decision.value[games, seats].unsqueeze(1).expand(-1, 3))
    mean, log_std, drawn = (torch.cat(part).unflatten(0, (-1, 3)) for part in zip(*goals, strict=True))  # [D, K, N, Z]
    turned = torch.stack([decision.goal[b].roll(-i, 0) for b, i in zip(games, seats.tolist(), strict=True)])
    torch.testing.assert_close(mean, turned.unsqueeze(1).expand_as(mean))
    noise = (drawn - mean) / log_std.exp()
    assert 0.9 < float(noise.std()) < 1.1 and ((noise - noise.roll(1, 1)).abs() > 1e-4).float().mean() > 0.99


def test_compiled_choices_are_the_choices(script, lively):
    """Traced by torch.compile: the same visits, and noise that is not frozen."""
    agent = lively(env_id=HUNT, num_simulations=12)
    game, state = situations(script, HUNT, batch=4)
    state = clear(game, state)
    plain, visits = decide(script, agent, state)
    agent.puct = torch.compile(agent.puct, backend="eager")
    compiled, visits_2 = decide(script, agent, state)
    assert torch.equal(visits, visits_2)
    torch.testing.assert_close(plain.q_plan, compiled.q_plan)
    assert not torch.equal(decide(script, agent, state, number=1)[1], visits)


def test_visits_or_scores_make_the_policy(script, lively):
    """`hop`: the shares of visits, or exp(beta Q); its log-probabilities are those of the actions it drew."""
    game, state = situations(script, HUNT, batch=20)
    state = clear(game, state)
    for target in ("visits", "q"):
        agent = lively(env_id=HUNT, plan_update="hop", policy_target=target, num_simulations=16, plan_beta=3.0).eval()
        agent.plan_slope.fill_(0.5)
        agent.plan_rms.fill_(0.3)
        decision, visits = decide(script, agent, state)
        mask, searched = decision.mask, visits.sum(2) > 0
        for b, i in searched.nonzero().tolist()[::3]:
            legal = mask[b, i].nonzero().flatten().tolist()
            if target == "visits":
                policy = {a: float(visits[b, i, a]) / 32 for a in legal}
            else:
                q = {a: float(decision.q_plan[b, i, a]) for a in legal}
                weight = {a: math.exp(3.0 * 0.5 / 0.3 * (q[a] - sum(q.values()) / len(q))) for a in legal}
                policy = {a: w / sum(weight.values()) for a, w in weight.items()}
            action = int(decision.action[b, i])
            assert policy[action] > 0
            assert float(decision.log_prob[b, i]) == pytest.approx(math.log(policy[action]), abs=1e-4)
            logits = decision.offset[b, i].masked_fill(~mask[b, i], -1e9).softmax(0)[legal].tolist()
            assert logits == pytest.approx(list(policy.values()), abs=1e-5)


def test_what_is_known_of_co_players_changes_the_scores(script, lively):
    """Goals inferred, inferred again on the way, or none; co-players by the MOA, or any legal action."""
    game, state = situations(script, HUNT, batch=10)
    state = clear(game, state)

    def scores(**options):
        agent = lively(env_id=HUNT, num_simulations=12, **options).eval()
        oracle = some_goals(agent, state) if agent.args.goal == "oracle" else None
        memory = some_memory(script, agent, len(state.players))
        return decide(script, agent, state, memory, oracle=oracle)[0].q_plan

    plain = scores()
    assert torch.equal(plain, scores())
    for options in ({"goal": "none"}, {"co_player_model": "uniform"}, {"goal_refresh": 1}, {"goal_refresh": 2}):
        assert ((scores(**options) - plain).abs().amax(2) > 1e-4).float().mean() > 0.3, options
    assert not torch.equal(scores(goal_refresh=1), scores(goal_refresh=2))
    for goal in ("none", "oracle"):  # nothing is inferred
        with pytest.raises(script.UsageError, match="--goal-refresh needs --goal inferred"):
            scores(goal=goal, goal_refresh=1)
    with pytest.raises(script.UsageError, match="--policy-target visits needs --plan-update hop"):
        scores(policy_target="visits", plan_update="offset")
    assert torch.equal(scores(goal_refresh=60), plain)  # beyond the horizon

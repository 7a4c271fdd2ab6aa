"""How fast does the tree search of hop_mcts.py decide, against what else could be in its place?

Decisions a CPU second of one thread, by Player.act in fresh games where every seat decides: with
the batched search; with a sequential one (below: one tree, one node and one call of a network at a
time, as HOP's own code has it), on three decisions; with the one step of hop_onestep.py; and
without planner. The agent is trained by plain PPO first, since an untrained policy makes other
trees. Methods take turns, so that ratios hold on a machine that has other work; medians of rounds,
after one that does not count. That both searches make the same visits is held by a test.
"""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from math import exp, sqrt
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Generator, cat, no_grad, tensor

import hop_mcts
import hop_onestep
from figures import by_setting, draw_panels, figure, table

GAMES = ("msh", "msg")
BATCHES = (1, 16, 64)  # parallel games
SIMULATIONS = (50, 200)  # in each tree
TREES = 5  # a decision
SEQUENTIAL = 3  # decisions of the sequential search a round
METHODS = ("sequential search", "batched search", "one step", "no planner")


def jobs(seeds: tuple[int, ...], quick: bool):
    """Each alone on the machine."""
    for seed in seeds or (1,):
        for game in GAMES[:1] if quick else GAMES:
            for simulations in (8,) if quick else SIMULATIONS:
                job = {"setting": f"{game} | {simulations} simulations", "seed": seed}
                job |= {"game": game, "simulations": simulations, "alone": True}
                job |= {"batches": (2,) if quick else BATCHES, "rounds": 1 if quick else 5}
                yield job | {"training": 2048 if quick else 32_768}


# ---- Sequential search ---------------------------------------------------------------------------
class PlainSearch:
    """Tree search of the player at seat 0, one tree, one node, one call of a network and one step
    of the game at a time, in plain Python, as HOP's own code has it. States are GridStates of one
    game, of lists and numbers.

    A node has the `number` of the simulation that made it, `depth`, `state`, `seen` (its features),
    `reward` on the way, `value` and `goes_on`; from its first visit on `legal` actions (None
    before), `joint` (N actions), and by action [A] `prior`, `visits`, `total` and `children`."""

    def __init__(self, agent):
        self.agent = agent
        self.args = agent.args
        self.game = agent.game
        self.next_cell = self.game.next_cell.tolist()
        self.legal_moves = self.game.legal_moves.tolist()
        self.kind = self.game.item_kind.tolist()
        rules = (self.game.item_action, self.game.quota, self.game.share)
        self.rules = [*zip(*(of_item.tolist() for of_item in rules))]

    def search(self, state, value, goals, drawn, draws):
        """Q and visits [A]. What Model is given of many trees it is given of one: goals and `drawn`
        [N, Z], `draws` [S + 1, N]."""
        self.theirs = goals[1:]
        self.goal = goals[1:].sum(0)
        self.drawn = drawn
        self.draws = draws.tolist()
        self.root = SimpleNamespace(number=0, depth=0, state=state, value=value, legal=None)
        self.root.seen = self.features(state)
        for number in range(1, self.args.num_simulations + 1):
            self.simulate(self.root, number)
        return means(self.root), self.root.visits

    def play(self, state, actions):
        """Next state, the N rewards; for the player at seat 0, terminated and truncated."""
        players, items, time, first_hunt = state
        after = [self.next_cell[cell][action] for cell, action in zip(players, actions)]
        items = [*items]
        rewards = [0.0] * len(players)
        time += 1
        for m, (takes, quota, share) in enumerate(self.rules):
            here = [i for i, cell in enumerate(players) if cell == items[m] >= 0]
            takers = [i for i in here if actions[i] == takes]
            if len(takers) >= quota:
                items[m] = -1
                rewards = [reward + self.game.bonus for reward in rewards]
                for i in takers:
                    rewards[i] += share / len(takers)
                    if self.game.family == "msh":
                        after[i] = -1
                        first_hunt = first_hunt or time
        over = max(items) < 0 or 0 < first_hunt <= time - hop_mcts.COUNTDOWN
        terminated = over or after[0] < 0
        truncated = time >= self.game.horizon and not terminated
        return hop_mcts.GridState(after, items, time, first_hunt), rewards, terminated, truncated

    def mask(self, state):
        """Which actions are legal, N lists of A."""
        masks = []
        for cell in state.players:
            here = {kind for kind, place in zip(self.kind, state.items) if cell == place >= 0}
            kinds = range(len(self.game.item_counts))
            masks.append(self.legal_moves[cell] + [kind in here for kind in kinds])
        return masks

    def features(self, state):
        """Own features [N, X] and co-players' [N, N-1, Y]."""
        own, views = self.game.features(hop_mcts.GridState(*(tensor([x]) for x in state)))
        return own[0], views[0]

    def ask(self, network, node):
        """[outputs] of the player's policy or value network."""
        own, views = node.seen
        return network(own[0], cat([views[0], self.theirs], 1), self.goal)

    def expand(self, node):
        """Asks for the prior, and draws what the co-players do."""
        masks = self.mask(node.state)
        node.prior = softmax(self.ask(self.agent.actor, node).tolist(), masks[0])
        node.legal = [action for action, legal in enumerate(masks[0]) if legal]
        own, views = node.seen
        node.joint = [None]
        for j in range(1, len(masks)):
            logits = self.agent.moa.decoder(own[j], views[j], self.drawn[j]).tolist()
            upto = [*itertools.accumulate(softmax(logits, masks[j]))]
            draw = self.draws[node.number][j] * upto[-1]
            node.joint.append(next(a for a, p in enumerate(upto) if p > draw))
        node.visits = [0] * len(node.prior)
        node.total = [0.0] * len(node.prior)
        node.children = [None] * len(node.prior)

    def choose(self, node):
        """The action to try next: by the prior at first, then by PUCT."""
        count = sum(node.visits)
        if count == 0:
            return max(node.legal, key=node.prior.__getitem__)
        q = means(node)
        low = min(q)
        span = max(max(q) - low, 1e-8)
        weight = self.args.puct_c * sqrt(count)
        rows = zip(q, node.prior, node.visits)
        score = [(x - low) / span + weight * p / (1 + n) for x, p, n in rows]
        untried = [action for action in node.legal if node is self.root and not node.visits[action]]
        return max(untried or node.legal, key=score.__getitem__)

    def step(self, node, action, number):
        """The node to which an action leads, with its value."""
        share = self.args.prosocial
        joint = [action, *node.joint[1:]]
        state, rewards, terminated, truncated = self.play(node.state, joint)
        child = SimpleNamespace(number=number, depth=node.depth + 1, state=state, legal=None)
        reward = (1.0 - share) * rewards[0] + share * sum(rewards) / len(rewards)
        child.reward = self.args.reward_scale * reward
        child.goes_on = not terminated and not truncated and child.depth < self.args.max_depth
        child.seen = self.features(state) if not terminated else None
        child.value = 0.0 if terminated else self.ask(self.agent.critic, child).item()
        return child

    def simulate(self, node, number):
        """Return from a node on: down to an action that was not tried, or after which nothing
        follows; and back up."""
        if node.legal is None:
            self.expand(node)
        action = self.choose(node)
        child = node.children[action]
        if child and child.goes_on:
            future = self.simulate(child, number)
        else:
            child = node.children[action] = child or self.step(node, action, number)
            future = child.value
        future = child.reward + self.args.gamma * future
        node.visits[action] += 1
        node.total[action] += future
        return future


def means(node):
    """Mean returns [A] of a node's actions; of one not tried, the mean of all and of the value."""
    mean = (node.value + sum(node.total)) / (1 + sum(node.visits))
    return [total / n if n else mean for total, n in zip(node.total, node.visits)]


def softmax(logits, mask):
    """Probabilities of a list of `logits`, 0 where `mask` is False."""
    high = max(itertools.compress(logits, mask))
    weights = [exp(logit - high) if legal else 0.0 for logit, legal in zip(logits, mask)]
    total = sum(weights)
    return [weight / total for weight in weights]


def sequential_search(given, value, args):
    """Q and visits [T, A] as by hop_mcts.search, of one tree after another; in place of a model,
    what Model would be `given`."""
    agent, state, goals, drawn, draws = given
    draws = draws.unflatten(0, (-1, len(goals)))
    plain = PlainSearch(agent)
    rows = []
    for t in range(len(goals)):
        root = hop_mcts.GridState(*(field[t].tolist() for field in state))
        rows.append(plain.search(root, float(value[t]), goals[t], drawn[t], draws[:, t]))
    return value.new_tensor(rows).unbind(1)


# ---- Measuring -----------------------------------------------------------------------------------
def make_players(job):
    """A Player for each method, with the networks of an agent that plain PPO made in self-play (but
    for the transition network), and that agent's memory of running matches, [games, ..]."""
    args = hop_mcts.Args(env_id=job["game"], seed=job["seed"], co_players="self")
    args.plan_update = "none"
    args.num_envs = max(args.num_envs, *job["batches"])
    args.total_timesteps = max(job["training"], args.num_envs * args.num_steps)
    last = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        hop_mcts.train(args, watch=last.update)
    given = {**vars(last["agent"].args), "num_goal_samples": TREES}
    given["num_simulations"] = job["simulations"]
    players = {}
    for name in METHODS:
        script = hop_onestep if name == "one step" else hop_mcts
        given["plan_update"] = "none" if name == "no planner" else "offset"
        args = script.Args(**{key: given[key] for key in vars(script.Args()) if key in given})
        agent = script.Agent(script.GridGame(job["game"]), args)
        agent.load_state_dict(last["agent"].state_dict(), strict=False)
        players[name] = script.Player(agent, 1)
    return players, last["player"].memory


@no_grad()
def act(player, memory, seed, decisions=None):
    """Decides in fresh games, one for each row of the `memory`, at all seats or as many as
    `decisions`: CPU seconds a decision."""
    generator = Generator().manual_seed(seed)
    game = player.agent.game
    state = game.start(len(memory), generator)
    mask = game.action_mask(state)
    seats = torch.zeros_like(mask[:, :, 0])
    decisions = decisions or seats.numel()
    seats.view(-1)[torch.linspace(0, seats.numel() - 1, decisions).long()] = True
    player.memory = memory
    company = SimpleNamespace(generator=generator)
    start = time.process_time()
    player.act(state, mask, seats, company)
    return (time.process_time() - start) / decisions


def work(job: dict) -> dict:
    """Decisions a second by parallel games and method, medians of rounds."""
    players, memory = make_players(job)
    plain = {"Model": lambda *given: given, "search": sequential_search}
    found = {}
    for games in job["batches"]:
        rates = defaultdict(list)
        for number, name in itertools.product(range(job["rounds"] + 1), METHODS):
            if name == "sequential search":
                few = memory[: min(games, SEQUENTIAL)]
                with mock.patch.multiple(hop_mcts, **plain):
                    seconds = [act(players[name], few, number, SEQUENTIAL)]
            else:
                calls = range(1 if name == "batched search" else 4)
                seconds = [act(players[name], memory[:games], number) for _ in calls]
            rates[name].append(1.0 / statistics.mean(seconds))
        found[f"{games}"] = {name: statistics.median(x[1:]) for name, x in rates.items()}
    return {"rates": found}


# ---- Figures -------------------------------------------------------------------------------------
def report(results: list[dict]) -> str:
    """Decisions a second of every method."""
    rows = []
    for of in by_setting(results).values():
        for games in of[0]["rates"]:
            each = {name: [run["rates"][games][name] for run in of] for name in METHODS}
            cells = [figure(rates, 1 if max(rates) < 100 else 0) for rates in each.values()]
            pairs = zip(each["batched search"], each["sequential search"])
            cells.append(figure([batched / sequential for batched, sequential in pairs], 1))
            rows.append([of[0]["game"], games, f"{of[0]['simulations']}", *cells])
    head = ["game", "games", "simulations", *METHODS, "batched / sequential"]
    return f"Decisions a CPU second, {TREES} trees each:\n\n{table(head, rows)}"


def draw(results: list[dict]) -> None:
    """planner_speed.png: decisions a second against parallel games."""
    panels = {}
    for setting, of in by_setting(results).items():
        lines = panels[setting.replace(" |", ",")] = {}
        for name in METHODS:
            rates = [[x[name] for x in run["rates"].values()] for run in of]
            lines[name] = (of[0]["batches"], tensor(rates).numpy())  # [seeds, numbers of games]
    axes = {"xscale": "log", "yscale": "log"}
    draw_panels("planner_speed", panels, "parallel games", "decisions a CPU second", **axes)

"""How fast does the tree search of hop_mcts.py decide, against what else could be in its place?

    python benchmarks/planner_speed.py               # the tables, and docs/planner_speed.png
    python benchmarks/planner_speed.py --games 16 --simulations 50 --plot ""
    python benchmarks/planner_speed.py --mctx        # the search alone, against mctx

Decisions a CPU second of one thread, by Player.act in fresh games where every seat decides: with
the batched search; with a sequential one (below), on `--sequential` decisions; with the one-step
planner of hop_onestep.py, on its transition network and on the simulator; and without planner. The
agent is trained by plain PPO first, since an untrained policy makes other trees. Methods take
turns, so that ratios hold on a machine that has other work; medians of rounds, after one that does
not count. Before that, both searches must make the same visits on the same draws.

`--mctx` gives the search of hop_mcts.py and mctx the same model, an MLP whose one call is a
simulation: `pip install jax mctx` (https://github.com/google-deepmind/mctx). Shapes in comments: T
trees, S simulations, N players/seats, A actions, X own and Y co-players' features, Z goal."""

import contextlib
import dataclasses
import importlib
import itertools
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import types
from collections import defaultdict
from functools import partial
from math import exp, sqrt
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Generator, cat, no_grad, tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hop_mcts  # noqa: E402
import hop_onestep  # noqa: E402


@dataclasses.dataclass
class Options:
    env_id: str = "msh"  # game
    games: str = "1,16,64"  # parallel games, a comma list
    simulations: str = "50,200"  # simulations in each tree, a comma list
    goal_samples: int = 5  # trees a decision
    sequential: int = 3  # decisions of the sequential search a round
    rounds: int = 5  # rounds that count
    training: int = 32768  # game steps of training before anything is timed
    plot: str = str(ROOT / "docs/planner_speed.png")  # file for the plot; none if empty
    mctx: bool = False  # compare the search alone with mctx instead
    quick: bool = False  # one small setting, to see that all works


# ---- Sequential search ---------------------------------------------------------------------------
class PlainGame:
    """What a GridGame does, for one game at a time: a GridState of lists and numbers."""

    def __init__(self, game):
        self.game = game
        self.next_cell = game.next_cell.tolist()
        self.legal_moves = game.legal_moves.tolist()
        self.kind = game.item_kind.tolist()
        self.rules = [*zip(game.item_action.tolist(), game.quota.tolist(), game.share.tolist())]

    def step(self, state, actions):
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
        batch = hop_mcts.GridState(*(tensor([field]) for field in state))
        own, views = self.game.features(batch)
        return own[0], views[0]


class Node(types.SimpleNamespace):
    """A state in a tree: `number` of the simulation that made it, `depth`, `state`, `seen` (its
    features), `reward` on the way, `value`, `goes_on`, and `prior` (None until expanded, then A
    numbers, -1: illegal); then also `joint` (N actions), `visits`, `total` and `children` (A)."""


class PlainTree:
    """The search of the player at seat 0 of one game, one node, one call of a network and one step
    of the game at a time, in plain Python, as HOP's own code has it. What Model is given of many
    trees it is given of one: `draws` [S + 1, N], goals [N, Z]."""

    def __init__(self, agent, game, state, value, goals, drawn, draws):
        self.agent = agent
        self.args = agent.args
        self.game = game
        self.theirs = goals[1:]
        self.goal = goals[1:].sum(0)
        self.drawn = drawn
        self.draws = draws.tolist()
        self.root = Node(number=0, depth=0, state=state, value=value, prior=None)
        self.root.seen = game.features(state)

    def ask(self, network, node):
        """[outputs] of the player's policy or value network."""
        own, views = node.seen
        return network(own[0], cat([views[0], self.theirs], 1), self.goal)

    def expand(self, node):
        """Asks for the prior, and draws what the co-players do."""
        masks = self.game.mask(node.state)
        prior = softmax(self.ask(self.agent.actor, node).tolist(), masks[0])
        own, views = node.seen
        node.joint = [None]
        for j in range(1, len(masks)):
            logits = self.agent.moa.decoder(own[j], views[j], self.drawn[j]).tolist()
            upto = [*itertools.accumulate(softmax(logits, masks[j]))]
            draw = self.draws[node.number][j] * upto[-1]
            node.joint.append(next(a for a, p in enumerate(upto) if p > draw))
        node.prior = [p if legal else -1.0 for p, legal in zip(prior, masks[0])]
        node.visits = [0] * len(prior)
        node.total = [0.0] * len(prior)
        node.children = [None] * len(prior)

    def choose(self, node):
        """The action to try next: by the prior at first, then by PUCT."""
        legal = [action for action, p in enumerate(node.prior) if p >= 0]
        count = sum(node.visits)
        if count == 0:
            return max(legal, key=node.prior.__getitem__)
        mean = (node.value + sum(node.total)) / (1 + count)
        q = [total / n if n else mean for total, n in zip(node.total, node.visits)]
        low = min(q)
        span = max(max(q) - low, 1e-8)
        weight = self.args.puct_c * sqrt(count)
        rows = zip(q, node.prior, node.visits)
        score = [(x - low) / span + weight * p / (1 + n) for x, p, n in rows]
        untried = [action for action in legal if node is self.root and not node.visits[action]]
        return max(untried or legal, key=score.__getitem__)

    def step(self, node, action, number):
        """The node to which an action leads, with its value."""
        args = self.args
        joint = [action, *node.joint[1:]]
        state, rewards, terminated, truncated = self.game.step(node.state, joint)
        reward = (1.0 - args.prosocial) * rewards[0] + args.prosocial * sum(rewards) / len(rewards)
        child = Node(number=number, depth=node.depth + 1, state=state, value=0.0, prior=None)
        child.reward = args.reward_scale * reward
        child.goes_on = not terminated and not truncated and child.depth < args.max_depth
        if not terminated:
            child.seen = self.game.features(state)
            child.value = self.ask(self.agent.critic, child).item()
        return child

    def simulate(self, number):
        """Down to an action that was not tried, or after which nothing follows; and back up."""
        path = []
        child = self.root
        while child is self.root or child.goes_on and child.number != number:
            node = child
            if node.prior is None:
                self.expand(node)
            action = self.choose(node)
            child = node.children[action] or self.step(node, action, number)
            node.children[action] = child
            path.append((node, action))
        future = child.value
        for node, action in reversed(path):
            future = node.children[action].reward + self.args.gamma * future
            node.visits[action] += 1
            node.total[action] += future


def softmax(logits, mask):
    """Probabilities of a list of `logits`, 0 where `mask` is False."""
    high = max(itertools.compress(logits, mask))
    weights = [exp(logit - high) if legal else 0.0 for logit, legal in zip(logits, mask)]
    total = sum(weights)
    return [weight / total for weight in weights]


def sequential_search(given, value, args):
    """Q and visits [T, A] as by hop_mcts.search, by one PlainTree after another; in place of a
    model, what Model would be `given`."""
    agent, state, goals, drawn, draws = given
    draws = draws.unflatten(0, (-1, len(goals)))
    game = PlainGame(agent.game)
    rows = []
    for t in range(len(goals)):
        root = hop_mcts.GridState(*(field[t].tolist() for field in state))
        tree = PlainTree(agent, game, root, float(value[t]), goals[t], drawn[t], draws[:, t])
        for number in range(1, args.num_simulations + 1):
            tree.simulate(number)
        visits = tree.root.visits
        total = tree.root.total
        mean = (tree.root.value + sum(total)) / (1 + args.num_simulations)
        rows.append([[x / n if n else mean for x, n in zip(total, visits)], visits])
    return value.new_tensor(rows).unbind(1)


# ---- Planners ------------------------------------------------------------------------------------
METHODS = {  # and their options
    "sequential search": {},
    "batched search": {},
    "one step": {"transition": "network"},
    "one step, simulator": {"transition": "simulator"},
    "no planner": {"plan_update": "none"},
}
INSIDE = ["search: policy", "search: MOA", "search: game", "search: value"]  # of `expand`
LABELS = ["select", "expand", *INSIDE, "backup"]  # as torch.profiler has them


def train(options, games):
    """An agent that plain PPO made in self-play, and its memory of running matches, [games, ..]."""
    args = hop_mcts.Args(env_id=options.env_id, co_players="self", plan_update="none")
    args.num_envs = max(args.num_envs, games)
    args.total_timesteps = max(options.training, args.num_envs * args.num_steps)
    last = {}
    folder = tempfile.TemporaryDirectory()
    with folder, contextlib.chdir(folder.name), contextlib.redirect_stdout(None):
        hop_mcts.train(args, watch=last.update)
    return last["agent"], last["player"].memory


def make_players(options, trained, simulations):
    """A Player for each method, with the trained networks; the transition network is not."""
    players = {}
    for name, own in METHODS.items():
        script = hop_onestep if "transition" in own else hop_mcts
        values = {**vars(trained.args), "plan_update": "offset", **own}
        values |= {"num_simulations": simulations, "num_goal_samples": options.goal_samples}
        known = [field.name for field in dataclasses.fields(script.Args) if field.name in values]
        args = script.Args(**{name: values[name] for name in known})
        agent = script.Agent(script.GridGame(options.env_id), args)
        agent.load_state_dict(trained.state_dict(), strict=False)
        players[name] = script.Player(agent, 1)
    return players


@no_grad()
def act(player, memory, seed, decisions=sys.maxsize):
    """Decides in fresh games, one for each row of the `memory`, at all seats or as many as
    `decisions`: CPU seconds a decision."""
    generator = Generator().manual_seed(seed)
    game = player.agent.game
    state = game.start(len(memory), generator)
    mask = game.action_mask(state)
    seats = torch.zeros_like(mask[:, :, 0])
    decisions = min(decisions, seats.numel())
    seats.view(-1)[torch.linspace(0, seats.numel() - 1, decisions).long()] = True
    player.memory = memory
    company = types.SimpleNamespace(generator=generator)
    start = time.process_time()
    player.act(state, mask, seats, company)
    return (time.process_time() - start) / decisions


def planning_by(search):
    """A context in which hop_mcts.py plans by this search, which is given what Model would be."""
    return mock.patch.multiple(hop_mcts, Model=lambda *given: given, search=search)


def agreement(player, memory):
    """The share of trees in which both searches make the same visits, in a few decisions."""
    model = hop_mcts.Model
    search = hop_mcts.search
    same = []

    def both(given, value, args):
        result = search(model(*given), value, args)
        same.extend((result[1] == sequential_search(given, value, args)[1]).all(1).tolist())
        return result

    with planning_by(both):
        act(player, memory, 0, 8)
    return statistics.mean(same)


@contextlib.contextmanager
def clocked(spent, label):
    """Adds its CPU seconds to those `spent`; the profiler itself would slow the search down."""
    start = time.process_time()
    yield
    spent[label] += time.process_time() - start


def measure(options, players, memory):
    """Medians over rounds: decisions a second by method, shares of the batched search by label."""
    rates = {name: [] for name in METHODS}
    shares = []
    few = options.sequential
    for number in range(options.rounds + 1):
        for name, player in players.items():
            if name == "sequential search":
                with planning_by(sequential_search):
                    seconds = [act(player, memory[:few], number, few)]
            else:
                calls = 1 if name == "batched search" else 4
                seconds = [act(player, memory, number) for _ in range(calls)]
            rates[name].append(1.0 / statistics.mean(seconds))
        spent = defaultdict(float)
        with mock.patch.object(hop_mcts, "record_function", partial(clocked, spent)):
            act(players["batched search"], memory, number)
        spent["expand"] -= sum(spent[label] for label in INSIDE)
        shares.append([spent[label] / spent["planner"] for label in LABELS])
    rates = {name: statistics.median(values[1:]) for name, values in rates.items()}
    return rates, [statistics.median(values) for values in zip(*shares[1:])]


def print_table(head, rows):
    """In markdown."""
    print("\n| " + " | ".join(head) + " |\n|" + "-|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def plot(results, title, path):
    """Decisions a second against games, a picture for each number of simulations."""
    simulations = sorted({number for _, number in results})
    figure = Figure(figsize=(1 + 4 * len(simulations), 4), layout="constrained")
    pictures = figure.subplots(1, len(simulations), squeeze=False, sharey=True)[0]
    for axes, chosen in zip(pictures, simulations):
        games = [count for count, number in results if number == chosen]
        for name in METHODS:
            axes.plot(games, [results[count, chosen][name] for count in games], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="parallel games", title=f"{chosen} simulations")
        axes.set_xticks(games, map(str, games))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    pictures[0].set_ylabel("decisions a CPU second")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def compare_planners(options):
    """Prints the tables, and draws the plot."""
    games, simulations = ([*map(int, x.split(","))] for x in (options.games, options.simulations))
    trained, memory = train(options, max(games))
    results = {}  # decisions a second by method, of each setting
    speeds = []
    parts = []
    for number in simulations:
        players = make_players(options, trained, number)
        share = agreement(players["batched search"], memory)
        print(f"{number} simulations: the same visits in {share:.1%} of trees, in float32")
        if share < 0.9:
            raise hop_mcts.UsageError("the two searches differ")
        for count in games:
            rates, shares = measure(options, players, memory[:count])
            results[count, number] = rates
            batched = rates["batched search"]
            ratios = [batched / rates["sequential search"], rates["one step"] / batched]
            cells = [f"{rate:,.{1 if rate < 100 else 0}f}" for rate in rates.values()]
            cells += [f"{ratio:.1f}x" for ratio in ratios]
            speeds.append([str(count), str(number), *cells])
            cells = [f"{share:.0%}" for share in [*shares, 1.0 - sum(shares)]]
            parts.append([str(count), str(number), *cells])
    title = f"{options.env_id}: decisions a CPU second, {options.goal_samples} trees a decision"
    print(f"\n{title}")
    setting = ["games", "simulations"]
    print_table([*setting, *METHODS, "batched / sequential", "one step / batched"], speeds)
    print("\nShares of the batched search's time, by label of torch.profiler (`expand` without")
    print("those within; rest: tables of features, draws, goals)")
    print_table([*setting, *LABELS, "rest"], parts)
    if options.plot and not options.quick:
        plot(results, title, options.plot)


# ---- The search alone, against mctx --------------------------------------------------------------
EMBEDDING = 64
ACTIONS = 7
TREES = 320
SIZES = [EMBEDDING + ACTIONS, 128, 128, EMBEDDING + ACTIONS + 2]  # out: embedding, prior, V, reward


class MLP:
    """A model for hop_mcts.search, in which one call on (embedding, action) is a simulation."""

    num_actions = ACTIONS

    def __init__(self, weights, embedding, logits, simulations):
        self.weights = weights
        self.embedding = embedding.repeat(simulations + 1, 1)  # [(S + 1) * T, EMBEDDING]
        self.logits = logits.repeat(simulations + 1, 1)  # [(S + 1) * T, A]
        self.goes_on = torch.ones(len(logits), dtype=torch.bool)

    def expand(self, nodes):
        return self.logits.index_select(0, nodes).softmax(1)

    def step(self, nodes, actions, new):
        x = cat([self.embedding.index_select(0, nodes), F.one_hot(actions, ACTIONS)], 1)
        (w1, b1), (w2, b2), (w3, b3) = self.weights
        x = torch.addmm(b3, torch.addmm(b2, torch.addmm(b1, x, w1).relu(), w2).relu(), w3)
        self.embedding[new] = x[:, :EMBEDDING].tanh()
        self.logits[new] = x[:, EMBEDDING:-2]
        return x[:, -1], x[:, -2], self.goes_on


@no_grad()
def compare_with_mctx(options):
    """Prints simulations a second of hop_mcts.search and of mctx.muzero_policy, in turns."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    with hop_mcts.refused("--mctx: pip install jax mctx"):
        jax = importlib.import_module("jax")
        mctx = importlib.import_module("mctx")
    jnp = jax.numpy
    args = hop_mcts.Args(gamma=0.99, num_simulations=int(options.simulations.split(",")[0]))
    generator = Generator().manual_seed(1)
    weights = []
    for rows, columns in itertools.pairwise(SIZES):
        weight = torch.randn(rows, columns, generator=generator) * sqrt(2.0 / rows)
        weights.append((weight, torch.zeros(columns)))
    embedding = torch.randn(TREES, EMBEDDING, generator=generator).tanh()
    logits = torch.randn(TREES, ACTIONS, generator=generator)
    value = torch.zeros(TREES)
    parameters = [(jnp.array(weight.numpy()), jnp.array(bias.numpy())) for weight, bias in weights]
    root = {"prior_logits": logits, "value": value, "embedding": embedding}
    root = mctx.RootFnOutput(**{name: jnp.array(x.numpy()) for name, x in root.items()})

    def recurrent(parameters, key, action, embedding):
        x = jnp.concatenate([embedding, jax.nn.one_hot(action, ACTIONS)], 1)
        (w1, b1), (w2, b2), (w3, b3) = parameters
        x = jax.nn.relu(jax.nn.relu(x @ w1 + b1) @ w2 + b2) @ w3 + b3
        heads = {"prior_logits": x[:, EMBEDDING:-2], "value": x[:, -2], "reward": x[:, -1]}
        output = mctx.RecurrentFnOutput(discount=jnp.full(len(x), args.gamma), **heads)
        return output, jnp.tanh(x[:, :EMBEDDING])

    @jax.jit
    def policy(parameters, root):
        given = (parameters, jax.random.PRNGKey(0), root, recurrent, args.num_simulations)
        constants = {"dirichlet_fraction": 0.0, "pb_c_init": args.puct_c}
        chosen = mctx.muzero_policy(*given, max_depth=args.max_depth, **constants)
        return chosen.action_weights

    def theirs():
        policy(parameters, root).block_until_ready()

    def ours():
        hop_mcts.search(MLP(weights, embedding, logits, args.num_simulations), value, args)

    rates = {"hop_mcts.search": [], "mctx": []}
    for number in range(4 * options.rounds + 2):
        for name, search in zip(rates, (ours, theirs)):
            start = time.process_time()
            search()
            if number >= 2:  # the first compiles
                seconds = time.process_time() - start
                rates[name].append(TREES * args.num_simulations / seconds)
    rates = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{TREES} trees, {args.num_simulations} simulations, jax {jax.__version__}")
    rows = [[name, f"{x:,.0f}", f"{x / rates['mctx']:.2f}x"] for name, x in rates.items()]
    print_table(["search", "simulations a CPU second", "of mctx"], rows)


def main(options):
    torch.set_num_threads(1)
    if options.quick:
        small = {"games": "2", "simulations": "8", "sequential": 1, "rounds": 1, "training": 2048}
        options = dataclasses.replace(options, **small)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # Linux
        processor = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    print(f"{platform.platform()}, {processor}, torch {torch.__version__}, 1 thread")
    if options.mctx:
        compare_with_mctx(options)
    else:
        compare_planners(options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except hop_mcts.UsageError as error:
        print(f"planner_speed.py: error: {error}", file=sys.stderr)
        sys.exit(2)

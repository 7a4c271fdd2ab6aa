"""How fast does the tree search decide? All figures of one run: only their ratios hold on a machine that drifts.

    python benchmarks/planner_speed.py                              # the table, and docs/planner_speed.png
    python benchmarks/planner_speed.py --games 16 --simulations 50 --json planner_speed.json --plot ""
    python benchmarks/planner_speed.py --mctx                       # the search alone, against mctx

Decisions a second of Agent.act for all seats that have a choice: with the batched search of hop_mcts.py, with one tree
and one network call at a time (sequential_search.py, on `--sequential` decisions), with the one-step planner of
hop_onestep.py, and without planner. Games are fresh, so that every seat decides. The agents are trained for `--warm-up`
game steps, since an untrained policy makes other trees. Methods take turns; medians of `--rounds` rounds after one that
is not counted. Bookkeeping is what the search spends on neither network, goal inference nor game step.

`--mctx` gives both searches the same model, an MLP whose one call is a simulation, and needs
`pip install jax mctx` (https://github.com/google-deepmind/mctx; not in requirements.txt).
"""

import dataclasses
import functools
import importlib
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import hop_mcts as script
import hop_onestep as onestep
import sequential_search

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["sequential search", "batched search", "one step", "no planner"]
NO_BOOKKEEPING = ("game step", "goal inference", "MOA", "policy and value")  # parts of the timer


@dataclasses.dataclass
class Options:
    env_id: str = "msh"  # game
    games: str = "1,16,64"  # parallel games, a comma list
    simulations: str = "50,200"  # simulations in each tree, a comma list
    goal_samples: int = 5  # trees a decision
    plan_samples: int = 16  # samples of the one-step planner
    sequential: int = 3  # decisions of the sequential search a round
    threads: int = 0  # threads (default: torch's)
    cpu_time: bool = False  # CPU seconds instead of seconds: with --threads 1, on a machine that others use too
    rounds: int = 5  # counted rounds
    warm_up: int = 16384  # game steps of training before anything is timed
    json: str = ""  # file for the figures
    plot: str = str(ROOT / "docs" / "planner_speed.png")  # file for the plot; none if empty
    mctx: bool = False  # compare the search alone with mctx instead
    trees: int = 320  # trees of --mctx
    quick: bool = False  # one small setting, to see that all works


class OneStep:
    """hop_onestep.py's agent with the trained networks that fit it, asked as the tree search's is."""

    def __init__(self, args: onestep.Args, trained: dict[str, torch.Tensor]):
        self.game = onestep.GridGame(args.env_id)
        self.agent = onestep.Agent(self.game, onestep.checked(args, self.game)).eval()
        self.args = self.agent.args
        sizes = {name: value.shape for name, value in self.agent.state_dict().items()}
        fitting = {name: value for name, value in trained.items() if value.shape == sizes.get(name)}
        self.agent.load_state_dict(fitting, strict=False)  # the rest keeps its first weights
        self.player = onestep.Player(self.agent, 1)

    def act(self, state, mask, memory, seats, generator, oracle):
        company = types.SimpleNamespace(generator=generator)
        memory = torch.stack(list(memory), 2)
        with torch.no_grad():
            self.player.memory = memory
            return self.player.act(onestep.GridState(*state), mask, seats, company)


class Situation:
    """Agents of all methods, and games under way to decide in."""

    def __init__(self, options: Options, most_games: int):
        common = {
            "env_id": options.env_id,
            "co_players": "self",
            "num_envs": max(16, most_games),
            "plan_update": "none",
        }
        common |= {"num_steps": 32, "total_timesteps": max(options.warm_up, 32 * max(16, most_games))}
        trainer = script.Trainer(script.resolved(script.Args(**common)))
        with tqdm(total=options.warm_up, desc="warm-up", unit="step", leave=False) as progress:
            while trainer.global_step < options.warm_up:
                before = trainer.global_step
                trainer.iterate()
                progress.update(trainer.global_step - before)
        self.agents, self.trainer = {}, trainer
        trained = trainer.agent.state_dict()
        for name in METHODS:
            method = onestep if name.startswith("one step") else script
            settings = {
                "plan_update": "none" if name == "no planner" else "hop",
                "num_goal_samples": options.goal_samples,
            }
            settings |= {"plan_samples": options.plan_samples}
            known = {field.name for field in dataclasses.fields(method.Args)}
            args = method.Args(**{k: v for k, v in (common | settings).items() if k in known})
            if method is onestep:
                self.agents[name] = OneStep(args, trained)
                continue
            agent = method.Agent(method.GridGame(options.env_id), method.resolved(args)).eval()
            agent.load_state_dict(trained, strict=False)
            self.agents[name] = agent
        one_at_a_time = self.agents["sequential search"]
        one_at_a_time.plan = functools.partial(sequential_search.plan, one_at_a_time)

    def inputs(self, name: str, games: int, decisions: int) -> tuple:
        """The arguments of Agent.act in `games` fresh games, where all seats decide; or as many as `decisions`, spread
        over the games and seats. And how many these are."""
        game, generator = self.trainer.game, torch.Generator().manual_seed(2)
        state = game.initial_state(games, generator)
        mask, seats = game.action_mask(state), torch.zeros_like(state.players, dtype=torch.bool)
        spread = torch.linspace(0, seats.numel() - 1, min(decisions, seats.numel())).round().long()
        seats.view(-1)[spread] = True
        memory = script.Memory(*(total[:games] for total in self.trainer.memory))
        return (state, mask, memory, seats, torch.Generator().manual_seed(1), None), int(seats.sum())


def clock(options: Options) -> Callable[[], float]:
    """What counts the seconds."""
    return time.process_time if options.cpu_time else time.perf_counter


def measure(options: Options, situation: Situation, games: int, simulations: int, progress: tqdm) -> dict:
    """Medians over rounds: decisions a second by method, and shares of the batched search's time by part."""
    rates, shares, now = {name: [] for name in METHODS}, [], clock(options)
    for counted in range(options.rounds + 1):
        for name, agent in situation.agents.items():
            agent.args.num_simulations = simulations
            given, deciding = situation.inputs(name, games, options.sequential if "sequential" in name else 10**9)
            repeats = 1 if "search" in name else 10
            start = now()
            for _ in range(repeats):
                agent.act(*given)
            seconds = (now() - start) / repeats
            progress.update()
            if counted:
                rates[name].append(deciding / seconds)
        agent = situation.agents["batched search"]
        agent.timer = script.Timer(True)
        agent.act(*situation.inputs("batched search", games, 10**9)[0])
        if counted:
            shares.append(parts(agent.timer))
        agent.timer = script.Timer(False)
    shares = {part: statistics.median(share[part] for share in shares) for part in shares[0]}
    return {"rates": {name: statistics.median(rate) for name, rate in rates.items()}, "shares": shares}


def parts(timer: script.Timer) -> dict[str, float]:
    """Shares of the search's time, by part; `bookkeeping` is all that is in none of the others."""
    whole, shares = timer.seconds["MCTS",], {name: 0.0 for name in NO_BOOKKEEPING}
    for path, seconds in timer.seconds.items():
        if path[0] == "MCTS" and path[-1] in shares:
            shares[path[-1]] += seconds / whole
    return {**shares, "bookkeeping": 1.0 - sum(shares.values())}


def report(results: list[dict]) -> None:
    """Markdown tables."""
    print("| games | simulations | " + " | ".join(METHODS) + " | batched / sequential | one step / batched |")
    print("|" + "-|" * (len(METHODS) + 4))
    for result in results:
        rates = result["rates"]
        cells = [f"{rates[name]:,.1f}" if rates[name] < 100 else f"{rates[name]:,.0f}" for name in METHODS]
        batched = rates["batched search"]
        ratios = [f"{batched / rates['sequential search']:.1f}x", f"{rates['one step'] / batched:.1f}x"]
        print(f"| {result['games']} | {result['simulations']} | {' | '.join([*cells, *ratios])} |")
    names = list(results[0]["shares"])
    print("\n| games | simulations | " + " | ".join(names) + " |\n|" + "-|" * (len(names) + 2))
    for result in results:
        shares = " | ".join(f"{result['shares'][name]:.0%}" for name in names)
        print(f"| {result['games']} | {result['simulations']} | {shares} |")


def plot(results: list[dict], title: str, path: Path) -> None:
    """Decisions a second against games, one picture a number of simulations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    simulations = sorted({result["simulations"] for result in results})
    figure, axes = plt.subplots(1, len(simulations), figsize=(4.4 * len(simulations), 3.6), squeeze=False, sharey=True)
    colours = dict(zip(METHODS, ("#D55E00", "#0072B2", "#009E73", "#AA4499", "#555555"), strict=True))
    for axis, number in zip(axes[0], simulations, strict=True):
        rows = [result for result in results if result["simulations"] == number]
        for name in METHODS:
            rates = [row["rates"][name] for row in rows]
            axis.plot([row["games"] for row in rows], rates, "o-", color=colours[name], lw=1.5, ms=4, label=name)
        ticks = [row["games"] for row in rows]
        axis.set(xscale="log", yscale="log", xlabel="parallel games", title=f"{number} simulations")
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decisions a second")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------
# The search alone, against mctx
# ---------------------------------------------------------------------------------------------------------------------
EMBEDDING, HIDDEN, ACTIONS = 64, 128, 7
SIZES = [EMBEDDING + ACTIONS, HIDDEN, HIDDEN, EMBEDDING + ACTIONS + 2]  # out: next embedding, prior, value, reward
LOOK_AHEAD, CONSTANT, GAMMA = 50, 1.25, 0.99


class MLPModel:
    """For TreeSearch: one call of an MLP on (embedding, action) gives next embedding, prior, value and reward."""

    def __init__(self, weights: list, embedding: torch.Tensor, simulations: int):
        """`weights` and biases of the layers; `embedding` [T, EMBEDDING] of the roots."""
        self.weights, self.trees = weights, len(embedding)
        self.embedding = embedding.new_empty((simulations + 1) * self.trees, EMBEDDING)  # [nodes, EMBEDDING]
        self.logits = embedding.new_empty(len(self.embedding), ACTIONS)  # [nodes, A]
        self.embedding[: self.trees] = embedding
        self.goes_on = torch.ones(self.trees, dtype=torch.bool)

    def expand(self, nodes: torch.Tensor) -> torch.Tensor:
        """Prior [R, A] of the nodes [R]; their network call was made when they were reached."""
        return self.logits.index_select(0, nodes).softmax(1)

    def step(self, nodes: torch.Tensor, actions: torch.Tensor, simulation: int):
        """Reward [T], value [T] and bool [T], whether it goes on, of `actions` [T] at `nodes` [T]."""
        chosen = torch.nn.functional.one_hot(actions, ACTIONS).float()
        x = torch.cat([self.embedding.index_select(0, nodes), chosen], 1)
        (w1, b1), (w2, b2), (w3, b3) = self.weights
        x = torch.addmm(b3, torch.addmm(b2, torch.addmm(b1, x, w1).relu_(), w2).relu_(), w3)
        here = slice(simulation * self.trees, (simulation + 1) * self.trees)
        self.embedding[here] = x[:, :EMBEDDING].tanh()
        self.logits[here] = x[:, EMBEDDING : EMBEDDING + ACTIONS]
        return x[:, -1], x[:, -2], self.goes_on


def compare_with_mctx(options: Options) -> dict:
    """Simulations a second of TreeSearch and mctx.muzero_policy with the same MLP, in turns. Raises UsageError."""
    with script.refused("--mctx needs jax and mctx: pip install jax mctx"):
        jax, mctx = importlib.import_module("jax"), importlib.import_module("mctx")
    if jax.default_backend() != "cpu":
        raise script.UsageError("--mctx compares on the CPU: set JAX_PLATFORMS=cpu")
    jnp, generator = jax.numpy, torch.Generator().manual_seed(1)
    simulations = int(options.simulations.split(",")[0])
    weights = [
        (torch.randn(i, o, generator=generator) * (2 / i) ** 0.5, torch.zeros(o))
        for i, o in zip(SIZES[:-1], SIZES[1:], strict=True)
    ]
    embedding = torch.randn(options.trees, EMBEDDING, generator=generator).tanh()
    logits, value = torch.randn(options.trees, ACTIONS, generator=generator), torch.zeros(options.trees)
    params = [(jnp.array(w.numpy()), jnp.array(b.numpy())) for w, b in weights]

    def recurrent(params, key, action, embedding):
        x = jnp.concatenate([embedding, jax.nn.one_hot(action, ACTIONS)], 1)
        (w1, b1), (w2, b2), (w3, b3) = params
        x = jax.nn.relu(jax.nn.relu(x @ w1 + b1) @ w2 + b2) @ w3 + b3
        discount = jnp.full(x.shape[0], GAMMA)
        heads = {"prior_logits": x[:, EMBEDDING : EMBEDDING + ACTIONS], "value": x[:, -2], "reward": x[:, -1]}
        return mctx.RecurrentFnOutput(discount=discount, **heads), jnp.tanh(x[:, :EMBEDDING])

    @jax.jit
    def policy(params, key, logits, value, embedding):
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=embedding)
        sizes = {"num_simulations": simulations, "max_depth": LOOK_AHEAD, "dirichlet_fraction": 0.0}
        return mctx.muzero_policy(params, key, root, recurrent, **sizes, pb_c_init=CONSTANT).action_weights

    given = [jnp.array(x.numpy()) for x in (logits, value, embedding)]

    def theirs():
        policy(params, jax.random.PRNGKey(0), *given).block_until_ready()

    @torch.inference_mode()
    def ours():
        model = MLPModel(weights, embedding, simulations)
        search = script.TreeSearch(model, logits.softmax(1), value, simulations, CONSTANT, GAMMA, LOOK_AHEAD)
        search.run()

    rates, now = {"TreeSearch": [], "mctx": []}, clock(options)
    for counted in tqdm(range(4 * options.rounds + 2), desc="rounds", leave=False):
        for name, search in (("TreeSearch", ours), ("mctx", theirs)):
            start = now()
            search()
            if counted >= 2:  # jax compiles in the first round
                rates[name].append(options.trees * simulations / (now() - start))
    rates = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{options.trees} trees, {simulations} simulations, jax {jax.__version__}, mctx {mctx.__version__}\n")
    print("| search | simulations a second | of mctx |\n|-|-|-|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates['mctx']:.2f}x |")
    return {"trees": options.trees, "simulations": simulations, "rates": rates}


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options = dataclasses.replace(
            options, games="2", simulations="8", sequential=1, rounds=1, warm_up=512, trees=32
        )
    where = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    where += ", of CPU time" if options.cpu_time else ""
    if options.mctx:
        results = compare_with_mctx(options)
    else:
        games, simulations = ([int(x) for x in text.split(",")] for text in (options.games, options.simulations))
        situation, results = Situation(options, max(games)), []
        calls = len(games) * len(simulations) * (options.rounds + 1) * len(METHODS)
        with tqdm(total=calls, desc="decisions", unit="call", leave=False) as progress:
            for number in simulations:
                for count in games:
                    result = measure(options, situation, count, number, progress)
                    results.append({"games": count, "simulations": number, **result})
        title = f"{options.env_id}, decisions a second, {options.goal_samples} trees a decision, {where}"
        print(f"{title}\n")
        report(results)
        if options.plot and not options.quick:
            plot(results, title, Path(options.plot))
    if options.json:
        content = {"options": dataclasses.asdict(options), "machine": where, "results": results}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except script.UsageError as error:
        print(f"planner_speed.py: error: {error}", file=sys.stderr)
        sys.exit(2)

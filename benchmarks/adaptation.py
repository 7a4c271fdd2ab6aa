"""Few-shot adaptation to three co-players, by HOP's protocol: with frozen weights, and going on learning.

    python benchmarks/adaptation.py                                          # what is not there yet: days for all
    python benchmarks/adaptation.py --only "msg | self-play | hop_mcts | exploiter"    # one part of it
    python benchmarks/adaptation.py --only reference                         # scores 0 and 1
    python benchmarks/adaptation.py --report                                 # tables and docs/adaptation.png

A learner that was trained in self-play, or on the mixture (the main job), plays 2,400 steps with the same three
co-players of one kind: one match, the protocol of HOP (Huang et al. 2024, arXiv 2406.08002). `frozen`: no weight
changes, what adapts is what is inferred of the co-players. `learning`: `--init` with its defaults, one learner a match;
policy, V and opponent model go on learning, the planner plans. Kinds are scripted ones; strangers, which no training
has (`strangers.py`; half of them were kept out of all choices); and self-play players of plain and of prosocial PPO
that go on learning, too, by PPO with a constant rate.

A score is the mean return of the episodes that end in a window of 300 steps, between 0, a uniformly random player, and
1, the best of plain PPO and planning without goals that were trained on just these co-players (0.3 M steps each), whose
score is that of the last 600 steps, too.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import shlex
import tempfile
import time
from collections import defaultdict

import matplotlib
import numpy as np
import torch
import tyro

import runs
import strangers
from runs import ROOT, Running, about, benchmark, checkpoint_of, head, interval, random_return, results_in, row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import hop_onestep as ppo

GAMES = ("msh-4x4-4h1s", "msh-4h1s", "msg")
GROUPS = {"self-play": "--co-players self", "mixture": "--num-envs 16"}
METHODS = ("hop_mcts", "hop_onestep", "hop_ppo_gumbel", "latent_world_model")
SCRIPTED = {"msh": ("ns", "nh", "random"), "msg": ("cleaner", "exploiter", "random")}
LEARNERS = {"plain PPO": "", "prosocial PPO": " --prosocial 1"}  # co-players that go on learning
REFERENCES = ("--plan-update none", "")  # options, beside --goal none
WINDOW = 300  # steps of a window
LATE = 2  # windows at the end of a match that its score is of
FIRST = 10  # episodes at the start of a match, as many as one has in training
LEAST_RANGE = 0.05  # of score 1, between the two; with less there is no score
SHOWN = {"msh-4x4-4h1s": "nh", "msh-4h1s": "nh", "msg": "exploiter"}  # in the picture


@dataclasses.dataclass
class Options(Running):
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # seeds of training
    matches: int = 10  # of a learner with each kind
    steps: int = 2400  # of a match
    total_timesteps: int = 500_000  # of a learner's training
    reference_steps: int = 300_000  # of each training on the co-players of a match


def quickly(options):
    """Sizes that show that all works."""
    sizes = {"matches": 2, "steps": 600, "total_timesteps": 8192, "reference_steps": 8192, "seeds": (1,)}
    return dataclasses.replace(options, **sizes) if options.quick else options


def games(options):
    """Games, trainings by name and scripts."""
    return (GAMES[:1], {"self-play": GROUPS["self-play"]}, METHODS[1:3]) if options.quick else (GAMES, GROUPS, METHODS)


def kept(name, seed, options):
    """Path from ROOT of who was trained under this name."""
    return checkpoint_of("adaptation", name, seed, options.quick)


def kinds_of(game, seed, options):
    """Co-players by name, as `--co-players` takes them."""
    family = game[:3]
    kinds = {kind: kind for kind in SCRIPTED[family]}
    for label, players in (("stranger", strangers.DEVELOPMENT), ("held-out", strangers.HELD_OUT)):
        kinds |= {f"{label} {x.__name__}": f"benchmarks.strangers:{x.__name__}" for x in players[family]}
    kinds |= {f"learning {name}": kept(f"{game} | {name}", seed, options) for name in LEARNERS}
    return {kind: kinds[kind] for kind in list(kinds)[:: 5 if options.quick else 1]}


def trainings(options):
    """The learners, and the co-players that go on learning, seeds outermost."""
    jobs = []
    chosen, groups, methods = games(options)
    for seed, game in itertools.product(options.seeds, chosen):
        wanted = {f"{group} | {method}": (method, groups[group]) for group in groups for method in methods}
        plain = "--co-players self --goal none --plan-update none"
        wanted |= {name: ("hop_onestep", plain + words) for name, words in LEARNERS.items()}
        for name, (script, words) in wanted.items():
            job = {"setting": f"training | {game} | {name}", "seed": seed, "script": script}
            words = f"--env-id {game} {words} --seed {seed} --total-timesteps {options.total_timesteps}"
            job |= {"options": words, "kinds": {"self": "self"}, "episodes": 100}
            jobs.append(job | {"keep": kept(f"{game} | {name}", seed, options)})
    return jobs


def matches(options):
    """References, and the matches of every learner with every kind."""
    references = {}
    jobs = []
    chosen, groups, methods = games(options)
    for seed, game in itertools.product(options.seeds, chosen):
        for kind, entry in kinds_of(game, seed, options).items():
            job = {"game": game, "kind": kind, "entry": entry, "matches": options.matches, "steps": options.steps}
            setting = f"reference | {game} | {kind}"
            reference = {"setting": setting, "seed": 1, **job, "reference_steps": options.reference_steps}
            references.setdefault(setting, reference)
            for group, method in itertools.product(groups, methods):
                name = f"{game} | {group} | {method}"
                job |= {"seed": seed, "group": group, "script": method, "learner": kept(name, seed, options)}
                jobs.append({"setting": f"{name} | {kind}", **job})
    return [*references.values(), *jobs]


# ---------------------------------------------------------------------------------------------------------------------
# Matches
# ---------------------------------------------------------------------------------------------------------------------
def windows(ends, steps):
    """Mean return by window [steps / WINDOW] of episodes (step of the end, return); nan where none ended."""
    parts = [[] for _ in range(steps // WINDOW)]
    for step, value in ends:
        if step < WINDOW * len(parts):
            parts[step // WINDOW].append(value)
    return [float(np.mean(part)) if part else float("nan") for part in parts]


def frozen(script, path, entry, batch, steps, seed):
    """Of `batch` matches side by side: the returns by window, and the mean of each match's first ten episodes."""
    game = script.GridGame(script.load_checkpoint(path)["args"]["env_id"])
    generator = torch.Generator().manual_seed(seed)
    players = script.CoPlayers(game, [entry] * (game.num_players - 1), batch, steps + 1, generator, fixed=True)
    players.agents[0] = script.load_player(path, game, batch)
    state = game.start(batch, generator)
    returns = game.alive(state) * 0.0
    ends = []
    first = []
    with torch.no_grad():
        for step in range(steps):
            state, reward, terminated, truncated = game.step(state, players.act(state, game.action_mask(state)))
            returns = returns + reward
            ended = (terminated | truncated).all(1)
            own = script.pick(returns, players.focal)
            ends += [(step, value) for value in own[ended].tolist()]
            first += own[ended & (players.episode < FIRST)].tolist()
            returns = returns.masked_fill(ended[:, None], 0.0)
            players.observe(ended)
            state = game.restart(state, ended, generator)
    return windows(ends, steps), float(np.mean(first))


def learning(script, path, entry, steps, seed, learner):
    """Returns by window of one match in which the player goes on learning; `learner`, if any, lets the others."""
    ends = []

    def watch(iteration, finished, args, **seen):
        for _, kinds, returns in finished:
            ends.extend(((iteration - 1) * args.num_steps, value) for value in returns[kinds == 0].tolist())
        if learner:
            learner.learn(**seen)

    words = ["--init", path, "--co-players", entry, "--seed", f"{seed}", "--total-timesteps", f"{steps}"]
    args = script.parse_arguments(words)
    with tempfile.TemporaryDirectory() as folder, quiet(folder):
        script.train(args, watch)
    return windows(ends, steps)


class Learner:
    """Lets the agent of kind 1, of a run of hop_onestep.py without goals and planner, go on learning by PPO from what
    its seats saw and did. Where an episode is truncated, V of the last step stands for V of the final state."""

    def __init__(self):
        self.optimizer = None

    def learn(self, co_players, storage, state, generator, **rest):
        """After an iteration of `train`, whose variables these are."""
        agent = co_players.agents[1].agent
        own = agent.args
        if self.optimizer is None:
            learnt = {"params": [*agent.actor.parameters(), *agent.critic.parameters()]}
            self.optimizer = torch.optim.Adam([learnt], own.learning_rate, eps=1e-5)
        names = "own views mask alive action reward goes_on final_value".split()
        rows = {name: torch.stack(storage[name]) for name in names}  # [T, B, N, ..]
        seen = [torch.cat([rows[k], x[None]]) for k, x in zip(("own", "views"), co_players.game.features(state))]
        goals = seen[0].new_zeros(*seen[0].shape[:3], agent.moa.goal_size)
        seen[1:] = [x.unflatten(0, goals.shape[:2]) for x in agent.inputs(seen[1].flatten(0, 1), goals.flatten(0, 1))]
        with torch.no_grad():
            value = agent.critic(*seen).squeeze(-1)  # [T + 1, B, N]
            policy = ppo.masked(agent.actor(*(x[:-1] for x in seen)), rows["mask"]).log_softmax(-1)
        rows |= dict(zip(("own", "others", "goal"), (x[:-1] for x in seen)))
        rows["log_prob"] = ppo.pick(policy, rows["action"])
        ended = value[:-1] * (rows["final_value"] != 0)  # truncated, or else terminated
        following = torch.where(rows["goes_on"], value[1:], ended)
        reward = own.reward_scale * rows["reward"].lerp(rows["reward"].mean(2, keepdim=True), own.prosocial)
        steps = (reward, value[:-1], following, rows["goes_on"])
        rows["advantage"] = ppo.generalised_advantages(*steps, own.gamma, own.gae_lambda)
        rows["return"] = rows["advantage"] + value[:-1]
        rows["offset"] = torch.zeros_like(policy)
        seats = rows["alive"] & (co_players.kind == 1)
        rows = {name: rows[name][seats] for name in ppo.LEARNT if name in rows}
        for part in ppo.minibatches(rows, own.update_epochs, own.num_minibatches, generator):
            loss, terms = ppo.ppo_loss(agent, part, 0.1 * own.ent_coef)
            ppo.descend(self.optimizer, 0, loss, own.max_grad_norm, terms, defaultdict(list))


def work(job):
    """The result of one job, in this process."""
    torch.set_num_threads(1)
    start = time.time()
    if "options" in job:
        return runs.work(job)
    result = dict(job)
    entry = job["entry"]
    if entry.endswith(".pt"):
        entry = str(ROOT / entry)
    if "script" not in job:
        result["random"] = random_return(job["game"], entry)
        result["trained"] = [reference(job, entry, words) for words in REFERENCES]
        return result | about(start)
    script = importlib.import_module(job["script"])
    path = str(ROOT / job["learner"])
    learns = job["kind"].startswith("learning ")
    result["learning"] = []
    seeds = range(1000 * job["seed"], 1000 * job["seed"] + job["matches"])
    began = time.process_time()
    for seed in seeds:
        result["learning"].append(learning(script, path, entry, job["steps"], seed, Learner() if learns else None))
    result["cpu_seconds_a_match"] = round((time.process_time() - began) / len(seeds), 1)
    if not learns:
        result["frozen"], result["first"] = frozen(script, path, entry, job["matches"], job["steps"], seeds[0])
    return result | about(start)


def reference(job, entry, words):
    """Late return of a learner trained on just these co-players."""
    name = f"--env-id {job['game']} --co-players {entry} --goal none {words} --seed 1"
    with tempfile.TemporaryDirectory() as folder, quiet(folder):
        args = ppo.parse_arguments([*shlex.split(name), "--total-timesteps", str(job["reference_steps"])])
        run = os.path.abspath(ppo.train(args)["run"])
        returns, _ = frozen(ppo, run, entry, 2 * job["matches"], job["steps"], 1)
    return float(np.nanmean(returns[-LATE:]))


@contextlib.contextmanager
def quiet(folder):
    """In another working folder, and without output."""
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def scale(results):
    """Returns of score 0 and of score 1, by game and kind."""
    found = [r for r in results if r["setting"].startswith("reference")]
    return {(r["game"], r["kind"]): (r["random"], max(r["trained"])) for r in found}


def scored(result, name, scales):
    """Scores of `result[name]`, a return or an array of them; None where score 0 and 1 are nearly the same."""
    low, high = scales[result["game"], result["kind"]]
    if high - low < LEAST_RANGE * abs(high) or name not in result:
        return None
    return (np.asarray(result[name], float) - low) / (high - low)


def late(scores):
    """Mean of the last windows of scores [.., W]."""
    return None if scores is None else float(np.nanmean(scores[..., -LATE:]))


def figures(values):
    """Mean over seeds and the half width of its 95 % interval; empty without any."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean, low, high = interval(values)
    return f"{mean:.2f} +- {high - mean:.2f} ({len(values)})" if len(values) > 1 else f"{mean:.2f} (1)"


def report(file, pictures):
    """Tables; and docs/adaptation.png."""
    results = results_in(file)
    scales = scale(results)
    played = defaultdict(list)
    for result in results:
        if "learning" in result and (result["game"], result["kind"]) in scales:
            played[result["game"], result["group"], result["script"], result["kind"]].append(result)
    for (game, group), keys in itertools.groupby(sorted(played), key=lambda key: key[:2]):
        print(f"\n{game}, trained: {group}; mean +- half of the 95 % interval (seeds)")
        head("script", "co-players", "frozen, first ten", "frozen, last 600", "learning, last 600", "CPU s a match")
        for key in keys:
            several = played[key]
            firsts = [scored(r, "first", scales) for r in several]
            frozens = [late(scored(r, "frozen", scales)) for r in several]
            learnings = [late(scored(r, "learning", scales)) for r in several]
            seconds = f"{np.mean([r['cpu_seconds_a_match'] for r in several]):.0f}"
            firsts = [x if x is None else float(x) for x in firsts]
            row(key[2], key[3], figures(firsts), figures(frozens), figures(learnings), seconds)
    if pictures and played:
        plot(played, scales)


def plot(played, scales):
    """docs/adaptation.png: scores along the match, frozen (dotted) and learning, by game."""
    there = {(game, kind) for game, group, _, kind in played if group == "self-play"}
    shown = [pair for pair in SHOWN.items() if pair in there]
    if not shown:
        return
    figure, panels = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), sharey=True, squeeze=False)
    for panel, (game, kind) in zip(panels[0], shown):
        for number, method in enumerate(METHODS):
            several = played.get((game, "self-play", method, kind), [])
            for name, style in (("frozen", ":"), ("learning", "-")):
                scores = [scored(r, name, scales) for r in several]
                scores = [np.nanmean(np.atleast_2d(x), 0) for x in scores if x is not None]
                if scores:
                    ends = WINDOW * np.arange(1, len(scores[0]) + 1)
                    panel.plot(ends, np.mean(scores, 0), style, color=f"C{number}", label=f"{method}, {name}")
        panel.axhline(1.0, color="0.7", linewidth=1)
        panel.set_title(f"{game}: three {kind}")
        panel.set_xlabel("steps of the match")
    panels[0, 0].set_ylabel("score (0 random, 1 trained on them)")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "adaptation.png", dpi=110)


def main(options):
    file = options.results("adaptation")
    options = quickly(options)
    for jobs in (trainings, matches):  # matches need who is trained
        asked = [] if options.worker or options.report else jobs(options)
        if not benchmark(__file__, options, asked, work, file):
            return
    report(file, pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

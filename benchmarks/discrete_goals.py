"""The figures of hop_ppo_gumbel.py in the README: opponent model, self-play, goals' worth by episode, and speed.

    python benchmarks/discrete_goals.py --part model      # gap closed and kinds read off, by way of training
    python benchmarks/discrete_goals.py --part selfplay   # all seats learn, with the script's own goals
    python benchmarks/discrete_goals.py --part goals      # one learner among scripted players: none, inferred, oracle
    python benchmarks/discrete_goals.py --part speed      # game steps a CPU second against plain PPO, in turns
    python benchmarks/discrete_goals.py --report          # tables from the results so far

Every run uses one thread. A result is a JSON line in `benchmarks/results/discrete_goals.jsonl` with its exact command,
seed, seconds, machine and commit; what is there is not repeated, so an interrupted part goes on where it stopped.
"""

import dataclasses
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import hop_onestep
import hop_ppo_gumbel as script
import moa_goals

RESULTS = Path(__file__).resolve().parent / "results" / "discrete_goals.jsonl"
MODEL = {  # setting -> game, kinds, matches and updates
    "msh-4h1s": ("msh-4h1s", "ns,nh,random,ns-noisy,nh-noisy", 4000, 3000),
    "msh-4x4-4h1s": ("msh-4x4-4h1s", "ns,nh,random", 2000, 2000),
    "msg": ("msg", "cleaner,exploiter,random", 1000, 1000),
}
WAYS = ("em", "gumbel", "amortised")
SELFPLAY = {
    "msh-4x4-4h1s": "--total-timesteps 200000",
    "msh-4h1s": "--total-timesteps 500000",
    "msg": "--total-timesteps 250000",
}
KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
GOALS = ("none", "inferred", "oracle")


@dataclasses.dataclass
class Options:
    part: Literal["model", "selfplay", "goals", "speed"] = "model"  # what to run
    only: str = ""  # settings whose name contains this
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    episodes: int = 6000  # evaluation episodes for each kind of co-players
    steps: int = 400_000  # game steps of training in `goals`
    ways: str = "em,gumbel,amortised"  # ways of training the goals in `model`
    options: str = ""  # further options of the script
    keep: bool = True  # write the results down
    report: bool = False  # print tables only


# ---------------------------------------------------------------------------------------------------------------------
# Opponent model
# ---------------------------------------------------------------------------------------------------------------------
def fit(moa, loss, train, relative, options, generator) -> None:
    """`options.updates` minibatches of matches; the learning rate falls to 0."""
    optimizer = torch.optim.Adam(moa.parameters(), options.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.updates)
    for k in range(options.updates):
        rows = train.batch + torch.randint(len(train), (options.minibatch,), generator=generator)
        value, _ = loss(moa, moa_goals.batch_of(train, rows, relative), k / options.updates)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(moa.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def beliefs(moa, batch, episode) -> tuple[torch.Tensor, torch.Tensor]:
    """Log belief before each step, and log-likelihood of each action under every goal: both [S, L, N, G]."""
    own, others = moa.relative(batch.state)
    mask = moa.relative.game.action_mask(batch.state)
    steps = moa.log_likelihood(own, others, mask, batch.actions.flatten(0, 1)).unflatten(0, batch.start.shape)
    counted = steps * batch.active.unsqueeze(-1)
    prior = torch.full_like(steps[:, 0], -float(torch.tensor(moa.args.goals).log()))
    result = torch.zeros_like(steps)
    for k in range(int(episode.max()) + 1):
        here = (episode == k)[..., None, None]
        inside = counted * here
        result = torch.where(here, (prior.unsqueeze(1) + inside.cumsum(1) - inside).log_softmax(-1), result)
        prior = moa.next_prior(prior, inside.sum(1))
    return result, steps


@torch.no_grad()
def measure(moa, buffer, episodes, limit):
    """NLL [1 + episodes] of the belief's mixture, and (goal, kind) of all players at the start of each episode."""
    sums, starts = torch.zeros(2, episodes), [[] for _ in range(episodes)]
    for rows in torch.arange(min(len(buffer), limit)).split(100):
        rows = buffer.batch + rows
        batch = moa_goals.batch_of(buffer, rows, moa.relative)
        episode = buffer.data["episode"][rows, : batch.start.shape[1]].long()
        log_belief, steps = beliefs(moa, batch, episode)
        nll = -(log_belief + steps).logsumexp(-1)
        kind, live = buffer.data["script"][rows].long(), batch.active.any(2)
        for k in range(episodes):
            here = (episode == k).unsqueeze(2) & batch.active
            sums[:, k] += torch.stack([nll[here].sum(), here.sum()])
            at = ((episode < k) & live).sum(1).clamp(max=episode.shape[1] - 1)
            goal = log_belief[torch.arange(len(rows)), at].argmax(-1)
            starts[k].append(torch.stack([goal[kind >= 0], kind[kind >= 0]], 1))
    nll = torch.cat([sums[0].sum(0, keepdim=True) / sums[1].sum(), sums[0] / sums[1]])
    return nll, [torch.cat(s) for s in starts]


def accuracy(train, test, game) -> float:
    """Share of held-out players whose goal means their kind, by majority vote on the training matches."""
    if game.family == "msg":  # the cleaner against the rest: the others differ only on a drift
        train, test = (torch.stack([x[:, 0], x[:, 1] == script.SCRIPTED.index("cleaner")], 1) for x in (train, test))
    votes = torch.zeros(64, 64).index_put((train[:, 0], train[:, 1]), torch.ones(len(train)), accumulate=True)
    return float((votes.argmax(1)[test[:, 0]] == test[:, 1]).float().mean())


def model(setting: str, seed: int, options: Options) -> list[dict]:
    """One setting with one seed: NLL of none, oracle and the three ways of training; kinds read off the beliefs. All
    learn from the same whole matches, in as many minibatches of as many matches."""
    env_id, kinds, matches, updates = MODEL[setting]
    base = moa_goals.Options(env_id=env_id, matches=matches, updates=updates, seed=seed)
    game, generator = script.GridGame(env_id), torch.Generator().manual_seed(seed)
    train, test = (
        moa_goals.play(game, kinds.split(","), n, base.episodes, seed + s) for s, n in enumerate((matches, 600))
    )
    relative, results, nll = script.RelativeFeatures(game), [], {}
    for goal in ("none", "oracle", *options.ways.split(",")):
        if options.only and options.only not in f"{setting} | {goal}":
            continue
        torch.manual_seed(seed)
        start, row = time.process_time(), {"part": "model", "setting": setting, "seed": seed, "goal": goal}
        if goal in ("none", "oracle"):
            moa = hop_onestep.MOA(relative, base.hidden, 8, goal)

            def loss(moa, batch, done, goal=goal):
                batch = batch if goal == "oracle" else batch._replace(oracle=None)
                return hop_onestep.moa_loss(moa, batch, 0.01, base.subgoal_coef, False, generator)

            fit(moa, loss, train, relative, base, generator)
            nll[goal] = moa_goals.held_out(moa, goal, test, base)
        else:
            words = ["--moa-share", "1", *shlex.split(options.options), "--goal-training", goal, "--env-id", env_id]
            args = script.resolved(script.parse_arguments(words))
            moa = script.MOA(relative, args)

            def loss(moa, batch, done, args=args):
                return script.moa_loss(moa, batch, args.subgoal_coef, 1.0 - 0.9 * done, generator)

            fit(moa, loss, train, relative, base, generator)
            nll[goal], held = measure(moa, test, base.episodes, len(test))
            _, seen = measure(moa, train, base.episodes, 1000)
            row["accuracy"] = [round(accuracy(a, b, game), 4) for a, b in zip(seen, held, strict=True)]
            use = torch.bincount(held[-1][:, 0], minlength=args.goals)
            row["use"] = (use / use.sum()).tolist()
            if {"none", "oracle"} <= set(nll):
                closed = (nll["none"] - nll[goal]) / (nll["none"] - nll["oracle"])
                row["closed"] = [round(x, 4) for x in closed.tolist()]
        results.append({**row, "nll": [round(x, 4) for x in nll[goal].tolist()], "cpu": time.process_time() - start})
        print({k: v for k, v in results[-1].items() if k != "part"}, flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def run(words: str, kinds: list[str], options: Options, seed: int) -> dict:
    """Trains with the options `words`, and evaluates among three of each kind."""
    command = f"{words} --seed {seed} {options.options}".strip()
    start = time.process_time()
    metrics = script.train(script.parse_arguments(shlex.split(command)))
    result = {"command": f"python hop_ppo_gumbel.py {command}", "cpu": round(time.process_time() - start, 1)}
    n = script.GridGame(script.load_checkpoint(metrics["run"])["game"]).num_players
    for key in ("returns", "by_episode", "all_seats"):
        result[key] = {}
    for kind in kinds:
        played = script.evaluate(metrics["run"], kind, episodes=options.episodes, num_envs=200, seed=1000 + seed)
        result["returns"][kind] = round(played["focal_return"], 4)
        result["by_episode"][kind] = [round(x, 4) for x in played["by_episode"]]
        result["all_seats"][kind] = round((played["focal_return"] + (n - 1) * played["co_player_return"]) / n, 4)
    return result | {"metrics": {k: v for k, v in metrics.items() if k != "run" and k.startswith(("moa", "charts"))}}


def speed(env_id: str, co_players: str, rounds: int = 5, warm_up: int = 16384) -> dict:
    """Median game steps a CPU second of training: plain PPO by hop_onestep.py, and this script with inferred goals.
    A round is `moa_every` iterations, so that every part of the work is in it; the scripts take turns."""
    plain = hop_onestep.Args(env_id=env_id, co_players=co_players, goal="none", plan_update="none")
    trainers = [
        hop_onestep.Trainer(hop_onestep.resolved(plain)),
        script.Trainer(script.resolved(script.Args(env_id=env_id, co_players=co_players))),
    ]
    for trainer in trainers:
        while trainer.global_step < warm_up:
            trainer.iterate()
    every, rates = trainers[1].args.moa_every, ([], [])
    for _ in range(rounds):
        for trainer, rate in zip(trainers, rates, strict=True):
            start = time.process_time()
            for _ in range(every):
                trainer.iterate()
            rate.append(every * trainer.args.num_envs * trainer.args.num_steps / (time.process_time() - start))
    plain, ours = map(statistics.median, rates)
    return {
        "plain": round(plain),
        "ours": round(ours),
        "ratio": round(statistics.median(b / a for a, b in zip(*rates, strict=True)), 3),
    }


def jobs(options: Options):
    """(setting, seed, what it does -> rows) of a part."""
    for seed in options.seeds:
        if options.part == "model":
            for setting in MODEL:
                yield setting, seed, lambda setting=setting, seed=seed: model(setting, seed, options)
        elif options.part == "selfplay":
            for env_id, words in SELFPLAY.items():
                words = f"--env-id {env_id} --co-players self {words}"
                yield env_id, seed, lambda words=words, seed=seed: [run(words, ["self"], options, seed)]
        elif options.part == "goals":
            for (env_id, kinds), goal in itertools.product(KINDS.items(), GOALS):
                words = f"--env-id {env_id} --co-players {kinds} --total-timesteps {options.steps} --goal {goal}"
                act = lambda words=words, kinds=kinds, seed=seed: [run(words, kinds.split(","), options, seed)]  # noqa: E731
                yield f"{env_id} | {goal}", seed, act
        else:
            for env_id, company in itertools.product(KINDS, ("self", "scripted")):
                kinds = company if company == "self" else KINDS[env_id]
                yield f"{env_id} | {company}", seed, lambda env_id=env_id, kinds=kinds: [speed(env_id, kinds)]


def main(options: Options) -> None:
    torch.set_num_threads(1)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if options.report:
        report(known)
        return
    done = {(r["part"], r["setting"], r["seed"]) for r in known} if options.keep else set()
    about = {"machine": f"{platform.processor() or platform.machine()}, 1 thread of {os.cpu_count()}"}
    about |= {"torch": torch.__version__, "benchmark": shlex.join(["python", *sys.argv])}
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent.parent, capture_output=True, text=True
    )
    about["commit"] = git.stdout.strip()
    for setting, seed, act in jobs(options):
        only = options.only.partition(" | ")[0] if options.part == "model" else options.only
        if (options.part, setting, seed) in done or only not in setting:
            continue
        start = time.time()
        for row in act():
            row = {"part": options.part, "setting": setting, "seed": seed, **row, "seconds": time.time() - start}
            print(
                {k: v for k, v in row.items() if k in ("setting", "seed", "returns", "plain", "ours", "ratio", "cpu")}
            )
            if options.keep:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps({**row, **about}) + "\n")


def spread(rows: list[dict], key) -> str:
    """Mean over seeds, and every seed."""
    values = [key(row) for row in rows]
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def percent(values) -> str:
    return " | ".join(f"{value:.0%}" for value in values)


def report(known: list[dict]) -> None:
    """Markdown tables of the results so far."""
    rows = {}
    for row in sorted(known, key=lambda row: row["seed"]):
        rows.setdefault((row["part"], row["setting"], row.get("goal", "")), []).append(row)
    part = {
        name: {k[1:]: v for k, v in rows.items() if k[0] == name} for name in ("selfplay", "model", "goals", "speed")
    }
    print("| game, all seats learn | mean return (seeds) | CPU seconds |\n|-|-|-|")
    for (env_id, _), runs in part["selfplay"].items():
        seconds = statistics.mean(r["cpu"] for r in runs)
        print(f"| {env_id} | {spread(runs, lambda r: r['all_seats']['self'])} | {seconds:.0f} |")
    ways = {k: v for k, v in part["model"].items() if k[1] in WAYS}
    print("\n| gap closed: game, goals by | seeds | all | episode 1 | 2 | 3 | 4 | 5 |\n|-|-|-|-|-|-|-|-|")
    for (env_id, way), runs in ways.items():
        closed = [r["closed"] for r in runs if "closed" in r]  # needs `none` and `oracle` of the same call
        if closed:
            means = map(statistics.mean, zip(*closed, strict=True))
            print(f"| {env_id}, `{way}` | {len(closed)} | {percent(means)} |")
    print("\n| kind read off: game, goals by | seeds | at the start of episode 1 | 2 | 3 | 4 | 5 |\n|-|-|-|-|-|-|-|")
    for (env_id, way), runs in ways.items():
        means = map(statistics.mean, zip(*(r["accuracy"] for r in runs), strict=True))
        print(f"| {env_id}, `{way}` | {len(runs)} | {' | '.join(f'{v:.3f}' for v in means)} |")
    for env_id, kinds in KINDS.items():
        kinds, means = kinds.split(","), {}
        by_goal = {goal: part["goals"].get((f"{env_id} | {goal}", ""), []) for goal in GOALS}
        if not all(by_goal.values()):
            continue
        print(f"\n| {env_id}: learner with three | {' | '.join(kinds)} | mean |\n|-|{'-|' * len(kinds)}-|")
        for goal, runs in by_goal.items():
            columns = " | ".join(spread(runs, lambda r, kind=kind: r["returns"][kind]) for kind in kinds)
            means[goal] = statistics.mean(r["returns"][kind] for r in runs for kind in kinds)
            print(f"| {goal} | {columns} | {means[goal]:.3f} |")
        share = (means["inferred"] - means["none"]) / (means["oracle"] - means["none"])
        print(f"\n`inferred` goes {share:.0%} of the way from `none` to `oracle`.")
        print("\n| return at the k-th episode of a match | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |\n|-|" + "-|" * 10)
        for kind, goal in itertools.product(kinds, GOALS):
            curve = map(statistics.mean, zip(*(r["by_episode"][kind] for r in by_goal[goal]), strict=True))
            print(f"| three {kind}, {goal} | {' | '.join(f'{v:.2f}' for v in curve)} |")
    print("\n| training, game steps a CPU second | plain PPO | inferred goals | ratio |\n|-|-|-|-|")
    for (setting, _), runs in part["speed"].items():
        plain, ours, ratio = (statistics.median(r[k] for r in runs) for k in ("plain", "ours", "ratio"))
        print(f"| {setting.replace(' | ', ', ')} | {plain:,.0f} | {ours:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

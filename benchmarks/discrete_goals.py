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
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

import runs
from runs import Running, about, benchmark, results_in, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hop_ppo_gumbel as script
import latent_world_model
import moa_goals

MODEL = {  # game: kinds, matches and updates
    "msh-4h1s": ("ns,nh,random,ns-noisy,nh-noisy", 4000, 3000),
    "msh-4x4-4h1s": ("ns,nh,random", 2000, 2000),
    "msg": ("cleaner,exploiter,random", 1000, 1000),
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
class Options(Running):
    part: Literal["model", "selfplay", "goals", "speed", "all"] = "all"  # what to run
    episodes: int = 6000  # evaluation episodes for each kind of co-players
    steps: int = 400_000  # game steps of training in `goals`


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


def model(job: dict) -> dict:
    """NLL of none, oracle and the three ways of training; kinds read off the beliefs. All learn from the same whole
    matches, in as many minibatches of as many matches."""
    start, seed, kinds = time.time(), job["seed"], job["kinds"]
    sizes = {"matches": job["matches"], "updates": job["updates"], "seed": seed}
    base, game = moa_goals.Options(env_id=job["game"], **sizes), script.GridGame(job["game"])
    numbers = torch.Generator().manual_seed(seed)
    train, test = (
        moa_goals.play(game, kinds.split(","), n, base.episodes, seed + s)
        for s, n in enumerate((job["matches"], job["held_out"]))
    )
    relative, results, nll = script.RelativeFeatures(game), {}, {}
    for goal in ("none", "oracle", *WAYS):
        torch.manual_seed(seed)
        began, row = time.process_time(), {}
        if goal in ("none", "oracle"):
            moa = latent_world_model.MOA(relative, base.hidden, 8, goal)

            def loss(moa, batch, done, goal=goal):
                batch = batch if goal == "oracle" else batch._replace(oracle=None)
                return latent_world_model.moa_loss(moa, batch, 0.01, base.subgoal_coef, False, numbers)

            fit(moa, loss, train, relative, base, numbers)
            nll[goal] = moa_goals.held_out(moa, goal, test, base)
        else:
            words = ["--moa-share", "1", "--goal-training", goal, "--env-id", job["game"]]
            args = script.resolved(script.parse_arguments(words))
            moa = script.MOA(relative, args)

            def loss(moa, batch, done, args=args):
                return script.moa_loss(moa, batch, args.subgoal_coef, 1.0 - 0.9 * done, numbers)

            fit(moa, loss, train, relative, base, numbers)
            nll[goal], held = measure(moa, test, base.episodes, len(test))
            _, seen = measure(moa, train, base.episodes, 1000)
            row["accuracy"] = [round(accuracy(a, b, game), 4) for a, b in zip(seen, held, strict=True)]
            use = torch.bincount(held[-1][:, 0], minlength=args.goals)
            row["use"] = (use / use.sum()).tolist()
            closed = (nll["none"] - nll[goal]) / (nll["none"] - nll["oracle"])
            row["closed"] = [round(x, 4) for x in closed.tolist()]
        row["nll"] = [round(x, 4) for x in nll[goal].tolist()]
        results[goal] = row | {"cpu_seconds": round(time.process_time() - began, 1)}
    return {**job, "command": command(job), "goals": results} | about(start)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def speed(job: dict) -> dict:
    """Median game steps a CPU second of training: plain PPO by latent_world_model.py, and this script with inferred
    goals. A round is `moa_every` iterations, so that every part of the work is in it; the scripts take
    turns."""
    start, company = time.time(), {"env_id": job["game"], "co_players": job["co_players"]}
    plain = latent_world_model.Args(**company, goal="none", plan_update="none")
    trainers = [
        latent_world_model.Trainer(latent_world_model.resolved(plain)),
        script.Trainer(script.resolved(script.Args(**company))),
    ]
    for trainer in trainers:
        while trainer.global_step < job["warm_up"]:
            trainer.iterate()
    every, rates = trainers[1].args.moa_every, ([], [])
    for _ in range(job["rounds"]):
        for trainer, rate in zip(trainers, rates, strict=True):
            began = time.process_time()
            for _ in range(every):
                trainer.iterate()
            rate.append(every * trainer.args.num_envs * trainer.args.num_steps / (time.process_time() - began))
    plain, ours = map(statistics.median, rates)
    figures = {"plain": round(plain), "ours": round(ours)}
    figures["ratio"] = round(statistics.median(b / a for a, b in zip(*rates, strict=True)), 3)
    return {**job, "command": command(job), **figures} | about(start)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------
def command(job: dict) -> str:
    """The command that repeats a job that is no run of the script."""
    return f"python benchmarks/discrete_goals.py --part {job['part']} --only '{job['setting']}' --seeds {job['seed']}"


def work(job: dict) -> dict:
    """The result of one job, in this process."""
    torch.set_num_threads(1)
    return {"model": model, "speed": speed}.get(job["part"], runs.work)(job)


def all_jobs(options: Options) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    quick, jobs = options.quick, []
    episodes = 20 if quick else options.episodes

    def job(part: str, setting: str, seed: int, **more) -> None:
        if options.part in (part, "all"):
            jobs.append({"part": part, "setting": f"{part} | {setting}", "seed": seed, **more})

    def training(part: str, setting: str, seed: int, words: str, kinds: str) -> None:
        words = f"{words}{' --total-timesteps 8192' * quick} --seed {seed}"
        kinds = {kind: kind for kind in kinds.split(",")}
        job(part, setting, seed, script="hop_ppo_gumbel", options=words, kinds=kinds, episodes=episodes)

    for seed in options.seeds[: 1 if quick else None]:
        for game, (kinds, matches, updates) in MODEL.items():
            sizes = (200, 200, 20) if quick else (matches, 600, updates)
            sizes = dict(zip(("matches", "held_out", "updates"), sizes, strict=True))
            job("model", game, seed, game=game, kinds=kinds, **sizes)
        for game, words in SELFPLAY.items():
            training("selfplay", game, seed, f"--env-id {game} --co-players self --moa-every 8 {words}", "self")
        for (game, kinds), goal in itertools.product(KINDS.items(), GOALS):
            words = f"--env-id {game} --co-players {kinds} --total-timesteps {options.steps} --goal {goal}"
            training("goals", f"{game} | {goal}", seed, words, kinds)
        for game, company in itertools.product(KINDS, ("self", "scripted")):
            sizes = {"rounds": 1 if quick else 5, "warm_up": 4096 if quick else 16384}
            kinds = "self" if company == "self" else KINDS[game]
            job("speed", f"{game} | {company}", seed, game=game, co_players=kinds, **sizes)
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def percent(values) -> str:
    return " | ".join(f"{value:.0%}" for value in values)


def report(results: list[dict]) -> None:
    """Markdown tables of the results."""
    part = {name: {} for name in ("selfplay", "model", "goals", "speed")}
    for result in results:
        part[result["part"]].setdefault(result["setting"].partition(" | ")[2], []).append(result)
    print("\n| game, all seats learn | mean return (seeds) | CPU seconds |\n|-|-|-|")
    for game, some in part["selfplay"].items():
        seconds = statistics.mean(r["train_cpu_seconds"] for r in some)
        print(f"| {game} | {spread([r['all_seats']['self'] for r in some])} | {seconds:.0f} |")
    ways = list(itertools.product(part["model"], WAYS))
    print("\n| gap closed: game, goals by | seeds | all | episode 1 | 2 | 3 | 4 | 5 |\n|-|-|-|-|-|-|-|-|")
    for game, way in ways:
        closed = [r["goals"][way]["closed"] for r in part["model"][game]]
        print(f"| {game}, `{way}` | {len(closed)} | {percent(map(statistics.mean, zip(*closed, strict=True)))} |")
    print("\n| kind read off: game, goals by | seeds | at the start of episode 1 | 2 | 3 | 4 | 5 |\n|-|-|-|-|-|-|-|")
    for game, way in ways:
        shares = [r["goals"][way]["accuracy"] for r in part["model"][game]]
        means = map(statistics.mean, zip(*shares, strict=True))
        print(f"| {game}, `{way}` | {len(shares)} | {' | '.join(f'{v:.3f}' for v in means)} |")
    for game, kinds in KINDS.items():
        kinds, means = kinds.split(","), {}
        by_goal = {goal: part["goals"].get(f"{game} | {goal}", []) for goal in GOALS}
        if not all(by_goal.values()):
            continue
        print(f"\n| {game}: learner with three | {' | '.join(kinds)} | mean |\n|-|{'-|' * len(kinds)}-|")
        for goal, some in by_goal.items():
            columns = " | ".join(spread([r["returns"][kind] for r in some]) for kind in kinds)
            means[goal] = statistics.mean(r["returns"][kind] for r in some for kind in kinds)
            print(f"| {goal} | {columns} | {means[goal]:.3f} |")
        gap = means["oracle"] - means["none"]
        share = (means["inferred"] - means["none"]) / gap if gap else float("nan")
        print(f"\n`inferred` goes {share:.0%} of the way from `none` to `oracle`.")
        print("\n| return at the k-th episode of a match | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |\n|-|" + "-|" * 10)
        for kind, goal in itertools.product(kinds, GOALS):
            curve = map(statistics.mean, zip(*(r["by_episode"][kind] for r in by_goal[goal]), strict=True))
            print(f"| three {kind}, {goal} | {' | '.join(f'{v:.2f}' for v in curve)} |")
    print("\n| training, game steps a CPU second | plain PPO | inferred goals | ratio |\n|-|-|-|-|")
    for setting, some in part["speed"].items():
        plain, ours, ratio = (statistics.median(r[k] for r in some) for k in ("plain", "ours", "ratio"))
        print(f"| {setting.replace(' | ', ', ')} | {plain:,.0f} | {ours:,.0f} | {ratio:.2f} |")


def main(options: Options) -> None:
    file = options.results("discrete_goals")
    if benchmark(__file__, options, [] if options.worker else all_jobs(options), work, file):
        report(results_in(file))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The figures of hop_onestep.py in the README: trains every setting with several seeds, evaluates, and prints tables.

    python benchmarks/onestep.py --part selfplay     # all seats learn: planner and plain PPO
    python benchmarks/onestep.py --part goals        # one learner among scripted players: goals none, inferred, oracle
    python benchmarks/onestep.py --part main         # the README's main job
    python benchmarks/onestep.py --report            # tables from the results so far

Every run uses one thread; `--jobs` runs go side by side. A result is a JSON line in `benchmarks/results/onestep.jsonl`
with its exact command, seed, seconds and machine; runs that are there are not repeated, so an interrupted part goes on
where it stopped. `--quick` cuts steps and seeds to see that all works.
"""

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Literal

import tyro

from runs import ROOT, Running, benchmark, by_setting, earlier_moa, spread, work

# setting -> options of hop_onestep.py; every setting of a part is run with every seed
SELF = f"--co-players self --goal none {earlier_moa()}"
SELFPLAY = {
    f"{env} | {name}": f"--env-id {env} {SELF} {options} {planner}"
    for env, options in {
        "msh-4x4-4h1s": "--total-timesteps 200000",
        "msh-4h1s": "--total-timesteps 500000",
        "msg": "--total-timesteps 250000 --plan-samples 8",
        "msg gamma 0.95": "--total-timesteps 250000 --plan-samples 8 --gamma 0.95",
    }.items()
    for name, planner in {"planner": "", "plain PPO": "--plan-update none"}.items()
}
SELFPLAY = {name: options.replace("msg gamma 0.95", "msg") for name, options in SELFPLAY.items()}
KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
MOA_UPDATES = {"msh-4x4-4h1s": 8, "msg": 4}
GOALS = {
    f"{env} | {goal}": f"--env-id {env} --co-players {kinds} --plan-update none --total-timesteps 800000 "
    f"{earlier_moa(MOA_UPDATES[env])} --goal {goal}"
    for env, kinds in KINDS.items()
    for goal in ("none", "inferred", "oracle")
}
PLAIN = "--plan-update none --goal none"
ALONE = {  # plain PPO trained on exactly these co-players
    f"{env} | PPO on {kind}": f"--env-id {env} --co-players {kind} {PLAIN} --total-timesteps 500000"
    for env, kinds in KINDS.items()
    for kind in kinds.split(",")
}
MAIN = {"main job": "--num-envs 16"}


@dataclasses.dataclass
class Options(Running):
    part: Literal["selfplay", "goals", "main"] = "selfplay"  # what to run
    episodes: int = 2000  # evaluation episodes for each kind of co-players


def plot(runs_of: dict[str, list[dict]]) -> None:
    """docs/curves.png: self-play returns in training against game steps, every seed a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    games = list(dict.fromkeys(setting.partition(" | ")[0] for setting in SELFPLAY if setting in runs_of))
    if not games:
        return
    figure, axes = plt.subplots(1, len(games), figsize=(4.2 * len(games), 3.4), squeeze=False)
    for axis, game in zip(axes[0], games, strict=True):
        for colour, method in (("#009E73", "planner"), ("#D55E00", "plain PPO")):
            for k, result in enumerate(runs_of.get(f"{game} | {method}", [])):
                steps, _, returns = zip(*result["curve"], strict=True)
                axis.plot([s / 1000 for s in steps], returns, color=colour, lw=1, label=method if k == 0 else None)
        axis.set(title=game, xlabel="thousand game steps")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean return of all seats")
    axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=110)


def report(file: Path, picture: bool) -> None:
    """Markdown tables of the results in `file`, and the picture."""
    runs_of = by_setting(file)
    if picture:
        plot(runs_of)
    print("| game, all seats learn | method | mean return (seeds) | CPU seconds |\n|-|-|-|-|")
    for setting in [s for s in (*SELFPLAY, *MAIN) if s in runs_of]:
        runs = runs_of[setting]
        env, _, method = setting.partition(" | ")
        returns = spread([r["all_seats"]["self"] for r in runs])
        print(f"| {env} | {method} | {returns} | {statistics.mean(r.get('cpu_seconds', math.nan) for r in runs):.0f} |")
    for env, kinds in KINDS.items():
        kinds = kinds.split(",")
        if not all(f"{env} | {goal}" in runs_of for goal in ("none", "inferred", "oracle")):
            continue
        print(f"\n| {env}: learner with three | {' | '.join(kinds)} | mean |\n|-|{'-|' * len(kinds)}-|")
        means = {}
        for goal in ("none", "inferred", "oracle"):
            runs = runs_of[f"{env} | {goal}"]
            columns = [[r["returns"][kind] for r in runs] for kind in kinds]
            means[goal] = statistics.mean(itertools.chain(*columns))
            print(f"| {goal} | {' | '.join(spread(c) for c in columns)} | {means[goal]:.3f} |")
        alone = [runs_of.get(f"{env} | PPO on {kind}") for kind in kinds]
        if all(alone):
            columns = [[r["returns"][kind] for r in runs] for runs, kind in zip(alone, kinds, strict=True)]
            mean = statistics.mean(itertools.chain(*columns))
            print(f"| plain PPO on exactly these | {' | '.join(map(spread, columns))} | {mean:.3f} |")
        gap = means["oracle"] - means["none"]
        share = (means["inferred"] - means["none"]) / gap if gap else math.nan
        print(f"\n`inferred` goes {share:.0%} of the way from `none` to `oracle` ({gap:.3f}).")


def main(options: Options) -> None:
    settings = {"selfplay": SELFPLAY, "goals": {**GOALS, **ALONE}, "main": MAIN}[options.part]
    cut, episodes = (" --total-timesteps 10000", 64) if options.quick else ("", options.episodes)
    jobs = [
        {"script": "hop_onestep", "setting": setting, "seed": seed, "options": f"{words} --seed {seed}{cut}"}
        | {"episodes": episodes}
        for seed in options.seeds[: 1 if options.quick else None]
        for setting, words in settings.items()
    ]
    file = options.results("onestep")
    if benchmark(__file__, options, jobs, work, file):
        report(file, picture=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Learning curves of all methods on four games, in self-play and among a mixture of co-players.

    python benchmarks/learning.py               # everything that is not there yet, at most two hours
    python benchmarks/learning.py --only msg    # one game
    python benchmarks/learning.py --report      # tables and docs/learning_*.png of the results so far

Methods: the four scripts with their defaults; plain PPO (no goals, no planner); prosocial PPO (the same, for the mean
reward of all players); Direct-OM (one step of planning on co-players predicted without goals). The mixture is the
default one: `self`, the game's scripted kinds and their noisy forms. Every run is judged after training by `evaluate`:
self-play by the mean of all seats; the mixture by the learner's mean with three of each kind. Scores are normalised:
0 is uniformly random play in the same company, 1 in self-play the game's best mean return; the mixture is measured in
the same unit (a random player among three cleaners has 35.6 of 36: there no unit of its own would do).
Trained players are kept in `benchmarks/checkpoints/learning/`, for `adaptation.py`.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from runs import (
    ROOT,
    Running,
    benchmark,
    best_return,
    by_cpu_time,
    by_setting,
    checkpoint_of,
    interquartile_mean,
    random_return,
    spread,
    work,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {  # name: script, options, colour (Okabe and Ito)
    "tree search": ("hop_mcts", "", "#0072B2"),
    "one step": ("hop_onestep", "", "#009E73"),
    "discrete goals": ("hop_ppo_gumbel", "", "#CC79A7"),
    "latent model": ("latent_world_model", "", "#E69F00"),
    "Direct-OM": ("hop_onestep", "--goal none", "#56B4E9"),
    "plain PPO": ("hop_onestep", "--goal none --plan-update none", "#D55E00"),
    "prosocial PPO": ("hop_onestep", "--goal none --plan-update none --prosocial 1", "#555555"),
}
STEPS = {  # game steps in self-play, and among the mixture, where fewer seats learn
    "msh-4x4-4h1s": (150_000, 200_000),
    "msh-4h1s": (300_000, 300_000),
    "msh-4h2s": (300_000, 300_000),
    "msg": (150_000, 200_000),
}
COMPANIES = {"self-play": "--co-players self", "mixture": ""}
KINDS = {
    "msh": "self,ns,nh,random,ns-noisy,nh-noisy",
    "msg": "self,cleaner,exploiter,random,cleaner-noisy,exploiter-noisy",
}


@dataclasses.dataclass
class Options(Running):
    episodes: int = 500  # evaluation episodes for each kind of co-players


def all_jobs(options: Options) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    jobs = []
    seeds = options.seeds[: 1 if options.quick else None]
    for seed, company, game, method in itertools.product(seeds, COMPANIES, STEPS, METHODS):
        script, words, _ = METHODS[method]
        setting, steps = f"{game} | {company} | {method}", STEPS[game][list(COMPANIES).index(company)]
        steps = 8192 if options.quick else steps
        words = f"--env-id {game} {COMPANIES[company]} {words} --total-timesteps {steps} --seed {seed}"
        kinds = ["self"] if company == "self-play" else KINDS[game[:3]].split(",")
        job = {"script": script, "setting": setting, "seed": seed, "options": " ".join(words.split())}
        job |= {"episodes": 20 if options.quick else options.episodes, "kinds": {kind: kind for kind in kinds}}
        jobs.append({**job, "keep": checkpoint_of("learning", setting, seed, options.quick)})
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def returns_of(result: dict) -> dict[str, float]:
    """Return by kind of co-player: of all seats with `self`, else of the learner."""
    return {kind: result["all_seats" if kind == "self" else "returns"][kind] for kind in result["kinds"]}


def score(result: dict) -> float:
    """How far above uniformly random play in the same company the mean return over the kinds of co-players is, in units
    of the distance from random play to best play of all."""
    game, values = result["setting"].partition(" | ")[0], returns_of(result)
    random = statistics.mean(random_return(game, kind) for kind in values)
    return (statistics.mean(values.values()) - random) / (best_return(game) - random_return(game, "self"))


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    """Running mean of the last `width` points."""
    return np.array([np.mean(values[max(0, k + 1 - width) : k + 1]) for k in range(len(values))])


def plot(runs_of: dict[str, list[dict]], company: str, against: str) -> None:
    """docs/learning_{company}_{against}.png: training returns of all methods, a panel for each game; mean over seeds,
    and the range of the seeds, against game `steps` or `time`, in CPU seconds of training (one thread)."""
    figure, axes = plt.subplots(1, len(STEPS), figsize=(4.0 * len(STEPS), 3.4))
    for axis, game in zip(axes, STEPS, strict=True):
        for method, (_, _, colour) in METHODS.items():
            curves = [by_cpu_time(run) for run in runs_of.get(f"{game} | {company} | {method}", [])]
            if not curves:
                continue
            points = min(map(len, curves))
            place = np.mean([[p[0] / 1000 if against == "steps" else p[1] for p in c[:points]] for c in curves], 0)
            values = np.array([smooth([p[2] for p in c[:points]]) for c in curves])
            axis.plot(place, values.mean(0), color=colour, lw=1.3, label=f"{method} ({len(curves)})")
            axis.fill_between(place, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(title=f"{game}, {company}", xlabel="thousand game steps" if against == "steps" else "CPU seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("mean return of the learner's seats")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"learning_{company}_{against}.png", dpi=100)
    plt.close(figure)


def total_score(runs: list[list[dict]]) -> str:
    """Interquartile mean of the scores of `runs`, by game, with its interval; nothing where a game has no run."""
    if not all(runs):
        return ""
    middle, low, high = interquartile_mean([[score(r) for r in of_game] for of_game in runs])
    return f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "")


def report(file: Path, pictures: bool) -> None:
    """Markdown tables of the results in `file`, and the pictures. In short; by game; by kind of co-player; time."""
    runs_of = by_setting(file)
    runs_by = {
        (company, method): [runs_of.get(f"{game} | {company} | {method}", []) for game in STEPS]
        for company, method in itertools.product(COMPANIES, METHODS)
    }
    seconds = {
        key: [statistics.mean(r["train_cpu_seconds"] for r in of_game) if of_game else 0.0 for of_game in runs]
        for key, runs in runs_by.items()
    }
    print(f"\n| method | {' | '.join(f'{c}: score [95 %]' for c in COMPANIES)} | time, plain PPO = 1 |\n|-|-|-|-|")
    for method in METHODS:
        ratios = [
            time / unit
            for company in COMPANIES
            for time, unit in zip(seconds[company, method], seconds[company, "plain PPO"], strict=True)
            if time and unit
        ]
        pace = f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""
        print(f"| {method} | {' | '.join(total_score(runs_by[c, method]) for c in COMPANIES)} | {pace} |")
    for company in COMPANIES:
        titles = [f"{game} (best {best_return(game):.4g})" for game in STEPS] if company == "self-play" else STEPS
        print(f"\n| {company}: mean return (seeds) | {' | '.join(titles)} |")
        print("|-|" + "-|" * len(STEPS))
        for method in METHODS:
            cells = [
                spread([statistics.mean(returns_of(r).values()) for r in of_game]) if of_game else ""
                for of_game in runs_by[company, method]
            ]
            print(f"| {method} | {' | '.join(cells)} |")
    print(
        "\n| mixture: learner with three | method | "
        + " | ".join(f"kind {k}" for k in range(1, 7))
        + " |\n|-|-|"
        + "-|" * 6
    )
    for game in STEPS:
        kinds = KINDS[game[:3]].split(",")
        print(f"| {game} | | {' | '.join(kinds)} |")
        for method in METHODS:
            if runs := runs_of.get(f"{game} | mixture | {method}"):
                cells = [f"{statistics.mean(returns_of(r)[kind] for r in runs):.2f}" for kind in kinds]
                print(f"| | {method} | {' | '.join(cells)} |")
    print(
        "\n| CPU seconds of training | "
        + " | ".join(f"{g}, {c}" for c in COMPANIES for g in STEPS)
        + " |\n|-|"
        + "-|" * 8
    )
    for method in METHODS:
        cells = [f"{time:.0f}" if time else "" for company in COMPANIES for time in seconds[company, method]]
        print(f"| {method} | {' | '.join(cells)} |")
    for company in COMPANIES if pictures else ():
        for against in ("steps", "time"):
            plot(runs_of, company, against)


def main(options: Options) -> None:
    file = options.results("learning")
    if benchmark(__file__, options, all_jobs(options), work, file):
        report(file, pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

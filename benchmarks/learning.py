"""Learning curves of all methods on four games, in self-play and among a mixture of co-players.

    python benchmarks/learning.py               # everything that is not there yet, at most two hours
    python benchmarks/learning.py --only msg    # one game
    python benchmarks/learning.py --report      # tables and docs/learning_*.png of the results so far

Methods: the four scripts with their defaults; plain PPO (no goals, no planner); prosocial PPO (the same, for the mean
reward of all players); Direct-OM (one step of planning on co-players predicted without goals). The mixture is the
default one: `self`, the game's scripted kinds and their noisy forms. Every run is judged after training by `evaluate`:
self-play by the mean of all seats; the mixture by the learner's mean with three of each kind. Scores are normalised:
0 is uniformly random play in the same company, 1 in self-play the game's best mean return; the mixture is measured in
the same unit (a random player among three cleaners has 35.6 of 36: there no unit of its own would do), so that its
score is a gain, not a share. `mixture, longer`: the fastest methods with five times the game steps, about the time of
the slowest, for a comparison at equal time. Trained players are kept in `benchmarks/checkpoints/learning/`, for
`adaptation.py`.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
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
    head,
    interquartile_mean,
    mean_over_tasks,
    random_return,
    results_in,
    row,
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
LONGER = dict.fromkeys(("msh-4h1s", "msg"), ("plain PPO", "discrete goals"))  # runs among the mixture with
TIMES = 5  # times the game steps
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
    for seed in seeds:
        settings = [*itertools.product(COMPANIES, STEPS, METHODS)]
        settings += [("mixture, longer", game, method) for game, several in LONGER.items() for method in several]
        jobs += [job_of(*setting, seed, options) for setting in settings]
    return jobs


def job_of(company: str, game: str, method: str, seed: int, options: Options) -> dict:
    """One run."""
    script, words, _ = METHODS[method]
    setting, steps = f"{game} | {company} | {method}", STEPS[game][company != "self-play"]
    steps = 8192 if options.quick else steps * (TIMES if company == "mixture, longer" else 1)
    words = f"--env-id {game} {COMPANIES.get(company, '')} {words} --total-timesteps {steps} --seed {seed}"
    kinds = ["self"] if company == "self-play" else KINDS[game[:3]].split(",")
    job = {"script": script, "setting": setting, "seed": seed, "options": " ".join(words.split())}
    job |= {"episodes": 20 if options.quick else options.episodes, "kinds": {kind: kind for kind in kinds}}
    return {**job, "keep": checkpoint_of("learning", setting, seed, options.quick)}


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
    figure, axes = plt.subplots(1, len(STEPS), figsize=(4.0 * len(STEPS), 3.6))
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
    axes[0].set_ylabel("mean return of the learner's seats")
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="lower center", ncols=len(METHODS), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(ROOT / "docs" / f"learning_{company}_{against}.png", dpi=100)
    plt.close(figure)


def scored(runs: list[list[dict]], mean: Callable) -> str:
    """`mean` of the scores of `runs`, by game, with its interval; nothing where a game has no run."""
    if not all(runs):
        return ""
    middle, low, high = mean([[score(r) for r in of_game] for of_game in runs])
    return f"{middle:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "")


def mean_return(runs: list[dict]) -> float:
    """Mean over the kinds of co-players and the runs."""
    return statistics.mean(statistics.mean(returns_of(r).values()) for r in runs)


def report(file: Path, pictures: bool) -> None:
    """Markdown tables of the results in `file`, and the pictures."""
    runs_of = by_setting(file)
    runs_by = {
        (company, method): [runs_of.get(f"{game} | {company} | {method}", []) for game in STEPS]
        for company, method in itertools.product(COMPANIES, METHODS)
    }
    seconds = {
        key: [statistics.mean(r["train_cpu_seconds"] for r in of_game) if of_game else 0.0 for of_game in runs]
        for key, runs in runs_by.items()
    }
    report_in_short(runs_by, seconds)
    report_by_game(runs_by)
    report_by_kind(runs_of, results_in(file.with_name("adaptation.jsonl")))
    report_longer(runs_of)
    head("CPU seconds of training", *(f"{game}, {company}" for company in COMPANIES for game in STEPS))
    for method in METHODS:
        row(method, *(f"{time:.0f}" if time else "" for company in COMPANIES for time in seconds[company, method]))
    for company in COMPANIES if pictures else ():
        for against in ("steps", "time"):
            plot(runs_of, company, against)


def report_in_short(runs_by: dict[tuple[str, str], list], seconds: dict[tuple[str, str], list]) -> None:
    """Return by game in self-play, mean score over games, time in units of plain PPO's."""
    titles = [f"{game} (of {best_return(game):.4g})" for game in STEPS]
    head("self-play", *titles, "mean score [95 %]", "mixture: mean score [95 %]", "time, plain PPO = 1")
    for method in METHODS:
        ratios = [
            time / unit
            for company in COMPANIES
            for time, unit in zip(seconds[company, method], seconds[company, "plain PPO"], strict=True)
            if time and unit
        ]
        pace = f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""
        pace = "1" if method == "plain PPO" else pace
        returns = [f"{mean_return(of_game):.2f}" if of_game else "" for of_game in runs_by["self-play", method]]
        row(method, *returns, *(scored(runs_by[company, method], mean_over_tasks) for company in COMPANIES), pace)
    head("interquartile mean over games and seeds [95 %]", *COMPANIES)
    for method in METHODS:
        row(method, *(scored(runs_by[company, method], interquartile_mean) for company in COMPANIES))


def report_by_game(runs_by: dict[tuple[str, str], list]) -> None:
    """Mean return over the kinds of co-players, every seed."""
    for company in COMPANIES:
        titles = [f"{game} (best {best_return(game):.4g})" for game in STEPS] if company == "self-play" else STEPS
        head(f"{company}: mean return (seeds)", *titles)
        for method in METHODS:
            of_games = [[mean_return([r]) for r in of_game] for of_game in runs_by[company, method]]
            row(method, *(spread(values) if values else "" for values in of_games))


def report_by_kind(runs_of: dict[str, list[dict]], adaptation: list[dict]) -> None:
    """Return of the learner from the mixture with three of each kind, mean over seeds; and of a random player, and of
    one trained on exactly these co-players, where `adaptation.py` has it."""
    for game in STEPS:
        kinds = KINDS[game[:3]].split(",")
        head(f"{game}, mixture: learner with three", *kinds)
        for method in METHODS:
            if runs := runs_of.get(f"{game} | mixture | {method}"):
                row(method, *(f"{statistics.mean(returns_of(r)[kind] for r in runs):.2f}" for kind in kinds))
        references = [r for r in adaptation if r["setting"].startswith(f"reference | {game} |")]
        alone = {r["kind"]: max(r["trained"]) for r in references}
        if alone:
            row("trained on these alone", *(f"{alone[k]:.2f}" if k in alone else "" for k in kinds))
        row("random play", *(f"{random_return(game, kind):.2f}" for kind in kinds))


def report_longer(runs_of: dict[str, list[dict]]) -> None:
    """Returns by kind at about equal time: the fastest methods after TIMES the game steps beside all others."""
    for game, several in LONGER.items():
        kinds = KINDS[game[:3]].split(",")
        head(f"{game}, mixture, at equal time: learner with three", *kinds, "mean (seeds)", "CPU seconds")
        settings = {method: f"{game} | mixture | {method}" for method in METHODS if method != "prosocial PPO"}
        settings |= {f"{method}, {TIMES} times the steps": f"{game} | mixture, longer | {method}" for method in several}
        for name, setting in settings.items():
            if runs := runs_of.get(setting):
                cells = [f"{statistics.mean(returns_of(r)[kind] for r in runs):.2f}" for kind in kinds]
                time = f"{statistics.mean(r['train_cpu_seconds'] for r in runs):.0f}"
                row(name, *cells, spread([mean_return([r]) for r in runs]), time)


def main(options: Options) -> None:
    file = options.results("learning")
    if benchmark(__file__, options, all_jobs(options), work, file):
        report(file, pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

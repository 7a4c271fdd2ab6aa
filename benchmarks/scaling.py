"""What parallel games bring to learning.

    python benchmarks/scaling.py            # what is not there yet; about 40 minutes
    python benchmarks/scaling.py --report   # tables and docs/scaling_learning.png of the results so far

Runs of equal game steps in self-play, other options by default, evaluated after training. At equal time: the training
returns that their curves have reached after the CPU seconds that the fastest setting takes for a whole run (its slowest
seed). Learning rate, entropy bonus and the planner's share still follow the whole run's length there. Runs that would
take minutes, with few games, are cut (`*`): an iteration has a fixed cost. They count at equal time alone.
"""

import dataclasses
import itertools
import statistics

import matplotlib
import numpy as np
import tyro

from runs import ROOT, Running, benchmark, best_return, by_cpu_time, interval, results_in, work

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLAIN = {"goal": "none", "plan_update": "none"}
METHODS = {  # name: script, options, colour (Okabe and Ito)
    "plain PPO": ("hop_onestep", PLAIN, "#D55E00"),
    "one step": ("hop_onestep", {}, "#009E73"),
}
LEARNING_GAME, LEARNING_ENVS, LEARNING_STEPS = "msh-4x4-4h1s", (1, 4, 16, 64, 256, 1024), 131_072
CUT = {("plain PPO", 1): 12_288, ("one step", 1): 4_096, ("one step", 4): 16_384}  # game steps of runs that are cut


@dataclasses.dataclass
class Options(Running):
    episodes: int = 1000  # evaluation episodes after training


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------
def parallel_jobs(options: Options) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    jobs = []
    several = [16, 64] if options.quick else LEARNING_ENVS
    for seed, n, method in itertools.product(seeds(options), several, METHODS):
        script, settings, _ = METHODS[method]
        steps = 4096 if options.quick else CUT.get((method, n), LEARNING_STEPS)
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        words = f"--env-id {LEARNING_GAME} --co-players self --num-envs {n} --total-timesteps {steps} {words}"
        job = {"part": "parallel", "setting": f"{LEARNING_GAME} | parallel | {n} games | {method}", "seed": seed}
        job |= {"script": script, "options": " ".join(f"{words} --seed {seed}".split()), "kinds": {"self": "self"}}
        job |= {"num_envs": n, "method": method, "steps": steps, "cut": (method, n) in CUT}
        jobs.append({**job, "episodes": 20 if options.quick else options.episodes})
    return jobs


def seeds(options: Options) -> tuple[int, ...]:
    """The seeds of runs."""
    return options.seeds[: 1 if options.quick else None]


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def axis_of_games(axis: plt.Axes, several: tuple[int, ...], label: str) -> None:
    """Makes the x axis one of numbers of parallel games."""
    axis.set(xlabel=label, xscale="log", xlim=(several[0] / 1.5, several[-1] * 1.5))
    axis.set_xticks(several, [str(n) for n in several])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def return_after(result: dict, seconds: float) -> float:
    """Mean training return in the last fifth of the first `seconds` CPU seconds of a run, or at the last iteration
    before if none ended in it; nan if none had ended."""
    past = [(second, value) for _, second, value in by_cpu_time(result) if second <= 1.001 * seconds]
    last = [value for second, value in past if second > 0.8 * seconds] or [value for _, value in past[-1:]]
    return statistics.mean(last) if last else float("nan")


def with_interval(values: list[float], digits: int = 2) -> str:
    """Mean of the runs and the ends of its 95 % interval."""
    middle, low, high = interval(values)
    ends = f" [{low:,.{digits}f}, {high:,.{digits}f}]" if low == low else ""
    return f"{middle:,.{digits}f}{ends}"


def report_parallel(results: list[dict], pictures: bool) -> None:
    """A table for each method, and docs/scaling_learning.png."""
    results = [r for r in results if r["part"] == "parallel"]
    if not results:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), sharey=True)
    titles = []
    for method in METHODS:
        runs_of = {n: [r for r in results if (r["num_envs"], r["method"]) == (n, method)] for n in LEARNING_ENVS}
        runs_of = {n: runs for n, runs in runs_of.items() if runs}
        whole = {n: runs for n, runs in runs_of.items() if not runs[0]["cut"]}
        if not whole:
            continue
        costs = {n: statistics.mean(r["train_cpu_seconds"] for r in runs) for n, runs in runs_of.items()}
        fastest = min(whole, key=costs.get)
        least = max(r["train_cpu_seconds"] for r in whole[fastest])
        steps = next(iter(whole.values()))[0]["steps"]
        by_steps = {n: [r["all_seats"]["self"] for r in runs] for n, runs in whole.items()}
        by_time = {n: [return_after(r, least) for r in runs] for n, runs in runs_of.items()}
        by_time = {n: v for n, v in by_time.items() if all(value == value for value in v)}
        count = "/".join(sorted({str(len(runs)) for runs in runs_of.values()}))
        print(f"\n| {LEARNING_GAME}, {method}, {count} seeds: parallel games | {' | '.join(map(str, runs_of))} |")
        print("|-|" + "-|" * len(runs_of))
        rows = {
            f"return after {steps:,} game steps [95 %]": {n: with_interval(v) for n, v in by_steps.items()},
            f"training return after {least:.0f} CPU seconds [95 %]": {n: with_interval(v) for n, v in by_time.items()},
            "CPU seconds of training": {n: f"{costs[n]:.0f}{'*' * r[0]['cut']}" for n, r in runs_of.items()},
            "game steps a CPU second": {n: f"{r[0]['steps'] / costs[n]:,.0f}" for n, r in runs_of.items()},
        }
        for name, cells in rows.items():
            print(f"| {name} | {' | '.join(cells.get(n, '') for n in runs_of)} |")
        titles.append(f"{method}: {least:.0f} s")
        for axis, points in zip(axes, (by_steps, by_time), strict=True):
            middle = np.array([statistics.mean(v) for v in points.values()])
            ends = np.nan_to_num([interval(v)[2] for v in points.values()] - middle)
            style = {"color": METHODS[method][2], "marker": "o", "ms": 4, "lw": 1.3, "capsize": 3, "label": method}
            axis.errorbar(list(points), middle, ends, **style)
    if not pictures:
        plt.close(figure)
        return
    axes[0].set(ylabel="mean return of all seats", title=f"after {LEARNING_STEPS:,} game steps")
    axes[1].set(title=f"after equal CPU seconds ({', '.join(titles)})")
    for axis in axes:
        axis.axhline(best_return(LEARNING_GAME), color="#888888", lw=0.8, ls="--")
        axis_of_games(axis, LEARNING_ENVS, f"parallel games, {LEARNING_GAME} in self-play")
        axis.title.set_fontsize(10)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "scaling_learning.png", dpi=100)
    plt.close(figure)


def main(options: Options) -> None:
    file = options.results("scaling")
    jobs = [] if options.worker else parallel_jobs(options)
    if benchmark(__file__, options, jobs, work, file):
        report_parallel(results_in(file), pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Where time goes, and what parallel games bring: in speed, and in learning.

    python benchmarks/scaling.py                          # all three parts, what is not there yet; about 45 minutes
    python benchmarks/scaling.py --part profile           # shares of an iteration by part, scripts side by side
    python benchmarks/scaling.py --part sps --only "| 64 games | cpu 1 thread"   # speed with 64 games
    python benchmarks/scaling.py --part parallel          # learning against the number of games
    python benchmarks/scaling.py --report                 # tables and docs/scaling_*.png of the results so far

Parts:
- `profile`: what `--profile` counts, among the default mixture of co-players, with 64 games. Like `sps`, of
  latent_world_model.py alone: the other scripts print a profile by themselves, and their figures here are older.
- `sps`: game steps a second of training in self-play against the number of parallel games. All methods of one number
  of games take turns in one process, so that their ratios hold on a machine that has other work; medians of turns,
  bars from the slowest to the fastest. On one thread of a CPU the clock is CPU time, else the wall's. Two threads are
  left out where the process has one core. With many games the rollouts that are timed are shorter than the default 64
  steps (4096 game steps an iteration, at least 2 steps): what is done once an iteration whatever the number of steps
  (training of MOA and latent model, memories computed anew) counts once in 64 steps, the rest is stretched to 64.
- `parallel`: runs of equal game steps in self-play, other options by default, evaluated after training. At equal time:
  the training returns that their curves have reached after the CPU seconds that the fastest setting takes for a whole
  run (its slowest seed). Learning rate, entropy bonus and the planner's share still follow the whole run's length
  there. Runs that would take minutes, with few games, are cut (`*`): an iteration has a fixed cost. They count at equal
  time alone.

In `profile` and `sps` the planner acts, and everything goes on from a short run without it, so that the MOA's buffer
holds matches and games are at all stages. The policy's learning rate is next to nothing there: players who learn sooner
to hunt leave sooner as well, and have less to compute.
"""

import collections
import dataclasses
import functools
import importlib
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import tyro

from runs import ROOT, Running, about, benchmark, best_return, by_cpu_time, by_setting, interval, results_in, work

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLAIN = {"goal": "none", "plan_update": "none"}
METHODS = {  # name: script, options, colour (Okabe and Ito)
    "plain PPO": ("hop_onestep", PLAIN, "#D55E00"),
    "discrete goals": ("hop_ppo_gumbel", {}, "#CC79A7"),
    "one step": ("hop_onestep", {}, "#009E73"),
    "latent model": ("latent_world_model", {}, "#E69F00"),
    "tree search": ("hop_mcts", {}, "#0072B2"),
}
TIMED = ("latent model",)  # methods of `profile` and `sps`; some results have more
PROFILED = {"msh-4h1s": 2, "msg": 2}  # game: turns
NUM_STEPS = 64  # default of all scripts
BEFORE = 8  # iterations before anything is timed: a match of the longest episodes
STILL = 1e-9  # learning rate of policy and value while timing
SPEED_GAME, SPEED_ENVS = "msh-4h1s", (1, 4, 16, 64, 256, 1024, 4096)
LEARNING_GAME, LEARNING_ENVS, LEARNING_STEPS = "msh-4x4-4h1s", (1, 4, 16, 64, 256, 1024), 131_072
LEARNERS = ("plain PPO", "one step")
CUT = {("plain PPO", 1): 12_288, ("one step", 1): 4_096, ("one step", 4): 16_384}  # game steps of runs that are cut
MOST_SECONDS = 40.0  # no further turn of a cell of `sps` after so many CPU seconds of all methods
PARTS = ("profile", "sps", "parallel")
RENAMED = {"MCTS": "planner", "compute_action": "compute action"}  # parts of a profile


@dataclasses.dataclass
class Options(Running):
    part: Literal["profile", "sps", "parallel", "all"] = "all"  # what to run
    episodes: int = 1000  # evaluation episodes after training
    devices: str = "auto"  # of `sps`: cpu, cuda or both after a comma (auto: cuda if there is one)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------
def devices(options: Options) -> list[str]:
    """Names of the devices and threads of `sps`. More threads than the process has cores are left out."""
    if options.devices == "auto":
        import torch

        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    else:
        kinds = options.devices.split(",")
    cores = 1 if options.quick else len(os.sched_getaffinity(0))
    names = {"cpu": ["cpu 1 thread", "cpu 2 threads"][:cores], "cuda": ["cuda 1 thread"]}
    return [name for kind in kinds for name in names[kind]]


def profile_jobs(options: Options) -> list[dict]:
    games = dict(itertools.islice(PROFILED.items(), 1 if options.quick else None))
    return [
        {"part": "profile", "setting": f"{game} | profile | {method}", "seed": seed, "game": game, "method": method}
        | {"num_envs": 16 if options.quick else 64, "turns": 1 if options.quick else turns}
        for seed, (game, turns), method in itertools.product(seeds(options), games.items(), TIMED)
    ]


def sps_jobs(options: Options) -> list[dict]:
    several = [1, 16] if options.quick else SPEED_ENVS
    return [
        {"part": "sps", "setting": f"{SPEED_GAME} | sps | {n} games | {device}", "seed": options.seeds[0]}
        | {"num_envs": n, "device": device, "turns": turns(n, options.quick)}
        for device, n in itertools.product(devices(options), several)
    ]


def turns(num_envs: int, quick: bool) -> tuple[int, int, int]:
    """Turns of a cell of `sps`: those that are not counted, the least and the most counted."""
    return (1, 1, 1) if quick else (1, 2, 5) if num_envs < 1024 else (0, 1, 3)


def parallel_jobs(options: Options) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    jobs = []
    several = [16, 64] if options.quick else LEARNING_ENVS
    for seed, n, method in itertools.product(seeds(options), several, LEARNERS):
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
# Timing
# ---------------------------------------------------------------------------------------------------------------------
def run_before(method: str, game: str, co_players: str | None, seed: int, cuda: bool) -> Any:
    """A Trainer of 16 games after BEFORE iterations without planner, or more, until 16 matches have ended."""
    name, settings, _ = METHODS[method]
    script = importlib.import_module(name)
    settings = {**settings, "env_id": game, "co_players": co_players, "seed": seed, "cuda": cuda}
    sizes = {"num_envs": 16, "num_steps": NUM_STEPS, "total_timesteps": 10**9, "learning_rate": STILL}
    args = script.resolved(script.Args(**settings, **sizes))
    trainer = script.Trainer(args)
    args.plan_until = 0.0
    while trainer.iteration < BEFORE or (trainer.agent.uses_moa and len(trainer.buffer) < 16):
        trainer.iterate()
    return trainer


def continued(before: Any, method: str, num_envs: int, num_steps: int) -> Any:
    """A Trainer of `num_envs` games that goes on from the 16 of `before`, each taken as often as is needed, with the
    planner; buffer and networks are the same."""
    import torch

    script = importlib.import_module(METHODS[method][0])
    args = dataclasses.replace(before.args, num_envs=num_envs, num_steps=num_steps, plan_until=1.0)
    held, content = before.args.num_envs, before.content()
    index = torch.arange(num_envs, device=before.device) % held
    content["args"] = dataclasses.asdict(args)
    content["games"] = [[field[index] for field in fields] for fields in content["games"]]
    content["matches"] = {k: torch.cat([v[:held][index], v[held:]]) for k, v in content["matches"].items()}
    kept = content["kept"]
    kept["trainer"]["returns"] = kept["trainer"]["returns"][index]
    kept["co_players"] = {name: value[index] for name, value in kept["co_players"].items()}
    trainer = script.Trainer(args)
    trainer.load(content)
    trainer.agent.plan_mode = args.plan_update  # it was off before
    return trainer


def seconds_now(cuda: bool) -> np.ndarray:
    """CPU seconds of this process, and the wall's."""
    if cuda:
        import torch

        torch.cuda.synchronize()
    return np.array([time.process_time(), time.perf_counter()])


def count_once(trainer: Any) -> np.ndarray:
    """CPU and wall seconds, counted from now on, of what costs the same however many steps an iteration has."""
    spent = np.zeros(2)

    def counted(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            start = seconds_now(trainer.args.cuda)
            result = function(*given, **named)
            spent[:] += seconds_now(trainer.args.cuda) - start
            return result

        return call

    for owner, name in ((trainer, "update_moa"), (trainer, "update_model"), (trainer.buffer, "memory")):
        if hasattr(owner, name):
            setattr(owner, name, counted(getattr(owner, name)))
    return spent


def set_up(threads: int, cuda: bool) -> None:
    """The same settings of torch as `train` makes; and no more memory than there is, so that what takes more fails."""
    import torch

    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=cuda)
    if not cuda:
        words = Path("/proc/meminfo").read_text().split()
        free = 1024 * int(words[words.index("MemAvailable:") + 1])
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.8 * free), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def profile(job: dict) -> dict:
    """Shares of an iteration by path of the timer, and game steps a CPU second."""
    set_up(1, False)
    start, method = time.time(), job["method"]
    before = run_before(method, job["game"], None, job["seed"], False)
    trainer, iterations = continued(before, method, job["num_envs"], NUM_STEPS), job["turns"]
    trainer.iterate()
    trainer.agent.timer = timer = importlib.import_module(METHODS[method][0]).Timer(True)
    began = time.process_time()
    for _ in range(iterations):
        with timer("iteration"):
            trainer.iterate()
    rate = iterations * NUM_STEPS * job["num_envs"] / (time.process_time() - began)
    whole = timer.seconds["iteration",]
    shares = {"/".join(path[1:]): round(s / whole, 5) for path, s in timer.seconds.items() if len(path) > 1}
    result = {**job, "command": command(job), "iterations": iterations, "steps_a_cpu_second": round(rate, 1)}
    return result | {"shares": shares} | about(start)


def speed(job: dict) -> dict:
    """Game steps a second of training with `num_envs` games, of every turn of every method; by CPU time and by wall."""
    import torch

    device, threads, *_ = job["device"].split()
    cuda, n = device == "cuda", job["num_envs"]
    set_up(int(threads), cuda)
    start, steps = time.time(), max(2, min(NUM_STEPS, 4096 // n))
    rates: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in TIMED}
    failed, trainers, spent = {}, {}, {}
    for name in TIMED:
        before = run_before(name, SPEED_GAME, "self", job["seed"], cuda)
        trainers[name] = continued(before, name, n, steps)
        spent[name] = count_once(trainers[name])
    first, least, most = job["turns"]
    began = time.process_time()
    for turn in range(first + most):
        if turn >= first + least and time.process_time() - began > MOST_SECONDS:
            break
        for name in [name for name in TIMED if name not in failed]:
            once, before = spent[name].copy(), seconds_now(cuda)
            try:
                trainers[name].iterate()
            except (RuntimeError, MemoryError) as error:  # of memory, on a CPU or a GPU
                if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                    raise
                failed[name] = str(error)[:200]
                del trainers[name]
                continue
            seconds, once = seconds_now(cuda) - before, spent[name] - once
            stretched = once + (seconds - once) * NUM_STEPS / steps
            for clock, second in zip(("cpu", "wall"), stretched if turn >= first else (), strict=False):
                rates[name][clock].append(round(NUM_STEPS * n / float(second), 1))
    result = {**job, "command": command(job), "num_steps": steps, "rates": rates, "failed": failed} | about(start)
    result["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    result["machine"] = result["machine"].replace("1 thread ", f"{threads} thread(s) ")
    return result | {"cores": len(os.sched_getaffinity(0)), "gpu": torch.cuda.get_device_name() if cuda else ""}


def command(job: dict) -> str:
    """The command that repeats a cell."""
    return f"python benchmarks/scaling.py --part {job['part']} --only '{job['setting']}' --seeds {job['seed']}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def shares_of(runs: list[dict]) -> dict[tuple[str, ...], float]:
    """Mean over runs of the shares, by path; with `rest`, what no part of a part counts."""
    shares: dict[tuple[str, ...], float] = collections.Counter()
    for run, path in itertools.product(runs, sorted({path for one in runs for path in one["shares"]})):
        shares[tuple(RENAMED.get(name, name) for name in path.split("/"))] += run["shares"].get(path, 0.0) / len(runs)
    for path in list(shares):
        parts = [share for other, share in shares.items() if len(other) == len(path) + 1 and other[:-1] == path]
        if parts:
            shares[*path, "rest"] = shares[path] - sum(parts)
    return shares


def report_profile(runs_of: dict[str, list[dict]]) -> None:
    """A table for each game: share of an iteration by part, scripts side by side."""
    for game in PROFILED:
        columns = {m: runs_of[k] for m in METHODS if (k := f"{game} | profile | {m}") in runs_of}
        if not columns:
            continue
        shares = {method: shares_of(runs) for method, runs in columns.items()}
        total = collections.Counter()
        for share in shares.values():
            total.update({path: s / len(shares) for path, s in share.items()})
        shown = [path for path in total if max(share.get(path, 0.0) for share in shares.values()) >= 0.01]
        shown.sort(key=lambda p: [(p[k] == "rest", -total[p[: k + 1]], p[k]) for k in range(len(p))])
        some = next(iter(columns.values()))[0]
        print(f"\n| {game}, {some['num_envs']} games: % of an iteration | {' | '.join(columns)} |")
        print("|-|" + "-:|" * len(columns))
        for path in shown:
            cells = [f"{100 * share[path]:.0f}" if path in share else "" for share in shares.values()]
            print(f"| {'· ' * (len(path) - 1)}{path[-1]} | {' | '.join(cells)} |")
        cells = [with_interval([r["steps_a_cpu_second"] for r in runs], 0) for runs in columns.values()]
        print(f"| game steps a CPU second [95 %, {len(next(iter(columns.values())))} seeds] | {' | '.join(cells)} |")


def rates_of(result: dict, method: str) -> list[float]:
    """Game steps a second of every turn: by CPU time with one thread on a CPU, else by the wall's."""
    clock = "cpu" if result["device"] == "cpu 1 thread" else "wall"
    return result["rates"].get(method, {}).get(clock, [])


def axis_of_games(axis: plt.Axes, several: tuple[int, ...], label: str) -> None:
    """Makes the x axis one of numbers of parallel games."""
    axis.set(xlabel=label, xscale="log", xlim=(several[0] / 1.5, several[-1] * 1.5))
    axis.set_xticks(several, [str(n) for n in several])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def report_sps(results: list[dict], pictures: bool) -> None:
    """A table for each device, and docs/scaling_sps.png."""
    results = sorted((r for r in results if r["part"] == "sps"), key=lambda r: r["num_envs"])
    by_device = {d: [r for r in results if r["device"] == d] for d in sorted({r["device"] for r in results})}
    for device, rows in by_device.items():
        clock = "CPU second" if device == "cpu 1 thread" else "second"
        print(
            f"\n| {SPEED_GAME}, {device}: game steps a {clock} | " + " | ".join(f"{r['num_envs']}" for r in rows) + " |"
        )
        print("|-|" + "-:|" * len(rows))
        for method in METHODS:
            cells = [f"{statistics.median(v):,.0f}" if (v := rates_of(r, method)) else "-" for r in rows]
            print(f"| {method} | {' | '.join(cells)} |")
        cells = [f"{r['megabytes'] / 1024:.1f}" for r in rows]
        print(f"| gigabytes of memory at most, all methods together | {' | '.join(cells)} |")
    if not by_device or not pictures:
        return
    columns, width = len(by_device), 1.0 + 4.0 * len(by_device)
    figure, (axes,) = plt.subplots(1, columns, figsize=(width, 3.6), sharey=True, squeeze=False)
    for axis, (device, rows) in zip(axes, by_device.items(), strict=True):
        for method, (_, _, colour) in METHODS.items():
            points = [(r["num_envs"], rates_of(r, method)) for r in rows if rates_of(r, method)]
            middle = np.array([statistics.median(v) for _, v in points])
            ends = np.array([[min(v), max(v)] for _, v in points]).reshape(-1, 2).T
            place = [n for n, _ in points]
            axis.errorbar(place, middle, abs(ends - middle), color=colour, marker="o", ms=3, lw=1.3, label=method)
        axis.set(title=f"{SPEED_GAME}, {device}", yscale="log")
        axis_of_games(axis, SPEED_ENVS, "parallel games")
    axes[0].set_ylabel("game steps a second of training")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "scaling_sps.png", dpi=100)
    plt.close(figure)


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
    for method in LEARNERS:
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
            "iterations": {n: f"{r[0]['steps'] // (n * NUM_STEPS)}{'*' * r[0]['cut']}" for n, r in runs_of.items()},
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


def report(file: Path, pictures: bool) -> None:
    """Markdown tables of the results in `file`, and the pictures."""
    report_profile(by_setting(file))
    report_sps(results_in(file), pictures)
    report_parallel(results_in(file), pictures)


def main(options: Options) -> None:
    file = options.results("scaling")
    jobs_of = {"profile": profile_jobs, "sps": sps_jobs, "parallel": parallel_jobs}
    work_of = {"profile": profile, "sps": speed, "parallel": work}
    for part in PARTS if options.part == "all" else (options.part,):
        alone = (
            options if part == "parallel" else dataclasses.replace(options, jobs=1, ray="")
        )  # what is timed runs alone, here
        jobs = [] if options.worker else jobs_of[part](options)
        if not benchmark(__file__, alone, jobs, lambda job: work_of[job["part"]](job), file):
            return
    report(file, pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

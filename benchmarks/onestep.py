"""The figures of hop_onestep.py in the README: trains every setting with several seeds, evaluates, and prints tables.

    python benchmarks/onestep.py --part selfplay     # all seats learn: planner (simulator, network) and plain PPO
    python benchmarks/onestep.py --part goals        # one learner among scripted players: goals none, inferred, oracle
    python benchmarks/onestep.py --part main         # the README's main job
    python benchmarks/onestep.py --report            # tables from the results so far

Every run uses one thread; `--jobs` runs go side by side. A result is a JSON line in `benchmarks/results/onestep.jsonl`
with its exact command, seed, seconds and machine; runs that are there are not repeated, so an interrupted part goes on
where it stopped. `--quick` cuts steps and seeds to see that all works.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "onestep.jsonl"

# setting -> options of hop_onestep.py; every setting of a part is run with every seed
SELF = "--co-players self --goal none"
SELFPLAY = {
    f"{env} | {name}": f"--env-id {env} {SELF} {options} {planner}"
    for env, options in {
        "msh-4x4-4h1s": "--total-timesteps 200000",
        "msh-4h1s": "--total-timesteps 500000",
        "msg": "--total-timesteps 250000 --plan-samples 8",
        "msg gamma 0.95": "--total-timesteps 250000 --plan-samples 8 --gamma 0.95",
    }.items()
    for name, planner in {
        "planner, simulator": "--transition simulator",
        "planner, network": "--transition network",
        "plain PPO": "--plan-update none",
    }.items()
}
SELFPLAY = {name: options.replace("msg gamma 0.95", "msg") for name, options in SELFPLAY.items()}
KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
MOA_UPDATES = {"msh-4x4-4h1s": 8, "msg": 4}
GOALS = {
    f"{env} | {goal}": f"--env-id {env} --co-players {kinds} --plan-update none --total-timesteps 800000 "
    f"--moa-updates {MOA_UPDATES[env]} --goal {goal}"
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
class Options:
    part: Literal["selfplay", "goals", "main"] = "selfplay"  # what to run
    only: str = ""  # run settings whose name contains this
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds
    jobs: int = 2  # runs side by side
    episodes: int = 2000  # evaluation episodes for each kind of co-players
    quick: bool = False  # a fiftieth of the steps, one seed; results are not kept
    report: bool = False  # print tables only
    worker: str = ""  # (used by the benchmark itself)


def kinds_of(options: str) -> list[str]:
    """The co-players that a setting is evaluated with: three of each kind it was trained on."""
    words = shlex.split(options)
    return (
        words[words.index("--co-players") + 1].split(",") if "--co-players" in words else ["self", "ns", "nh", "random"]
    )


def work(job: dict) -> dict:
    """Trains and evaluates one setting with one seed, in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    import hop_onestep as script

    torch.set_num_threads(1)
    start = time.time()
    metrics = script.train(script.parse_arguments(shlex.split(job["options"])))
    seconds = time.time() - start
    cpu_seconds = round(time.process_time(), 1)
    result = {
        **job,
        "command": f"python hop_onestep.py {job['options']}",
        "seconds": round(seconds, 1),
        "cpu_seconds": cpu_seconds,
    }
    result |= {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread of {os.cpu_count()}",
        "torch": torch.__version__,
    }
    result["returns"], result["by_episode"], result["all_seats"] = {}, {}, {}
    for kind in kinds_of(job["options"]):
        played = script.evaluate(metrics["run"], kind, episodes=job["episodes"], seed=1000 + job["seed"])
        n = script.GridGame(script.load_checkpoint(metrics["run"])["game"]).num_players
        result["returns"][kind] = round(played["focal_return"], 4)
        result["by_episode"][kind] = [round(x, 4) for x in played["by_episode"]]
        result["all_seats"][kind] = round((played["focal_return"] + (n - 1) * played["co_player_return"]) / n, 4)
    result["curve"] = curve(metrics["run"])
    return result | {"metrics": {k: v for k, v in metrics.items() if k != "run"}}


def curve(run: str) -> list[list[float]]:
    """About a hundred points [game steps, seconds since the first, mean return of the learner's seats] of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("charts/episodic_return")
    points = points[:: max(1, len(points) // 100)]
    return [[p.step, round(p.wall_time - points[0].wall_time, 1), round(p.value, 4)] for p in points]


def plot(by_setting: dict[str, list[dict]]) -> None:
    """docs/curves.png: self-play returns in training against game steps, every seed a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    games = list(dict.fromkeys(setting.partition(" | ")[0] for setting in SELFPLAY if setting in by_setting))
    figure, axes = plt.subplots(1, len(games), figsize=(4.2 * len(games), 3.4), squeeze=False)
    for axis, game in zip(axes[0], games, strict=True):
        for colour, method in zip(
            ("#0072B2", "#009E73", "#D55E00"), ("planner, simulator", "planner, network", "plain PPO"), strict=True
        ):
            for k, result in enumerate(by_setting.get(f"{game} | {method}", [])):
                steps, _, returns = zip(*result["curve"], strict=True)
                axis.plot([s / 1000 for s in steps], returns, color=colour, lw=1, label=method if k == 0 else None)
        axis.set(title=game, xlabel="thousand game steps")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean return of all seats")
    axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=110)


def spread(values: list[float]) -> str:
    """Mean over seeds, and every seed."""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def report() -> None:
    """Markdown tables of the results so far."""
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    by_setting = {
        k: list(g)
        for k, g in itertools.groupby(sorted(results, key=lambda r: (r["setting"], r["seed"])), lambda r: r["setting"])
    }
    plot(by_setting)
    print("| game, all seats learn | method | mean return (seeds) | CPU seconds |\n|-|-|-|-|")
    for setting in [s for s in (*SELFPLAY, *MAIN) if s in by_setting]:
        runs = by_setting[setting]
        env, _, method = setting.partition(" | ")
        returns = spread([r["all_seats"]["self"] for r in runs])
        print(f"| {env} | {method} | {returns} | {statistics.mean(r.get('cpu_seconds', math.nan) for r in runs):.0f} |")
    for env, kinds in KINDS.items():
        kinds = kinds.split(",")
        if not all(f"{env} | {goal}" in by_setting for goal in ("none", "inferred", "oracle")):
            continue
        print(f"\n| {env}: learner with three | {' | '.join(kinds)} | mean |\n|-|{'-|' * len(kinds)}-|")
        means = {}
        for goal in ("none", "inferred", "oracle"):
            runs = by_setting[f"{env} | {goal}"]
            columns = [[r["returns"][kind] for r in runs] for kind in kinds]
            means[goal] = statistics.mean(itertools.chain(*columns))
            print(f"| {goal} | {' | '.join(spread(c) for c in columns)} | {means[goal]:.3f} |")
        alone = [by_setting.get(f"{env} | PPO on {kind}") for kind in kinds]
        if all(alone):
            columns = [[r["returns"][kind] for r in runs] for runs, kind in zip(alone, kinds, strict=True)]
            mean = statistics.mean(itertools.chain(*columns))
            print(f"| plain PPO on exactly these | {' | '.join(map(spread, columns))} | {mean:.3f} |")
        gap = means["oracle"] - means["none"]
        share = (means["inferred"] - means["none"]) / gap if gap else math.nan
        print(f"\n`inferred` goes {share:.0%} of the way from `none` to `oracle` ({gap:.3f}).")


def main(options: Options) -> None:
    if options.worker:
        print("\n" + json.dumps(work(json.loads(options.worker))))
        return
    if options.report:
        report()
        return
    settings = {"selfplay": SELFPLAY, "goals": {**GOALS, **ALONE}, "main": MAIN}[options.part]
    done = set()
    if RESULTS.exists() and not options.quick:
        done = {(r["setting"], r["seed"]) for r in map(json.loads, RESULTS.read_text().splitlines())}
    jobs = []
    for seed in options.seeds[: 1 if options.quick else None]:
        for setting, words in settings.items():
            if options.only in setting and (setting, seed) not in done:
                words = f"{words} --seed {seed}"
                if options.quick:
                    words += " --total-timesteps 10000"
                jobs.append(
                    {
                        "setting": setting,
                        "seed": seed,
                        "options": words,
                        "episodes": 64 if options.quick else options.episodes,
                    }
                )

    def run(job: dict) -> dict:
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        place = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        ended = subprocess.run(command, capture_output=True, text=True, **place)
        if ended.returncode:
            raise RuntimeError(f"{job['setting']}, seed {job['seed']}:\n{ended.stderr[-2000:]}")
        return json.loads(ended.stdout.splitlines()[-1])

    RESULTS.parent.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), unit="run") as progress:
        for future in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            result = future.result()
            progress.update()
            progress.write(
                f"{result['setting']} seed {result['seed']}: {result['returns']} in {result['seconds']:.0f} s"
            )
            if not options.quick:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    if not options.quick:
        report()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

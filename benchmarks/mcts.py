"""The figures of hop_mcts.py in the README: the games and seeds of `onestep.py`, and what search alone is worth.

    python benchmarks/mcts.py --part selfplay      # all seats learn, with tree search
    python benchmarks/mcts.py --part untrained     # search alone: policy and value as they were initialised
    python benchmarks/mcts.py --part top           # search on top of a trained policy, at gamma 0.95
    python benchmarks/mcts.py --report             # tables from the results so far, beside those of onestep.py

Every run uses one thread; `--jobs` runs go side by side. A result is a JSON line in `benchmarks/results/mcts.jsonl`
with its exact command, seed, seconds and machine; runs that are there are not repeated, so an interrupted part goes on
where it stopped. `--quick` cuts steps and seeds to see that all works.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Literal

import tyro

from runs import Running, benchmark, by_setting, earlier_moa, spread, work

# part -> setting -> options of hop_mcts.py, and ways to play what was trained; every setting is run with every seed
SELF = f"--co-players self --goal none {earlier_moa()}"
SEARCH = {"plan_update": "offset", "num_simulations": 50, "num_goal_samples": 5}
PARTS = {
    "selfplay": {
        "msh-4x4-4h1s": (f"--env-id msh-4x4-4h1s {SELF} --total-timesteps 200000", {}),
        "msh-4h1s": (f"--env-id msh-4h1s {SELF} --total-timesteps 500000", {}),
        "msg": (f"--env-id msg {SELF} --total-timesteps 250000", {}),
        "msg, search for 40 %": (
            f"--env-id msg {SELF} --total-timesteps 250000 --plan-until 0.4 --num-simulations 16",
            {},
        ),
    },
    "untrained": {  # a learning rate of nearly nothing: only the MOA learns, told the co-players' kinds and targets
        "msh-4x4-4h1s, untrained": (
            "--env-id msh-4x4-4h1s --co-players ns --goal oracle --learning-rate 1e-12 --total-timesteps 100000 "
            f"--plan-until 1 --num-simulations 7 {earlier_moa(16)}",
            {
                f"{n} simulations": {"plan_beta": 30.0, "num_simulations": n, "num_goal_samples": 5, "puct_c": 10.0}
                for n in (7, 50, 200)
            },
        )
    },
    "top": {
        "msg gamma 0.95": (
            f"--env-id msg {SELF} --gamma 0.95 --total-timesteps 250000 --plan-update offset --plan-until 0",
            {
                "search, V at the horizon": {**SEARCH, "plan_beta": 1.0},
                "search, the horizon is the end": {**SEARCH, "plan_beta": 4.0, "plan_horizon": "end"},
            },
        )
    },
}


@dataclasses.dataclass
class Options(Running):
    part: Literal["selfplay", "untrained", "top"] = "selfplay"  # what to run
    episodes: int = 500  # evaluation episodes for each kind of co-players and way to play


def report(file: Path) -> None:
    """Markdown tables of the results in `file`, beside those of onestep.py."""
    results, others = by_setting(file), by_setting(file.with_name("onestep.jsonl"))
    print("| game, all seats learn | method | mean return (seeds) | CPU seconds |\n|-|-|-|-|")
    for setting in results:
        own = [(f"{setting} | tree search", results[setting])] if setting in PARTS["selfplay"] else []
        for name, runs in [*own, *((k, v) for k, v in others.items() if own and k.startswith(f"{setting} | p"))]:
            env, _, method = name.partition(" | ")
            if "PPO on" not in method:
                cpu = statistics.mean(run["cpu_seconds"] for run in runs)
                print(f"| {env} | {method} | {spread([r['all_seats']['self'] for r in runs])} | {cpu:.0f} |")
    for part, field in (("untrained", "returns"), ("top", "all_seats")):
        for setting in PARTS[part]:
            if setting in results:
                print(f"\n| {setting} | mean return (seeds) |\n|-|-|")
                for label in results[setting][0][field]:
                    print(f"| {label} | {spread([r[field][label] for r in results[setting]])} |")


def main(options: Options) -> None:
    cut, episodes = (" --total-timesteps 10000", 20) if options.quick else ("", options.episodes)
    jobs = [
        {"script": "hop_mcts", "setting": setting, "seed": seed, "options": f"{words} --seed {seed}{cut}"}
        | {"episodes": episodes, "play": play}
        for seed in options.seeds[: 1 if options.quick else None]
        for setting, (words, play) in PARTS[options.part].items()
    ]
    file = options.results("mcts")
    if benchmark(__file__, options, jobs, work, file):
        report(file)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""What do parallel games bring to learning? Equal game steps, and equal time.

Runs of equal game steps in self-play, other options by default, judged after training. At equal
time: the training return that their curves have reached after the CPU seconds that the fastest
setting takes for a whole run. Schedules still follow the whole run there. With few games an
iteration has a fixed cost: these runs are cut, and count at equal time alone.
"""

import numpy as np

from figures import by_setting, figure, table
from run import training

GAME = "msh-4x4-4h1s"
METHODS = {"plain PPO": "--goal none --plan-update none", "one step": ""}
GAMES = (1, 4, 16, 64, 256, 1024)
STEPS = 131_072
CUT = {("plain PPO", 1): 12_288, ("one step", 1): 4_096, ("one step", 4): 16_384}  # game steps


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost."""
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for games in (16, 64) if quick else GAMES:
            for method, words in METHODS.items():
                steps = 4096 if quick else CUT.get((method, games), STEPS)
                words = f"--env-id {GAME} --co-players self --num-envs {games} {words}"
                job = training(f"{method} | {games} games", seed, "hop_onestep", words, steps)
                job |= {"steps": steps, "kinds": {"self": "self"}}
                yield {**job, "episodes": 20 if quick else 1000}


def return_after(run: dict, seconds: float) -> float:
    """Mean training return in the last fifth of the first `seconds` of a run, or the last one."""
    past = [(second, value) for _, second, value in run["curve"] if second <= 1.001 * seconds]
    late = [value for second, value in past if second > 0.8 * seconds]
    return float(np.mean(late)) if late else past[-1][1] if past else float("nan")


def report(results: list[dict]) -> str:
    """A table for each method."""
    runs = by_setting(results)
    parts = []
    for method in METHODS:
        each = {n: of for n in GAMES if (of := runs[f"{method} | {n} games"])}
        whole = [n for n in each if (method, n) not in CUT]
        if whole:
            least = min(max(run["train_cpu_seconds"] for run in each[n]) for n in whole)
            rows = [
                [f"return after {STEPS:,} game steps"],
                [f"training return after {least:.0f} CPU seconds"],
                ["CPU seconds of training"],
                ["game steps a CPU second"],
            ]
            for n, of in each.items():
                seconds = np.array([run["train_cpu_seconds"] for run in of])
                steps = np.array([run["steps"] for run in of])
                rows[0].append(figure([run["all_seats"]["self"] for run in of] * (n in whole)))
                rows[1].append(figure([return_after(run, least) for run in of]))
                rows[2].append(figure(seconds.tolist(), 0))
                rows[3].append(figure((steps / seconds).tolist(), 0))
            parts.append(table([f"{GAME}, {method}: parallel games", *map(str, each)], rows))
    return "\n\n".join(parts)

"""What do parallel games bring to learning? Equal game steps, and equal time.

Runs of equal game steps in self-play, other options by default, judged after training. At equal
time: the training return that their curves have reached after the CPU seconds that the fastest
setting takes for a whole run. Schedules still follow the whole run there. With few games an
iteration has a fixed cost: these runs are cut, and count at equal time alone.
"""

import numpy as np

from figures import by_setting, figure, table
from figures import draw as draw_panels
from run import train_and_judge

GAME = "msh-4x4-4h1s"
METHODS = {"plain PPO": "--goal none --plan-update none", "one step": ""}
GAMES = (1, 4, 16, 64, 256, 1024)
STEPS = 131_072
CUT = {("plain PPO", 1): 12_288, ("one step", 1): 4_096, ("one step", 4): 16_384}  # game steps

work = train_and_judge


def jobs(seeds: tuple[int, ...], quick: bool) -> list[dict]:
    """Seeds outermost."""
    found = []
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for games in (16, 64) if quick else GAMES:
            for method, words in METHODS.items():
                steps = 4096 if quick else CUT.get((method, games), STEPS)
                words = f"--env-id {GAME} --co-players self --num-envs {games} {words}".strip()
                words += f" --total-timesteps {steps} --seed {seed}"
                job = {
                    "setting": f"{method} | {games} games",
                    "seed": seed,
                    "kinds": {"self": "self"},
                }
                job |= {"script": "hop_onestep", "options": words, "steps": steps}
                found.append({**job, "episodes": 20 if quick else 1000})
    return found


def return_after(run: dict, seconds: float) -> float:
    """Mean training return in the last fifth of the first `seconds` of a run, or the last one."""
    past = [(second, value) for _, second, value in run["curve"] if second <= 1.001 * seconds]
    late = [value for second, value in past if second > 0.8 * seconds]
    return float(np.mean(late)) if late else past[-1][1] if past else float("nan")


def figures_of(runs: dict[str, list[dict]], method: str) -> dict[int, dict[str, list[float]]]:
    """Of each number of games: seconds, and returns after equal steps (whole runs) and time."""
    found = {n: runs.get(f"{method} | {n} games", []) for n in GAMES}
    found = {n: of for n, of in found.items() if of}
    whole = {n: of for n, of in found.items() if (method, n) not in CUT}
    if not whole:
        return {}
    seconds = {n: [run["train_cpu_seconds"] for run in of] for n, of in found.items()}
    least = min(max(seconds[n]) for n in whole)
    return {
        n: {
            "least": least,
            "seconds": seconds[n],
            "speed": [run["steps"] / run["train_cpu_seconds"] for run in of],
            "steps": [run["all_seats"]["self"] for run in whole.get(n, [])],
            "time": [return_after(run, least) for run in of],
        }
        for n, of in found.items()
    }


def report(results: list[dict]) -> str:
    """A table for each method."""
    runs = by_setting(results)
    parts = []
    for method in METHODS:
        columns = figures_of(runs, method)
        if columns:
            least = next(iter(columns.values()))["least"]
            names = {
                "steps": (f"return after {STEPS:,} game steps", 2),
                "time": (f"training return after {least:.0f} CPU seconds", 2),
                "seconds": ("CPU seconds of training", 0),
                "speed": ("game steps a CPU second", 0),
            }
            rows = [
                [title, *(figure(of[name], digits) for of in columns.values())]
                for name, (title, digits) in names.items()
            ]
            parts.append(table([f"{GAME}, {method}: parallel games", *map(str, columns)], rows))
    return "\n\n".join(parts)


def draw(results: list[dict]) -> None:
    """scaling.png: returns after equal steps and time, against parallel games."""
    runs = by_setting(results)
    panels = {"steps": {}, "time": {}}
    for method in METHODS:
        columns = figures_of(runs, method)
        for name, lines in panels.items():
            shown = {n: of[name] for n, of in columns.items() if of[name]}
            seeds = min(map(len, shown.values()), default=0)
            if seeds:
                values = np.array([of[:seeds] for of in shown.values()]).T
                lines[method] = (list(shown), values)
    panels = {f"after equal {name}": lines for name, lines in panels.items() if lines}
    if panels:
        draw_panels("scaling", panels, "parallel games", "mean return", xscale="log")

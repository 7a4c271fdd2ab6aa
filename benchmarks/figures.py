"""Tables, intervals and pictures of the benchmarks. Not a benchmark itself."""

import functools
import itertools
import statistics
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

import hop_onestep

PICTURES = Path(__file__).parent / "pictures"
COLOURS = {  # Okabe and Ito
    "tree search": "#0072B2",
    "one step": "#009E73",
    "discrete goals": "#CC79A7",
    "latent model": "#E69F00",
    "Direct-OM": "#56B4E9",
    "plain PPO": "#D55E00",
    "prosocial PPO": "#555555",
    "hop_mcts": "#0072B2",
    "hop_onestep": "#009E73",
    "hop_ppo_gumbel": "#CC79A7",
    "latent_world_model": "#E69F00",
    "none": "#D55E00",
    "inferred": "#0072B2",
    "oracle": "#555555",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent runs, and half of its 95 % interval by Student's t; nan with one run."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return mean, float(quantile * scipy.stats.sem(values))


def figure(values: list[float], digits: int = 2) -> str:
    """Mean +- half of the 95 % interval (number of runs); nothing without runs."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean, half = interval(values)
    within = f" ± {half:,.{digits}f}" if half == half else ""
    return f"{mean:,.{digits}f}{within} ({len(values)})"


def by_setting(results: list[dict]) -> dict[str, list[dict]]:
    """The results of each setting, by seed; results are sorted."""
    groups = itertools.groupby(results, lambda result: result["setting"])
    return {setting: list(group) for setting, group in groups}


def paired(*groups: list[dict]) -> list[list[dict]]:
    """The results of several settings of the seeds that all of these have."""
    common = set.intersection(*({result["seed"] for result in group} for group in groups))
    return [[result for result in group if result["seed"] in common] for group in groups]


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Running means [..] of the last `width` of values [..], along the last axis."""
    parts = [values[..., max(0, k + 1 - width) : k + 1] for k in range(values.shape[-1])]
    return np.stack([part.mean(-1) for part in parts], -1)


def curves(runs: list[dict], column: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the curves of several runs: places [P], by game steps (0) or CPU seconds (1), and smoothed
    returns [seeds, P]."""
    points = min(len(run["curve"]) for run in runs)
    rows = np.array([run["curve"][:points] for run in runs])
    return rows[:, :, column].mean(0), smooth(rows[:, :, 2])


def draw(name: str, panels: dict[str, dict], x: str, y: str, columns: int = 4, **axes) -> None:
    """Picture of `panels` by title: lines by label, each (places [P], values [seeds, P]), as mean
    and range of the seeds. A label's colour is that of its first words in COLOURS."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    picture = Figure((3.6 * columns, 0.5 + 3.0 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False).flat
    handles = {}
    for panel, (title, lines) in zip(grid, panels.items()):
        for number, (label, (places, values)) in enumerate(lines.items()):
            values = np.atleast_2d(values)
            colour = COLOURS.get(label.split(",")[0], f"C{number}")
            style = ":" if "frozen" in label else "-"
            marker = "o" if len(places) < 12 else ""
            mean = np.nanmean(values, 0)
            handles[label] = panel.plot(places, mean, style, marker=marker, ms=3, color=colour)[0]
            panel.fill_between(
                places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0
            )
        panel.set(title=title, xlabel=x, **axes)
        panel.grid(alpha=0.3)
    for panel in list(grid)[len(panels) :]:
        panel.axis("off")
    picture.axes[0].set_ylabel(y)
    picture.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    PICTURES.mkdir(exist_ok=True)
    picture.savefig(PICTURES / f"{name}.png", dpi=110)


def best_return(game: str) -> float:
    """Highest possible mean return of all players."""
    return hop_onestep.GridGame(game).best_return


@functools.cache
def random_return(game: str, company: str, matches: int = 200) -> float:
    """Mean return of a uniformly random player with three of `company`; with `self`, of four."""
    world = hop_onestep.GridGame(game)
    generator = torch.Generator().manual_seed(1)
    entries = [company] * (world.num_players - 1)
    players = hop_onestep.CoPlayers(world, entries, matches, 10, generator, fixed=True)
    state = world.start(matches, generator)
    running = torch.zeros(matches, world.num_players)  # returns of the running episodes
    focal, everyone = [], []  # of the first ten episodes of each match
    left = torch.full((matches,), 10)
    while (left > 0).any():
        mask = world.action_mask(state)
        random = torch.multinomial(mask.flatten(0, 1).float(), 1, generator=generator)
        played = players.act(state, mask)
        actions = torch.where(players.kind == 0, random.view_as(played), played)
        state, reward, terminated, truncated = world.step(state, actions)
        running = running + reward
        ended = (terminated | truncated).all(1)
        counted = ended & (left > 0)
        focal.append(running[counted, players.focal[counted]])
        everyone.append(running[counted].mean(1))
        left = left - ended.long()
        running[ended] = 0.0
        players.observe(ended)
        state = world.restart(state, ended, generator)
    return float(torch.cat(everyone if company == "self" else focal).mean())

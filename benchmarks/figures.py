"""Tables, intervals and pictures of the benchmarks. Not a benchmark itself."""

import functools
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

import hop_onestep

PICTURES = Path(__file__).parent / "pictures"
COLOURS = {  # of Okabe and Ito, and whose they are
    "#0072B2": ("tree search", "hop_mcts", "inferred"),
    "#009E73": ("one step", "hop_onestep"),
    "#CC79A7": ("discrete goals", "hop_ppo_gumbel"),
    "#E69F00": ("latent model", "latent_world_model"),
    "#56B4E9": ("Direct-OM",),
    "#D55E00": ("plain PPO", "none"),
    "#555555": ("prosocial PPO", "oracle"),
}
COLOUR_OF = {name: colour for colour, names in COLOURS.items() for name in names}


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


def by_setting(results: list[dict]) -> defaultdict[str, list[dict]]:
    """The results of each setting, by seed, or none; results are sorted."""
    groups = itertools.groupby(results, lambda result: result["setting"])
    return defaultdict(list, {setting: list(group) for setting, group in groups})


def paired(*groups: list[dict]) -> list[list[dict]]:
    """The results of several settings of the seeds that all of these have."""
    common = set.intersection(*({result["seed"] for result in group} for group in groups))
    return [[result for result in group if result["seed"] in common] for group in groups]


def curves(runs: list[dict], column: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the curves of several runs: places [P], by game steps (0) or CPU seconds (1), and running
    means of the last five returns [seeds, P]."""
    points = min(len(run["curve"]) for run in runs)
    rows = np.array([run["curve"][:points] for run in runs])
    means = [rows[:, max(0, k - 4) : k + 1, 2].mean(1) for k in range(points)]
    return rows[:, :, column].mean(0), np.stack(means, 1)


def draw_panels(name: str, panels: dict, x: str, y: str, columns: int = 4, **axes) -> None:
    """Picture of `panels` by title, if any: lines by label, each (places [P], values [seeds, P]),
    as mean and range of the seeds. A label's first words have the colour of COLOUR_OF."""
    if not panels:
        return
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    picture = Figure((3.6 * columns, 0.5 + 3.0 * rows), layout="constrained")
    handles = {}
    for k, (title, lines) in enumerate(panels.items(), 1):
        panel = picture.add_subplot(rows, columns, k)
        for number, (label, (places, values)) in enumerate(lines.items()):
            values = np.atleast_2d(values)
            colour = COLOUR_OF.get(label.split(",")[0], f"C{number}")
            style = ":" if "frozen" in label else "-"
            marker = "o" if len(places) < 12 else ""
            mean = np.nanmean(values, 0)
            handles[label] = panel.plot(places, mean, style, marker=marker, ms=3, color=colour)[0]
            panel.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        panel.set(title=title, xlabel=x, **axes)
        panel.grid(alpha=0.3)
    picture.axes[0].set_ylabel(y)
    picture.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    PICTURES.mkdir(exist_ok=True)
    picture.savefig(PICTURES / f"{name}.png", dpi=110)


@functools.cache
def random_return(game: str, company: str, matches: int = 200) -> float:
    """Mean return of a uniformly random player with three of `company`; with `self`, of four."""
    world = hop_onestep.GridGame(game)
    generator = torch.Generator().manual_seed(1)
    entries = [company] * (world.num_players - 1)
    players = hop_onestep.CoPlayers(world, entries, matches, 10, generator, fixed=True)
    state = world.start(matches, generator)
    running = torch.zeros(matches, world.num_players)  # returns of the running episodes
    returns = []  # of the first ten episodes of each match
    done = running[:, 0] > 0
    while not done.all():
        mask = world.action_mask(state)
        random = torch.multinomial(mask.flatten(0, 1).float(), 1, generator=generator)
        played = players.act(state, mask)
        actions = torch.where(players.kind == 0, random.view_as(played), played)
        state, reward, terminated, truncated = world.step(state, actions)
        running = running + reward
        ended = (terminated | truncated).all(1)
        own = hop_onestep.pick(running, players.focal)
        counted = running.mean(1) if company == "self" else own
        returns.append(counted[ended & ~done])
        running[ended] = 0.0
        done = done | players.advance(ended)
        state = world.restart(state, ended, generator)
    return float(torch.cat(returns).mean())

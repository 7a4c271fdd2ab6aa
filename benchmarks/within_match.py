"""Learning within the match: a learner trained in self-play meets three co-players of one kind for 2,400 steps.

    python benchmarks/within_match.py RUN --co-players nh          # RUN: a self-play run of hop_onestep.py
    python benchmarks/within_match.py RUN --co-players exploiter

Every match starts from RUN's weights and is one game; chunks of 100 steps. Four learners stand side by side: `frozen`
(nothing learns), `ppo` (PPO and MOA learn, no planner), `network` (all learn, the planner acts on the learnt transition
network) and `simulator` (the same, the planner on exact steps of the game). The score of a window of 300 steps is the
focal player's mean return of the episodes that end in it, between uniformly random play (0) and plain PPO trained on
the same co-players (1). Prints a row for each learner; figures as JSON with `--json FILE`."""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hop_onestep as script  # noqa: E402

WINDOW = 300
STEPS = 2400
CHUNK = 100


def focal_returns(args) -> dict[int, list[float]]:
    """Returns of the learner's episodes by the iteration in which they ended."""
    returns = defaultdict(list)

    def watch(iteration, finished, **rest):
        for _, kinds, totals in finished:
            returns[iteration] += totals[kinds == 0].tolist()

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        script.train(args, watch)
    return returns


def options(run: str, kind: str, seed: int, *words: str):
    """Args of one match from `run`."""
    fixed = f"--init {run} --co-players {kind} --num-envs 1 --num-steps {CHUNK} --total-timesteps {STEPS}"
    fixed += f" --match-episodes {STEPS} --no-anneal --seed {seed} --exp-name within"
    return script.parse_arguments([*fixed.split(), *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a self-play run")
    parser.add_argument("--co-players", default="nh", help="a scripted kind")
    parser.add_argument("--matches", type=int, default=8)
    parser.add_argument("--learning-rate", default="3e-3")
    parser.add_argument("--plan-update", default="offset")
    parser.add_argument("--reference-steps", type=int, default=300_000, help="training of plain PPO")
    parser.add_argument("--learners", default="frozen,ppo,network,simulator")
    parser.add_argument("--json")
    chosen, further = parser.parse_known_args()  # further options are the learner's
    run = str(Path(chosen.run).resolve())
    env_id = script.load_checkpoint(run)["args"]["env_id"]
    planner = f"--plan-update {chosen.plan_update} --plan-until 1"
    rate = f"--learning-rate {chosen.learning_rate}"
    learners = {
        "frozen": "--plan-update none --learning-rate 1e-12 --freeze-moa",
        "ppo": f"--plan-update none {rate}",
        "network": f"{planner} {rate}",
        "simulator": f"{planner} {rate} --transition simulator",
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        plain = {"env_id": env_id, "co_players": chosen.co_players, "goal": "none", "plan_update": "none"}
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            reference = script.train(script.Args(**plain, total_timesteps=chosen.reference_steps))["run"]
            best = script.evaluate(reference, chosen.co_players, episodes=2000)["focal_return"]
        worst = random_return(script.GridGame(env_id), chosen.co_players)
        print(f"{env_id}, three {chosen.co_players}: random {worst:.3f}, plain PPO trained on them {best:.3f}")
        result = {"env_id": env_id, "co_players": chosen.co_players, "random": worst, "reference": best}
        for name in chosen.learners.split(","):
            scores = []
            for seed in range(1, chosen.matches + 1):
                returns = focal_returns(options(run, chosen.co_players, seed, *learners[name].split(), *further))
                row = []
                for first in range(0, STEPS // CHUNK, WINDOW // CHUNK):
                    ended = sum((returns[first + k + 1] for k in range(WINDOW // CHUNK)), [])
                    row.append((np.mean(ended) - worst) / (best - worst) if ended else np.nan)
                scores.append(row)
            windows = np.nanmean(scores, 0)
            last = np.nanmean(np.array(scores)[:, -2:], 1)
            error = 1.96 * last.std(ddof=1) / len(last) ** 0.5
            row = " ".join(f"{score:6.2f}" for score in windows)
            print(f"{name:9} {row}   last 600: {last.mean():.2f} +- {error:.2f}", flush=True)
            result[name] = np.array(scores).tolist()
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(result) + "\n")


def random_return(game, kind: str, batch: int = 256) -> float:
    """Mean return of a uniformly random player with co-players of one kind."""
    generator = script.Generator().manual_seed(1)
    players = script.CoPlayers(game, [kind] * (game.num_players - 1), batch, 1, generator, fixed=True)
    state = game.start(batch, generator)
    total = game.alive(state) * 0.0
    playing = total[:, 0] == 0.0
    while playing.any():
        mask = game.action_mask(state)
        actions = players.act(state, mask)
        random = script.random_actions(mask, generator)
        state, reward, terminated, truncated = game.step(state, script.where(players.kind == 0, random, actions))
        total = total + reward * playing[:, None]
        playing = playing & ~(terminated | truncated).all(1)
        state = game.restart(state, (terminated | truncated).all(1), generator)
    return float(total[players.kind == 0].mean())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    script.torch.set_num_threads(1)
    main()

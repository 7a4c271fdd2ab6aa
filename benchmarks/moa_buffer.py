"""The three rules of collection of the MOA's buffer: how fast does it fill, how old is it, and what does the MOA learn?

For each rule a plain PPO learner with inferred goals plays among scripted players. Then, on matches of scripted players
that no run has seen: negative log-likelihood of the actions, in all episodes, and in those in which the player takes
something.

    python benchmarks/moa_buffer.py --env-id msh-4h1s
"""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hop_onestep as script
from moa_goals import batch_of, play, posterior_mean


@dataclasses.dataclass
class Options:
    env_id: str = "msh-4h1s"  # game
    steps: tuple[int, ...] = (50_000, 150_000)  # game steps of training
    held_out: int = 400  # matches to measure on
    seed: int = 1  # seed


@torch.no_grad()
def measure(moa: script.MOA, test: script.MOABuffer) -> tuple[float, float]:
    """NLL per action of scripted players in `test`: of all, and in episodes in which the player takes something."""
    batch = batch_of(test, test.batch + torch.arange(len(test)), moa.relative)
    own, others = moa.relative(batch.state)
    logits = moa.decoder(own, others, posterior_mean(moa, batch, own, others))
    logits = script.masked(logits, moa.relative.game.action_mask(batch.state)).flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, batch.actions.flatten(), reduction="none").view(batch.actions.shape)
    rows = test.batch + torch.arange(len(test))
    episode = test.data["episode"][rows, : nll.shape[1]].long().unsqueeze(2).expand_as(nll)
    taken = (test.data["taken"][rows].sum(-1) > 0).gather(1, episode)
    return float(nll[batch.active].mean()), float(nll[batch.active & taken].mean())


def main(options: Options) -> None:
    scripted = script.SCRIPTED_OF[script.GridGame(options.env_id).family]
    kinds = [*scripted, *(f"{kind}-noisy" for kind in scripted if kind != "random")]
    test = play(script.GridGame(options.env_id), kinds, options.held_out, 5, options.seed + 1000)
    print(f"{options.env_id}, co-players {', '.join(kinds)}, seed {options.seed}")
    print("rule       game steps   kept   fill  age (steps)    NLL  NLL, something taken")
    for rule in ("all", "positive", "balanced"):
        for steps in options.steps:
            args = script.Args(env_id=options.env_id, co_players=",".join(kinds), plan_update="none", seed=options.seed)
            metrics = script.train(
                dataclasses.replace(args, total_timesteps=steps, moa_buffer=rule, exp_name=f"buffer_{rule}")
            )
            kept, fill, age = (metrics[f"moa/buffer_{name}"] for name in ("kept", "fill", "age"))
            nll, taken = measure(script.load_agent(metrics["run"]).moa, test)
            print(f"{rule:10} {steps:10,} {kept:6.1%} {fill:6.1%} {age:12,.0f} {nll:6.3f} {taken:8.3f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The opponent model's data: three rules of collection, and a model that is pretrained or taken from another run.

    python benchmarks/moa_buffer.py                     # everything that is not there yet, at most two hours
    python benchmarks/moa_buffer.py --only rules        # one part: rules, or pretrained (which needs rules)
    python benchmarks/moa_buffer.py --report            # tables and docs/moa_buffer.png of the results so far

`hop_onestep.py` learns among a mixture of scripted co-players. `rules`: `--moa-buffer` all, positive or balanced. How
full is the buffer, how old is it, how well is the opponent model predicting, what is the return? `pretrained`: a fresh
model, which is rule `all` above, against one that `--pretrain-moa-steps` trained first, and against the model of a
finished run of another seed (`--load-moa`), learning on or with `--freeze-moa`. Seed s takes the model of rule `all`,
seed s + 1, so that rule has one seed more than the others, which tables and pictures leave out. The game steps of
pretraining, a fifth of the run's, come on top and are not in the curves.

Opponent models are compared during the run on matches of scripted players that no run has seen: negative log-likelihood
of the actions, in all episodes, and in those in which the player takes something. `+-` is half a 95 % interval over
seeds, by Student's t.
"""

import dataclasses
import itertools
import math
import statistics
import time

import matplotlib
import numpy as np
import torch
import tyro

import runs  # before the scripts, whose folder it knows
from runs import CHECKPOINTS, ROOT, Running, benchmark, by_setting, checkpoint_of, interval, results_in

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import hop_onestep as script
from moa_goals import batch_of, play, posterior_mean

GAME, KINDS, STEPS = "msh-4h1s", "ns,nh,random,ns-noisy,nh-noisy", 200_000
RULES = {"all": "", "positive": "--moa-buffer positive", "balanced": "--moa-buffer balanced"}
PRETRAINED = {"pretrained": "--pretrain-moa-steps {pretraining}", "loaded": "--load-moa {donor}"}
PRETRAINED["loaded, frozen"] = PRETRAINED["loaded"] + " --freeze-moa"
SETTINGS = {
    "rules": {name: f"rules | {name}" for name in RULES},
    "pretrained": {"fresh": "rules | all"} | {name: f"pretrained | {name}" for name in PRETRAINED},
}
PANELS = {  # metric: title
    "charts/episodic_return": "return",
    "held_out/nll": "NLL, nats an action",
    "held_out/nll_taken": "NLL, something taken",
    "moa/buffer_fill": "buffer: fill",
    "moa/buffer_kept": "buffer: share kept",
    "moa/buffer_age": "buffer: age, game steps",
    "moa/nll": "NLL in training",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito


@dataclasses.dataclass
class Options(Running):
    episodes: int = 1000  # evaluation episodes in each company
    held_out: int = 200  # matches that the opponent models are compared on


def all_jobs(options: Options) -> dict[str, list[dict]]:
    """The jobs of the rules and, to be run after them, the others."""
    seeds = options.seeds[: 1 if options.quick else None]
    steps, held_out = (16_384, 200) if options.quick else (STEPS, options.held_out)
    companies = {**{f"3 {kind}": kind for kind in ("ns", "nh", "random")}, "one of each": "ns,nh,random"}
    jobs: dict[str, list[dict]] = {"rules": [], "pretrained": []}

    def job(setting: str, seed: int, words: str) -> dict:
        words = f"--env-id {GAME} --co-players {KINDS} {words} --total-timesteps {steps} --seed {seed}"
        job = {"script": "hop_onestep", "setting": setting, "seed": seed, "options": " ".join(words.split())}
        job |= {"episodes": 20 if options.quick else options.episodes, "kinds": companies, "held_out": held_out}
        return {**job, "curves": list(PANELS)}

    wanted = {(seed, rule): 0 for seed in seeds for rule in RULES} | {(seed + 1, "all"): 0 for seed in seeds}
    for seed, rule in wanted:
        one = job(f"rules | {rule}", seed, RULES[rule])
        keep = checkpoint_of("moa_buffer", one["setting"], seed, options.quick)
        jobs["rules"].append({**one, "keep": keep} if rule == "all" else one)
    for seed, name in itertools.product(seeds, PRETRAINED):
        donor = checkpoint_of("moa_buffer", "rules | all", seed + 1, options.quick)
        words = PRETRAINED[name].format(pretraining=steps // 5, donor=donor)
        one = job(f"pretrained | {name}", seed, words)
        jobs["pretrained"].append({**one, "donor": donor} if "--load-moa" in words else one)
    return jobs


@torch.no_grad()
def measure(moa: script.MOA, test: script.MOABuffer) -> dict[str, float]:
    """NLL per action of scripted players in `test`: of all, and in episodes in which the player takes something."""
    sums = torch.zeros(2, 2)
    for held in torch.arange(len(test)).split(100):
        rows = test.batch + held
        batch = batch_of(test, rows, moa.relative)
        own, others = moa.relative(batch.state)
        logits = moa.decoder(own, others, posterior_mean(moa, batch, own, others))
        logits = script.masked(logits, moa.relative.game.action_mask(batch.state)).flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(logits, batch.actions.flatten(), reduction="none")
        nll = nll.view(batch.actions.shape)
        episode = test.data["episode"][rows, : nll.shape[1]].long().unsqueeze(2).expand_as(nll)
        taken = (test.data["taken"][rows].sum(-1) > 0).gather(1, episode)
        for k, which in enumerate((batch.active, batch.active & taken)):
            sums[k] += torch.stack([nll[which].sum(), which.sum()])
    return dict(zip(("held_out/nll", "held_out/nll_taken"), (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


def work(job: dict) -> dict:
    """Trains and evaluates as every benchmark does; besides, `measure` is logged about 16 times during the run."""
    test = play(script.GridGame(GAME), KINDS.split(","), job["held_out"], 5, 1000)

    class Measured(script.Trainer):
        def iterate(self) -> dict[str, torch.Tensor]:
            metrics = super().iterate()
            last = self.args.total_timesteps // (self.args.num_envs * self.args.num_steps)
            if self.iteration % max(1, last // 16) == 0 or self.iteration in (1, last):
                metrics |= measure(self.agent.moa, test)
            return metrics

    script.Trainer = Measured  # in this process, which ends with the job; the run is the same with and without
    return runs.work(job)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def part_of(run: dict, metric: str, low: float, high: float) -> float:
    """Mean of a metric between two shares of a run (the last value included); nan if it was not logged there."""
    end = run["curve"][-1][0]
    values = [value for step, _, value in run["curves"][metric] if low * end <= step <= high * end]
    return statistics.mean(values) if values else math.nan


def within(values: list[float], digits: int = 2) -> str:
    """Mean over seeds and half its interval, of what was logged."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    mean, low, high = interval(values)
    return f"{mean:,.{digits}f}" + ("" if math.isnan(low) else f" +- {(high - low) / 2:,.{digits}f}")


def plot(runs_of: dict[str, list[dict]]) -> None:
    """docs/moa_buffer.png: a row a part, a column a metric; mean over seeds, and the range of the seeds."""
    figure, axes = plt.subplots(2, len(PANELS) - 1, figsize=(2.5 * (len(PANELS) - 1), 5.0), squeeze=False)
    for row, part in enumerate(SETTINGS):
        left_out = {"rules": "moa/nll", "pretrained": "moa/buffer_kept"}[part]
        for axis, metric in zip(axes[row], [m for m in PANELS if m != left_out], strict=True):
            for colour, (name, of) in zip(COLOURS, of_common_seeds(runs_of, part).items(), strict=False):
                curves = [c for run in of if (c := run["curves"][metric])]
                if not curves:
                    continue
                grid = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
                values = np.array([np.interp(grid, [p[0] for p in c], [p[2] for p in c]) for c in curves])
                axis.plot(grid / 1000, values.mean(0), color=colour, lw=1.2, label=f"{name} ({len(curves)})")
                axis.fill_between(grid / 1000, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
            axis.set_title(PANELS[metric], fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        axes[row, 0].set_ylabel(part, fontsize=8)
        axes[row, 0].legend(fontsize=6)
    figure.supxlabel("thousand game steps", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "moa_buffer.png", dpi=90)
    plt.close(figure)


def of_common_seeds(runs_of: dict[str, list[dict]], part: str) -> dict[str, list[dict]]:
    """The runs of a part's settings, by their names in it, of the seeds that all of them have that have any."""
    found = {name: runs_of[setting] for name, setting in SETTINGS[part].items() if setting in runs_of}
    common = set.intersection(*({run["seed"] for run in some} for some in found.values())) if found else set()
    return {name: [run for run in some if run["seed"] in common] for name, some in found.items()}


def report(runs_of: dict[str, list[dict]], picture: bool) -> None:
    """Markdown tables of the results, and the picture. Early is the first fifth of a run, late the last."""
    some = {part: of for part in SETTINGS if any((of := of_common_seeds(runs_of, part)).values())}
    early, late = (0.0, 0.2), (0.8, 1.0)
    print("\n| rule | seeds | share kept | fill early | fill | age, game steps |\n|-|-|-|-|-|-|")
    for name, of in some.get("rules", {}).items():
        cells = [
            within([part_of(run, f"moa/buffer_{metric}", *when) for run in of], digits)
            for metric, when, digits in (("kept", late, 3), ("fill", early, 3), ("fill", late, 3), ("age", late, 0))
        ]
        print(f"| {name} | {len(of)} | {' | '.join(cells)} |")
    columns = [("held_out/nll", 3), ("held_out/nll_taken", 3), ("charts/episodic_return", 2)]
    for part, found in some.items():
        print(f"\n| {part} | seeds | " + " | ".join(f"{PANELS[m]}: early | late" for m, _ in columns) + " |")
        print("|-|-|" + "-|" * 2 * len(columns))
        for name, of in found.items():
            cells = [
                within([part_of(r, m, *w) for r in of], d) for (m, d), w in itertools.product(columns, (early, late))
            ]
            print(f"| {name} | {len(of)} | {' | '.join(cells)} |")
        companies = list(next((runs[0]["returns"] for runs in runs_of.values()), []))
        print(f"\n| {part}, judged after training with | {' | '.join(companies)} | CPU seconds |")
        print("|-|" + "-|" * (len(companies) + 1))
        for name, of in found.items():
            cells = [within([run["returns"][company] for run in of]) for company in companies]
            seconds = statistics.mean(run["train_cpu_seconds"] for run in of)
            print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    if picture and runs_of:
        plot(runs_of)


def main(options: Options) -> None:
    file, jobs, began = options.results("moa_buffer"), all_jobs(options), time.time()
    if not benchmark(__file__, options, jobs["rules"], work, file):
        return
    options = dataclasses.replace(options, minutes=options.minutes - (time.time() - began) / 60)
    done = {(r["setting"], r["seed"]) for r in results_in(file)}
    lacking = [job for job in jobs["pretrained"] if not (ROOT / job.get("donor", "")).exists()]
    ready = [job for job in jobs["pretrained"] if job not in lacking or (job["setting"], job["seed"]) in done]
    if len(ready) < len(jobs["pretrained"]) and not options.report:
        count = len(jobs["pretrained"]) - len(ready)
        print(f"{count} runs left out: {CHECKPOINTS}/moa_buffer lacks the opponent model to load (--again makes it)")
    if benchmark(__file__, options, ready, work, file):
        report(by_setting(file), picture=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Runs from outside: options, files, logs, checkpoints, resuming, evaluation, and what is refused."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ENV_ID = "msh-3x3-3p-2h1s"
RUN = {"env_id": ENV_ID, "co_players": "self,nh,ns-noisy", "num_envs": 4, "num_steps": 40, "total_timesteps": 480}
RUN |= {"checkpoint_every": 1, "match_episodes": 2, "plan_update": "offset", "plan_until": 1.0, "anneal": False}
RUN |= {"hidden_size": 16, "moa_hidden_size": 8, "goal_size": 3, "moa_matches": 4, "moa_capacity": 50}
RUN |= {"plan_samples": 4, "update_epochs": 2, "num_minibatches": 2, "moa_updates": 3}
RUN |= {"latent_size": 8, "model_updates": 3, "model_batch": 32, "replay_size": 200, "replay_surprising": 50}


def fields_of(script):
    return {field.name for field in dataclasses.fields(script.Args)}


def options_of(script, **options):
    """RUN with other options."""
    return RUN | options


def arguments(options):
    """The same on the command line."""
    flags = {True: "--{}", False: "--no-{}"}
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        words += [flags[value].format(name)] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def train(script, folder, **options):
    """A run in `folder`; its metrics, with the path of its own folder, and what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        metrics = script.train(script.Args(**options_of(script, **options)))
    return {**metrics, "run": str(Path(folder, metrics["run"]))}, printed.getvalue()


def content_of(script, run):
    return script.load_checkpoint(run)


def networks(agent):
    """All parameters, by network."""
    names = {name.split(".")[0] for name, _ in agent.named_parameters()}
    return {name: torch.cat([p.flatten() for p in getattr(agent, name).parameters()]) for name in names}


def scalars(run):
    """{tag: [(step, value)]} of a run's TensorBoard events."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_equal(a, b, path=""):
    """Nested dicts and lists of tensors and plain values are the same, to the bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{k}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def done(script, tmp_path_factory):
    """A finished run with everything switched on: folder, metrics, printed text."""
    folder = tmp_path_factory.mktemp("done")
    metrics, printed = train(script, folder, profile=True, capture_video=True, save_model=True, exp_name="all.on_1")
    return types.SimpleNamespace(folder=Path(metrics["run"]), metrics=metrics, printed=printed)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------------------------------
def files_of(run):
    return {"events" if "tfevents" in path.name else path.name for path in Path(run).iterdir()}


def test_a_run_learns(script, done):
    """Updates happened: every network changed, every optimiser counted its steps, and nothing is nan."""
    content = content_of(script, done.folder)
    args = script.Args(**content["args"])
    before, after = script.Trainer(args).agent, script.load_agent(done.folder)
    old, new = networks(before), networks(after)
    assert set(old) >= {"actor", "critic", "moa"} and len(old) == len(new)
    for name in old:
        assert new[name].isfinite().all() and (new[name] != old[name]).float().mean() > 0.5, name
    for name, parameter in after.named_parameters():  # down to every part of the MOA
        assert not torch.equal(parameter, before.get_parameter(name)) or parameter.numel() < 4, name
    for name, optimizer in content["optimizers"].items():
        steps = {int(state["step"]) for state in optimizer["state"].values()}
        assert max(steps) >= 3 and len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"]), name


def test_figures_are_logged_by_their_names(script, done):
    logged = scalars(done.folder)
    wanted = {"charts/SPS", "charts/episodic_return", "charts/episodic_length", "charts/learning_rate"}
    wanted |= {"returns/self", "returns/nh", "returns/ns-noisy", *(f"returns/seat_{i}" for i in range(3))}
    wanted |= {f"losses/{name}_seat_{i}" for name in ("policy", "value") for i in range(3)}
    wanted |= {"moa/nll", "moa/kl", "moa/recon", "moa/buffer_fill", "losses/policy", "losses/value", "losses/entropy"}
    wanted |= {"time/iteration", "time/iteration/update", "time/iteration/rollout/compute_action"}
    assert wanted <= set(logged), wanted - set(logged)
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    steps = [160, 320, 480]
    for name in ("charts/SPS", "charts/learning_rate", "losses/policy", "charts/episodic_return"):
        assert [step for step, _ in logged[name]] == steps, name
    assert {step for series in logged.values() for step, _ in series} == set(steps)
    best = script.GridGame(ENV_ID).best_return * 3
    for name, series in logged.items():
        assert not name.startswith("returns/") or all(0 <= value <= best for _, value in series)
    assert all(1 <= value <= 35 for _, value in logged["charts/episodic_length"])
    lengths = [value for _, value in logged["moa/buffer_fill"]]
    assert lengths == sorted(lengths) and 0 < lengths[-1] <= 1
    for name, value in done.metrics.items():
        assert name == "run" or logged[name][-1][1] == pytest.approx(value, rel=1e-5)


def test_time_is_a_tree(done):
    """A part's seconds are at least those of its parts; the tree is printed with the same parts."""
    seconds = {tuple(n.split("/")[1:]): v for n, v in done.metrics.items() if n.startswith("time/")}
    assert len(seconds) > 6 and all(value >= 0 for value in seconds.values())
    for path, value in seconds.items():
        parts = [s for other, s in seconds.items() if len(other) == len(path) + 1 and other[:-1] == path]
        assert value >= sum(parts) - 1e-6
        assert path[:-1] in seconds or len(path) == 1
    for path in seconds:
        assert re.search(rf"^{'  ' * (len(path) - 1)}{path[-1]} +[0-9.]+ +[0-9.]+% +\d+$", done.printed, re.M)
    assert str(done.folder.name) in done.printed


def test_files_of_a_run(script, done):
    prefix, name, seed, moment = done.folder.name.rstrip("+").split("__")
    assert (prefix, name, seed) == (ENV_ID, "all.on_1", "1") and abs(int(moment) - time.time()) < 3600
    assert done.folder.parent.name == "runs"
    args = json.loads((done.folder / "args.json").read_text())
    asked = options_of(script, profile=True, capture_video=True, save_model=True, exp_name="all.on_1")
    assert args == dataclasses.asdict(script.resolved(script.Args(**asked)))
    assert args == content_of(script, done.folder)["args"] and None not in (args["gamma"], args["reward_scale"])
    assert files_of(done.folder) == {"args.json", "checkpoint.pt", "model.pt", "episode.gif", "events"}


def test_gif(script, done):
    """Several frames of one size, and something changes from frame to frame."""
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(done.folder / "episode.gif"))]
    assert 2 <= len(frames) <= 35 and len({frame.size for frame in frames}) == 1
    assert min(frames[0].size) > 100 and len({frame.tobytes() for frame in frames}) == len(frames)


def test_model_alone_plays_like_the_checkpoint(script, done):
    model = content_of(script, done.folder / "model.pt")
    assert "optimizers" not in model and (done.folder / "model.pt").stat().st_size > 1000
    a, b = (script.evaluate(done.folder / name, "nh", episodes=6) for name in ("model.pt", "checkpoint.pt"))
    assert a == b


def test_without_the_switches_there_is_no_video_no_model_and_no_time(script, tmp_path):
    metrics, printed = train(script, tmp_path, total_timesteps=160)
    assert files_of(metrics["run"]) == {"args.json", "checkpoint.pt", "events"}
    assert not any(name.startswith("time/") for name in metrics) and "share" not in printed
    again, _ = train(script, tmp_path, total_timesteps=160)  # in the same second, maybe
    assert again["run"] != metrics["run"]


# ---------------------------------------------------------------------------------------------------------------------
# Options: every one changes what it says
# ---------------------------------------------------------------------------------------------------------------------
CHANGES = {  # another value of each option that learning depends on
    "seed": 2, "env_id": "msh-3x3-3p-3h1s", "co_players": "nh", "match_episodes": 1, "prosocial": 0.5,
    "num_envs": 3, "num_steps": 35, "total_timesteps": 400, "learning_rate": 2e-3, "anneal": True, "gamma": 0.5,
    "gae_lambda": 0.1, "update_epochs": 1, "num_minibatches": 1, "norm_adv": False, "clip_coef": 0.001,
    "ent_coef": 0.5, "ent_floor": 1.0, "vf_coef": 2.0, "max_grad_norm": 0.001, "hidden_size": 8, "reward_scale": 2.0,
    "goal": "none", "goal_size": 2, "moa_hidden_size": 16, "moa_learning_rate": 1e-2, "moa_alpha": 1.0,
    "subgoal_coef": 1.0, "moa_updates": 1, "moa_matches": 2, "moa_capacity": 2, "moa_buffer": "positive",
    "freeze_moa": True, "pretrain_moa_steps": 100, "plan_update": "hop", "plan_beta": 5.0, "plan_until": 0.0,
    "plan_samples": 2, "plan_depth": 2, "plan_company": "random", "plan_greedy": True,
    "latent_size": 4, "model_learning_rate": 1e-2, "model_updates": 1, "model_batch": 16,
    "observation_coef": 0.1, "reward_coef": 0.1, "value_coef": 0.1, "consistency_coef": 50.0, "td_target": "model",
    "replay_size": 10, "replay_surprising": 4,
}  # fmt: skip
OUTSIDE = """exp_name torch_deterministic cuda compile track wandb_project_name wandb_entity capture_video save_model
    checkpoint_every resume profile evaluate eval_episodes load_moa
    dataset collect offline""".split()  # tested by name elsewhere in this file, or in test_latent_model.py
NEEDS = {"ent_floor": {"anneal": True}, "total_timesteps": {"anneal": True}}  # options that matter only with another


@pytest.fixture(scope="module")
def outcomes(script):
    """Weights after two iterations, by options; each is computed once."""
    known = {}

    def outcome(**options):
        key = tuple(sorted(options.items()))
        if key not in known:
            trainer = script.Trainer(script.resolved(script.Args(**options_of(script, **options))))
            trainer.agent.plan_slope.fill_(1.0)
            trainer.pretrain([])
            for _ in range(2):
                trainer.iterate()
            known[key] = networks(trainer.agent)
        return known[key]

    return outcome


def test_every_option_is_tested(script):
    assert fields_of(script) == {*CHANGES, *OUTSIDE}


@pytest.mark.parametrize("name", CHANGES)
def test_option_changes_the_outcome(script, outcomes, name):
    base = NEEDS.get(name, {})
    before, after = outcomes(**base), outcomes(**{**base, name: CHANGES[name]})
    same = [n for n in before if before[n].shape == after[n].shape and torch.equal(before[n], after[n])]
    assert "actor" not in same and len(same) < len(before)


def test_the_same_options_give_the_same_outcome(script, outcomes):
    trainer = script.Trainer(script.resolved(script.Args(**options_of(script))))
    trainer.agent.plan_slope.fill_(1.0)
    for _ in range(2):
        trainer.iterate()
    assert_equal(networks(trainer.agent), outcomes())


def trainer_of(script, **options):
    return script.Trainer(script.resolved(script.Args(**options_of(script, **options))))


@pytest.mark.parametrize("anneal", [True, False])
def test_schedules(script, anneal):
    """Learning rate and entropy bonus fall linearly, to nothing and to the floor; the planner is switched off."""
    options = {"plan_until": 0.5, "plan_update": "offset", "total_timesteps": 800}
    trainer = trainer_of(script, anneal=anneal, learning_rate=0.004, ent_coef=0.1, ent_floor=0.4, **options)
    seen, loss = [], trainer.ppo_loss

    def watching(*inputs):
        rate = trainer.optimizers["policy"].param_groups[0]["lr"]
        seen.append((rate, float(inputs[4]), trainer.agent.plan_mode))
        return loss(*inputs)

    trainer.ppo_loss = watching
    for k in range(5):
        seen.clear()
        metrics = trainer.iterate()
        share = 1 - k / 5 if anneal else 1.0
        assert {round(rate, 9) for rate, *_ in seen} == {round(0.004 * share, 9)}
        assert float(metrics["charts/learning_rate"]) == pytest.approx(0.004 * share)
        assert {round(bonus, 6) for _, bonus, _ in seen} == {round(0.1 * max(share, 0.4), 6)}
        assert {mode for *_, mode in seen} == {"offset" if k < 3 else "none"}  # 0, 0.2, 0.4 of the run are done


def test_numbers_of_updates(script, monkeypatch):
    """Passes, minibatches, the MOA's updates and matches, and the samples of the planner."""
    options = {"update_epochs": 3, "num_minibatches": 5, "moa_updates": 7, "moa_matches": 6, "plan_samples": 9}
    options |= {"hidden_size": 12}
    options |= {"moa_hidden_size": 10, "goal_size": 5, "model_updates": 8}
    trainer = trainer_of(script, **options)
    agent, count = trainer.agent, Counter()
    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: count.update([name]))
    rows = trainer.rollout()
    assert rows["value"].shape == (40, 4, 3)
    sample, seen = trainer.buffer.sample, []
    trainer.buffer.sample = lambda matches, *rest: seen.append(matches) or sample(matches, *rest)
    trainer.iterate()
    assert count["policy"] == 15 and seen == [6] * 7 and count["moa"] == 7 and count["model"] == 8
    draw, shapes = agent.sample_joint_actions, []
    agent.sample_joint_actions = lambda *inputs: shapes.append(draw(*inputs).shape) or draw(*inputs)
    trainer.rollout()
    assert shapes == [(4, 9, 3)] * 40
    assert agent.actor.out.weight.shape == (7, 12) and agent.critic.out.weight.shape == (1, 12)
    assert agent.moa.decoder.out.weight.shape == (7, 10) and rows["goal"].shape == (40, 4, 3, 5)


def test_learning_rates_of_the_other_networks(script):
    options = {"moa_learning_rate": 0.0123, "model_learning_rate": 0.0789}
    trainer = trainer_of(script, **options)
    for name, rate in options.items():
        assert trainer.optimizers[name.removesuffix("_learning_rate")].param_groups[0]["lr"] == rate


def test_gradients_are_clipped(script):
    trainer, norms = trainer_of(script, max_grad_norm=1e-3, vf_coef=5.0), []

    def after_step(optimizer, *_):
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))

    trainer.optimizers["policy"].register_step_post_hook(after_step)
    metrics = trainer.iterate()
    assert max(norms) <= 1.001e-3 and float(metrics["losses/grad_norm"]) > 1e-2


def test_goal_sources(script):
    """`none` sees zeros, `oracle` the truth, `inferred` something of each player's own."""
    for goal in ("inferred", "none", "oracle"):
        rows = trainer_of(script, goal=goal, co_players="nh,ns").rollout()
        if goal == "none":
            assert not rows["goal"].any()
        else:
            assert rows["goal"].flatten(0, 2).std(0).max() > 0.01


def test_freeze_moa_and_load_moa(script, done, tmp_path):
    loaded, _ = train(script, tmp_path, load_moa=str(done.folder), freeze_moa=True, seed=5, total_timesteps=320)
    old, new = (networks(script.load_agent(run)) for run in (done.folder, loaded["run"]))
    assert torch.equal(old["moa"], new["moa"]) and not torch.equal(old["actor"], new["actor"])
    assert "moa/nll" not in loaded and "moa/buffer_fill" in loaded
    fresh, _ = train(script, tmp_path, load_moa=str(done.folder / "model.pt"), seed=5, total_timesteps=320)
    trained = networks(script.load_agent(fresh["run"]))["moa"]
    start = networks(trainer_of(script, seed=5).agent)["moa"]
    assert not torch.equal(trained, old["moa"]) and (trained - old["moa"]).norm() < 0.5 * (trained - start).norm()


def test_a_run_that_took_a_moa_is_resumed_without_it(script, done, tmp_path):
    donor = tmp_path / "donor.pt"
    donor.write_bytes((done.folder / "model.pt").read_bytes())
    begun, _ = train(script, tmp_path, load_moa=str(donor), total_timesteps=160)
    donor.unlink()
    args = script.parse_arguments(["--resume", begun["run"], "--total-timesteps", "320"])
    resumed, _ = train(script, tmp_path, **dataclasses.asdict(args))
    assert resumed["run"] == begun["run"] and counters_of(content_of(script, resumed["run"])) == 320
    with pytest.raises(script.UsageError, match="--load-moa was"):
        train(script, tmp_path, **{**dataclasses.asdict(args), "load_moa": str(done.folder)})


def test_a_moa_of_another_goal_or_untrained_is_not_taken(script, done, tmp_path):
    """Even where its networks fit."""
    path, content = tmp_path / "model.pt", content_of(script, done.folder / "model.pt")

    def taken(own, goal, plan_update):
        """By a run of goal `own`, from one with these options whose networks have the right sizes."""
        trainer, options = trainer_of(script, goal=own), {"goal": goal, "plan_update": plan_update}
        weights = {f"moa.{name}": value for name, value in trainer.agent.moa.state_dict().items()}
        torch.save({**content, "agent": weights, "args": {**content["args"], **options}}, path)
        trainer.load_moa(str(path))

    taken("inferred", "inferred", "none")
    for goal in ("none", "oracle"):
        taken(goal, goal, "hop")
        for other, plan_update in ((goal, "none"), ("inferred", "hop")):
            with pytest.raises(script.UsageError, match="--load-moa"):
                taken(goal, other, plan_update)


def test_a_moa_that_nothing_reads_is_not_trained(script, tmp_path):
    plain = {"plan_update": "none"}
    for goal in ("none", "oracle"):
        with pytest.raises(script.UsageError, match="--pretrain-moa-steps"):
            train(script, tmp_path, goal=goal, pretrain_moa_steps=100)
        with pytest.raises(script.UsageError, match="--freeze-moa"):
            train(script, tmp_path, goal=goal, freeze_moa=True, **plain)
        with pytest.raises(script.UsageError, match="--load-moa"):
            train(script, tmp_path, goal=goal, load_moa=str(tmp_path), **plain)
    assert not list(tmp_path.iterdir())
    train(script, tmp_path, freeze_moa=True, total_timesteps=160, **plain)


@pytest.mark.parametrize("freeze_moa", [False, True])
def test_memories_and_ages_after_pretraining(script, freeze_moa):
    """Memories are those of the MOA that was pretrained; ages count the steps of pretraining as well."""
    trainer = trainer_of(script, pretrain_moa_steps=350, freeze_moa=freeze_moa, total_timesteps=800)
    buffer, count, born = trainer.buffer, Counter(), []
    add, end, statistics = buffer.add, buffer.end, buffer.statistics
    buffer.add = lambda *inputs: count.update(steps=4) or add(*inputs)
    buffer.end = lambda ended, step: born.append(step - count["steps"]) or end(ended, step)
    trainer.pretrain([])
    present = [trainer.memory] if "present" in buffer.memory.__annotations__ else []
    assert_equal(list(trainer.memory), list(buffer.memory(trainer.agent.moa, trainer.co_players.episode, *present)))
    assert max(float(field.abs().max()) for field in trainer.memory if field.numel()) > 0.1
    buffer.statistics = lambda step: born.append(step - count["steps"] - 4) or statistics(step)
    assert 0 < float(trainer.iterate()["moa/buffer_age"]) < 640
    assert set(born) == {-4} and count["steps"] == 640


def test_pretraining_trains_the_vae_alone(script):
    """Steps besides the run's own; encoder and subgoals learn, the rest of the agent does not."""
    trainer = trainer_of(script, pretrain_moa_steps=350)
    before, played = copy.deepcopy(trainer.agent), []
    rollout = trainer.rollout
    trainer.rollout = lambda: played.append(1) or rollout()
    trainer.pretrain([])
    assert len(played) == 3 and trainer.pretrained == 480 and trainer.global_step == 0 and trainer.iteration == 0
    assert not trainer.log and len(trainer.buffer) > 0
    for name in ("actor", "critic"):
        assert torch.equal(networks(before)[name], networks(trainer.agent)[name])
    for name, changes in {"encoder": True, "step_feature": True, "subgoal": True, "decoder": False}.items():
        pairs = zip(getattr(before.moa, name).parameters(), getattr(trainer.agent.moa, name).parameters(), strict=True)
        assert all(torch.equal(a, b) != changes for a, b in pairs), name
    trainer.pretrain([])
    assert len(played) == 3  # once


def test_pretraining_that_is_too_short_is_told(script, capsys):
    """Where no match has ended there is nothing to learn from."""
    trainer_of(script, pretrain_moa_steps=160, num_steps=5, match_episodes=50).pretrain([])
    assert "--pretrain-moa-steps: no match has ended" in capsys.readouterr().err
    trainer_of(script, pretrain_moa_steps=350).pretrain([])
    assert not capsys.readouterr().err


def test_checkpoint_every(script, tmp_path, monkeypatch):
    saved, save = [], script.save_atomically
    monkeypatch.setattr(
        script,
        "save_atomically",
        lambda content, path: saved.append((path.name, copy.deepcopy(content))) or save(content, path),
    )
    train(script, tmp_path, checkpoint_every=2, total_timesteps=5 * 160)
    steps = [counters_of(content) for name, content in saved if name == "checkpoint.pt"]
    assert steps == [0, 320, 640, 800]  # at the start, every second iteration, at the end


def counters_of(content):
    """Game steps done, as a checkpoint knows them: by a run resumed from it."""
    found = []

    def look(node):
        if isinstance(node, dict):
            found.extend(int(v) for k, v in node.items() if k == "global_step")
            for value in node.values():
                look(value)

    look(content)
    assert len(found) == 1
    return found[0]


def test_torch_deterministic(script, tmp_path):
    try:
        train(script, tmp_path, torch_deterministic=False, total_timesteps=160)
        assert not torch.are_deterministic_algorithms_enabled()
        train(script, tmp_path, torch_deterministic=True, total_timesteps=160)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_tracking(script, tmp_path, monkeypatch):
    """W&B gets the project, the team, the run's name, its options and TensorBoard's figures."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **named: calls.append(named)))
    options = {"wandb_project_name": "project-x", "wandb_entity": "team-y", "total_timesteps": 160}
    metrics, _ = train(script, tmp_path, track=True, **options)
    (named,) = calls
    assert (named["project"], named["entity"], named["sync_tensorboard"]) == ("project-x", "team-y", True)
    assert named["name"] == Path(metrics["run"]).name and named["config"]["total_timesteps"] == 160
    train(script, tmp_path, **options)
    assert len(calls) == 1


def test_compiled_parts_give_the_same_run(script, tmp_path, monkeypatch):
    """Traced by torch.compile, and run by its debugging backend: the same weights as without."""
    real, compiled = torch.compile, []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **named: compiled.append(function) or real(function, **named | {"backend": "eager"}),
    )
    weights = []
    for switch in (False, True):
        metrics, _ = train(script, tmp_path, compile=switch, total_timesteps=160, num_envs=2)
        weights.append(networks(script.load_agent(metrics["run"])))
        assert bool(compiled) == switch
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ---------------------------------------------------------------------------------------------------------------------
VARIANTS = {
    "inferred": {},
    "oracle": {"goal": "oracle", "moa_buffer": "balanced", "plan_update": "hop"},
    "none": {"plan_update": "none", "goal": "none", "prosocial": 0.4},
    "pretrained": {"pretrain_moa_steps": 200, "moa_buffer": "positive", "anneal": True, "plan_until": 0.4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_unbroken_one(script, done, tmp_path, monkeypatch, variant):
    """Stopped by a signal in the middle of an iteration and resumed: to the bit the run that was never stopped."""
    options = VARIANTS[variant] | {"total_timesteps": 4 * 160, "checkpoint_every": 100}
    if variant == "none":  # with a co-player that has a memory of its own
        options |= {"co_players": f"self,{done.folder},random", "match_episodes": 50}
    unbroken, _ = train(script, tmp_path, **options)
    number = {"inferred": signal.SIGINT, "oracle": signal.SIGTERM}.get(variant, signal.SIGINT)
    rollout, count = script.Trainer.rollout, []

    def interrupted(self):
        count.append(1)
        if len(count) == (4 if variant == "pretrained" else 2):
            os.kill(os.getpid(), number)
        return rollout(self)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(script.Trainer, "rollout", interrupted)
        stopped, printed = train(script, tmp_path, **options)
    assert "stopped at step 320" in printed and counters_of(content_of(script, stopped["run"])) == 320
    assert signal.getsignal(number) is handler
    with contextlib.chdir(tmp_path):
        args = script.parse_arguments(["--resume", stopped["run"]])
    assert {**dataclasses.asdict(args), "resume": None} == content_of(script, unbroken["run"])["args"]
    time.sleep(1.0 - time.time() % 1.0)  # TensorBoard reads files in the order of their names, which begin with seconds
    resumed, printed = train(script, tmp_path, **{**dataclasses.asdict(args)})
    assert "done at step 640" in printed and resumed["run"] == stopped["run"] != unbroken["run"]
    a, b = content_of(script, unbroken["run"]), content_of(script, resumed["run"])
    a["args"], b["args"] = ({**content["args"], "resume": None} for content in (a, b))
    assert_equal(a, b)
    metrics = [{k: v for k, v in m.items() if k not in ("run", "charts/SPS")} for m in (unbroken, resumed)]
    assert metrics[0] == metrics[1]
    whole, parts = scalars(unbroken["run"]), scalars(resumed["run"])
    for name in set(whole) - {"charts/SPS"}:
        assert parts[name] == whole[name], name
    assert [step for step, _ in parts["charts/SPS"]] == [160, 320, 480, 640]


def test_a_finished_run_can_be_made_longer(script, tmp_path):
    """Options that are given again hold: here the length of the run, and the name of a switch."""
    options = {"total_timesteps": 320}
    short, _ = train(script, tmp_path, **options)
    long, _ = train(script, tmp_path, total_timesteps=640)
    args = script.parse_arguments(
        ["--resume", f"{short['run']}/checkpoint.pt", "--total-timesteps", "640", "--save-model"]
    )
    resumed, _ = train(script, tmp_path, **dataclasses.asdict(args))
    assert resumed["run"] == short["run"] and Path(resumed["run"], "model.pt").is_file()
    a, b = (networks(script.load_agent(run)) for run in (long["run"], resumed["run"]))
    assert_equal(a, b)
    for name, value in {"num_envs": 8, "learning_rate": 0.5, "env_id": "msh", "goal": "none", "seed": 2}.items():
        with pytest.raises(script.UsageError, match=f"--{name.replace('_', '-')}"):
            train(script, tmp_path, **{**dataclasses.asdict(args), name: value})


def test_a_planner_that_is_off_stays_off(script, tmp_path, monkeypatch):
    """Also where a longer run makes `--plan-until` lie ahead again; one that is on goes on."""
    modes, rollout = [], script.Trainer.rollout
    monkeypatch.setattr(script.Trainer, "rollout", lambda self: modes.append(self.agent.plan_mode) or rollout(self))
    short, _ = train(script, tmp_path, total_timesteps=480, plan_until=0.5)
    words = ["--resume", short["run"], "--total-timesteps", "1120"]
    train(script, tmp_path, **dataclasses.asdict(script.parse_arguments(words)))
    assert modes == ["offset"] * 2 + ["none"] * 5
    modes.clear()
    short, _ = train(script, tmp_path, total_timesteps=160, plan_until=0.5)
    words = ["--resume", short["run"], "--total-timesteps", "480"]
    train(script, tmp_path, **dataclasses.asdict(script.parse_arguments(words)))
    assert modes == ["offset"] * 2 + ["none"]


def test_a_failed_write_keeps_the_old_file(script, tmp_path, monkeypatch):
    path, save = tmp_path / "checkpoint.pt", torch.save
    script.save_atomically({"number": 1}, path)

    def failing(content, file, *rest):
        save(content, file, *rest)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError):
        script.save_atomically({"number": 2}, path)
    assert torch.load(path) == {"number": 1}
    monkeypatch.undo()
    script.save_atomically({"number": 3}, path)
    assert torch.load(path) == {"number": 3} and [p.name for p in tmp_path.iterdir() if p.suffix == ".pt"] == [
        path.name
    ]


def test_killed_runs_leave_a_checkpoint_to_go_on_from(script, tmp_path):
    """kill -9 at random moments of a run that writes all the time."""
    rng = random.Random(0)
    options = options_of(script, total_timesteps=10**6, match_episodes=40, num_envs=32, num_steps=4, update_epochs=1)
    words, steps = arguments(options), []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, script.__file__, *words],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        first = steps[-1] if steps else -1
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            runs = list(tmp_path.glob("runs/*/checkpoint.pt"))
            if runs and counters_of(content_of(script, runs[0])) > first:  # readable at any time, by the way
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.3))
        assert process.poll() is None
        process.kill()
        process.wait()
        (run,) = tmp_path.glob("runs/*")
        content = content_of(script, run)
        steps.append(counters_of(content))
        assert all(value.isfinite().all() for value in content["agent"].values())
        words = ["--resume", str(run)]
    assert 0 <= steps[0] < steps[1]
    total = steps[-1] + 128
    args = script.parse_arguments(["--resume", str(run), "--total-timesteps", str(total)])
    metrics, printed = train(script, tmp_path, **dataclasses.asdict(args))
    assert metrics["run"] == str(run) and f"done at step {total}" in printed


@pytest.mark.parametrize("function, metric", [("ppo_loss", "losses/"), ("moa_loss", "moa/nll")])
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch, capsys, function, metric):
    """In the third iteration: status 1, the metric's name, and the checkpoint of the second iteration."""
    whole, loss, begun = options_of(script, total_timesteps=10**5), getattr(script, function), []
    iterate = script.Trainer.iterate

    def poisoned(*inputs):
        value, terms = loss(*inputs)
        bad = math.nan if len(begun) == 3 else 1.0
        return value * bad, {name: term * bad if name in ("policy", metric) else term for name, term in terms.items()}

    monkeypatch.setattr(script, function, poisoned)
    monkeypatch.setattr(script.Trainer, "iterate", lambda self: begun.append(1) or iterate(self))
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments(whole)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert metric in line and "nan" in line and "480" in line
    (run,) = tmp_path.glob("runs/*")
    content = content_of(script, run)
    assert counters_of(content) == 320 and all(value.isfinite().all() for value in content["agent"].values())
    assert max(step for step, _ in scalars(run)["losses/policy"]) <= 480


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def test_evaluation_keys_and_sizes(script, done):
    result = script.evaluate(done.folder, "nh", episodes=10, num_envs=2, match_episodes=4)
    assert set(result) == {"focal_return", "focal_returns", "co_player_return", "by_episode"}
    assert len(result["focal_returns"]) == 10 and len(result["by_episode"]) == 4
    assert result["focal_return"] == pytest.approx(sum(result["focal_returns"]) / 10)
    assert isinstance(result["focal_return"], float) and isinstance(result["co_player_return"], float)
    assert all(isinstance(x, float) for x in result["focal_returns"] + result["by_episode"])
    whole = script.evaluate(done.folder, "nh", episodes=12, num_envs=2, match_episodes=4)
    assert whole["focal_returns"][:10] == result["focal_returns"]  # the same matches
    for k in range(4):
        assert whole["by_episode"][k] == pytest.approx(sum(whole["focal_returns"][k::4]) / 3)
    defaults = script.evaluate(done.folder, "nh")
    assert len(defaults["focal_returns"]) == 200 and len(defaults["by_episode"]) == 10


def test_evaluation_is_determined_by_its_seed(script, done):
    runs = [script.evaluate(done.folder, "random", episodes=30, match_episodes=3, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(99)
    assert script.evaluate(done.folder, "random", episodes=30, match_episodes=3) == runs[0]


def test_forms_of_co_players(script, done):
    """One for all, or N-1 of them; names, callables and checkpoints."""

    def same(*forms):
        results = [script.evaluate(done.folder, form, episodes=8, match_episodes=2) for form in forms]
        assert all(result == results[0] for result in results)
        return results[0]

    a = same("nh", "nh,nh", ["nh"], ["nh", "nh"], ("nh", "nh"), " nh , nh ")
    b = same("ns,nh", ["ns", "nh"])
    assert a != b
    same(str(done.folder), f"{done.folder},{done.folder}", [str(done.folder)] * 2)
    same(str(done.folder / "model.pt"), [str(done.folder / "model.pt")])

    def stay(observation, action_mask, clock, generator):
        return torch.full((len(observation),), 4)

    same(stay, [stay], [stay, stay])
    stay.remember = lambda: None  # a name that agents use as well
    same(stay)
    for wrong in (["nh"] * 3, "nh,nh,nh", [], ["nh", 3], "nobody", [stay, "cleaner"]):
        with pytest.raises(script.UsageError):
            script.evaluate(done.folder, wrong, episodes=2)


class Notebook:
    """Plays one action all the time, and notes what is asked of it."""

    action, calls, starts = 4, Counter(), []

    def start_match(self, which):
        Notebook.starts.append(which.clone())

    def __call__(self, observation, action_mask, clock, generator):
        Notebook.calls["steps"] += int((clock[:, 0] >= 0).sum())
        Notebook.calls["episodes"] += int((clock[:, 0] == 0).sum())
        Notebook.calls["batch", len(observation)] += 1
        return torch.full((len(observation),), type(self).action)


@pytest.fixture
def notebook():
    Notebook.calls, Notebook.starts = Counter(), []
    return lambda action: type("Notebook", (Notebook,), {"action": action})


def test_returns_are_counted_whatever_the_policy(script, done, notebook):
    """One cell and one stag: with a co-player that never hunts all episodes last 35 steps and bring nothing; with one
    that always does, hunters share, so both returns are the same, 0 or 5."""
    result = script.evaluate(
        done.folder, notebook(4), env_id="msh-1x1-2p-0h1s", episodes=12, num_envs=2, match_episodes=3
    )
    assert result["focal_returns"] == [0.0] * 12 and result["co_player_return"] == 0.0
    assert Notebook.calls["steps"] == 12 * 35 and Notebook.calls["episodes"] == 12
    assert [which.tolist() for which in Notebook.starts[::2]] == [[True, True]] * 2  # two batches of two matches
    assert Notebook.calls["batch", 2] == 6 * 35
    result = script.evaluate(done.folder, notebook(5), env_id="msh-1x1-2p-0h1s", episodes=20, match_episodes=2)
    assert set(result["focal_returns"]) <= {0.0, 5.0} and 5.0 in result["focal_returns"]
    assert result["co_player_return"] == pytest.approx(result["focal_return"])


def test_returns_of_a_drift_that_is_always_removed(script, tmp_path, notebook):
    """One cell, one drift, two players that always remove it and a focal one: 6 each, less a share of 4."""
    metrics, _ = train(script, tmp_path, env_id="msg-1x1-3p-1d", co_players="cleaner,exploiter", total_timesteps=160)
    result = script.evaluate(metrics["run"], notebook(5), episodes=30, match_episodes=3)
    for focal in result["focal_returns"]:
        assert focal in (pytest.approx(6.0), pytest.approx(6 - 4 / 3))
    helped = sum(focal < 5 for focal in result["focal_returns"]) / 30
    assert 0 < helped < 1
    assert result["co_player_return"] == pytest.approx(helped * (6 - 4 / 3) + (1 - helped) * 4)
    assert Notebook.calls["steps"] == 2 * 30  # one step an episode, for each of the two
    with pytest.raises(script.UsageError):
        script.evaluate(metrics["run"], "cleaner", env_id=ENV_ID)
    with pytest.raises(script.UsageError):
        script.evaluate(metrics["run"], "nh")


def test_the_focal_player_sits_on_every_seat(script, done, monkeypatch):
    """The one learned player of a match is dealt a seat at random."""
    seats, make = [], script.CoPlayers

    class Watched(make):
        def __init__(self, *inputs, **named):
            super().__init__(*inputs, **named)
            seats.append(self.learner.clone())

    monkeypatch.setattr(script, "CoPlayers", Watched)
    script.evaluate(done.folder, "nh", episodes=60, match_episodes=1, num_envs=60, env_id="msh-2x2-4p-2h1s")
    (learner,) = seats
    assert (learner.sum(1) == 1).all() and (learner.sum(0) >= 5).all()


def test_other_games_of_the_family(script, done):
    """No network depends on the size of the world or on the numbers of players and items."""
    for env_id, players in (("msh-5x2-2p-3h2s", 2), ("msh-4x4-5p-1h2s", 5)):
        result = script.evaluate(done.folder, ["nh"] * (players - 1), env_id=env_id, episodes=4, match_episodes=2)
        assert all(math.isfinite(x) for x in result["focal_returns"])
        same = script.evaluate(done.folder, "self", env_id=env_id, episodes=4, match_episodes=2)
        assert len(same["focal_returns"]) == 4


def test_evaluation_on_the_command_line(script, done, monkeypatch, capsys):
    """Prints what `evaluate` returns, on the game that the checkpoint was trained on."""
    words = ["--evaluate", str(done.folder), "--co-players", "nh,ns", "--eval-episodes", "9", "--match-episodes", "3"]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words, "--seed", "4", "--num-envs", "2"])
    script.main()
    printed = capsys.readouterr().out
    result = script.evaluate(done.folder, "nh,ns", episodes=9, num_envs=2, match_episodes=3, seed=4)
    assert f"{result['focal_return']:.3f}" in printed and f"{result['co_player_return']:.3f}" in printed
    assert " ".join(f"{value:.2f}" for value in result["by_episode"]) in printed and "9 episodes" in printed


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------
SHARES = ["gamma", "gae_lambda", "prosocial", "ent_floor", "plan_until"]
NOT_NEGATIVE = """seed ent_coef vf_coef moa_alpha subgoal_coef plan_beta pretrain_moa_steps""".split()
NOT_NEGATIVE += ["observation_coef", "reward_coef", "value_coef", "consistency_coef"]


def test_wrong_values(script):
    """Every number is checked, whole or not, and every choice."""
    checked = 0
    for field in dataclasses.fields(script.Args):
        kind, wrong = str(field.type), []
        if "Literal" in kind:
            wrong = ["maybe", ""]
        elif field.name in SHARES:
            wrong = [-0.01, 1.01, math.nan]
        elif field.name in NOT_NEGATIVE:
            wrong = [-1, math.nan, math.inf]
        elif "int" in kind or "float" in kind:
            wrong = [0, -1, math.nan, math.inf]
        for value in wrong:
            with pytest.raises(script.UsageError, match=f"--{field.name.replace('_', '-')}"):
                script.resolved(script.Args(**options_of(script, **{field.name: value})))
            checked += 1
        if field.name in SHARES:
            for value in (0.0, 1.0):
                script.resolved(script.Args(**options_of(script, **{field.name: value})))
    assert checked > 80


@pytest.fixture(scope="module")
def files(script, done, tmp_path_factory):
    """Paths that are no checkpoints of this script, by what is wrong with them."""
    folder, whole = tmp_path_factory.mktemp("files"), (done.folder / "checkpoint.pt").read_bytes()
    for name, data in {
        "half": whole[: len(whole) // 2],
        "garbage": b"\x80garbage" * 99,
        "empty": b"",
        "text": b"text\n",
    }.items():
        (folder / f"{name}.pt").write_bytes(data)
    content = content_of(script, done.folder)
    torch.save({**content, "script": "another_script"}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({**content, "script": 5}, folder / "number.pt")
    torch.save({"script": content["script"]}, folder / "bare.pt")
    torch.save({**content, "args": {**content["args"], "no_such_option": 1}}, folder / "newer.pt")
    torch.save({**content, "agent": {"x": torch.zeros(3)}}, folder / "weights.pt")
    (folder / "nothing").mkdir()
    names = ["half", "garbage", "empty", "text", "other", "list", "number", "bare", "newer", "weights"]
    return [folder / "no_such_file.pt", folder / "nothing", *(folder / f"{name}.pt" for name in names)]


def refused(script, monkeypatch, capsys, *words):
    """`main` says one line on standard error, ends with status 2 and writes nothing; returns the line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        script.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "", words
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n") and len(captured.err) > 30, captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


@pytest.mark.parametrize("option", ["--resume", "--load-moa", "--evaluate", "--co-players"])
def test_wrong_checkpoints(script, files, tmp_path, monkeypatch, capsys, recwarn, option):
    monkeypatch.chdir(tmp_path)
    for path in files:
        if option == "--load-moa" and path.name == "newer.pt":
            continue  # the MOA alone is read, and it fits
        line = refused(script, monkeypatch, capsys, *arguments({"env_id": ENV_ID}), option, str(path))
        assert path.name in line, (path, line)
    assert not recwarn.list  # on standard error a warning would be a second line


def test_checkpoints_of_other_runs(script, done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, base = str(done.folder), arguments({"env_id": ENV_ID})
    for words in (
        ["--resume", f"{run}/model.pt"],
        ["--resume", run, "--env-id", "msg"],
        ["--resume", run, "--num-envs", "5"],
        ["--load-moa", run, "--env-id", "msg"],
        [*base, "--load-moa", run, "--moa-hidden-size", "9"],
        [*base, "--load-moa", run, "--goal", "oracle"],
        ["--env-id", "msg", "--co-players", run],
        ["--evaluate", run, "--env-id", "msg", "--co-players", "cleaner"],
        ["--evaluate", run, "--co-players", "cleaner"],
        ["--evaluate", run, "--co-players", "nh,nh,nh"],
        ["--evaluate", run, "--eval-episodes", "0"],
    ):
        refused(script, monkeypatch, capsys, *words)


def test_options_that_an_evaluation_does_not_read(script, done, tmp_path, monkeypatch, capsys):
    """All of them are named, and those that it reads are not."""
    monkeypatch.chdir(tmp_path)
    read = ["env_id", "co_players", "match_episodes", "num_envs", "seed", *script.PLAYED]
    idle = {name: value for name, value in CHANGES.items() if value != getattr(script.Args(), name, value)}
    idle |= {"exp_name": "x", "torch_deterministic": False, "compile": True, "track": True, "save_model": True}
    idle |= {"wandb_project_name": "x", "wandb_entity": "x", "checkpoint_every": 9, "profile": True}
    idle |= {"resume": str(done.folder), "load_moa": str(done.folder), "collect": 9, "offline": "x"}
    idle = {name: value for name, value in idle.items() if name in fields_of(script) and name not in read}
    words = arguments({"evaluate": done.folder, "env_id": "msh-3x3-3p-3h1s", "num_envs": 3, "seed": 2})
    line = refused(script, monkeypatch, capsys, *words, *arguments(idle))
    assert set(re.findall(r"--([a-z-]+)", line)) == {"evaluate", *(name.replace("_", "-") for name in idle)}
    assert len(idle) > 40 and "capture-video" in refused(script, monkeypatch, capsys, *words, "--capture-video")
    line = refused(script, monkeypatch, capsys, *words, "--plan-update", "none", "--plan-beta", "7")
    assert "--plan-beta" in line and "--plan-update" not in line  # a planner that is off reads nothing


BAD_PLAYERS = """
import torch
def long(observation, action_mask, clock, generator):
    return torch.zeros(len(observation) + 1, dtype=torch.int64)
def real(observation, action_mask, clock, generator):
    return torch.zeros(len(observation))
def raises(observation, action_mask, clock, generator):
    raise KeyError("what it needs")
def takes_less(observation):
    return torch.zeros(len(observation), dtype=torch.int64)
class Waits:
    started = None
    def start_match(self, which):
        self.started = which.clone()
    def __call__(self, observation, action_mask, clock, generator):
        self.calls = getattr(self, "calls", 0) + 1
        noise = torch.rand(action_mask.shape, generator=generator) + torch.rand(action_mask.shape)
        return torch.where(self.started.any() & (clock[:, :1] + self.calls > 0), noise * action_mask, 0).argmax(1)
waits = Waits()
"""


def test_bad_callables_are_refused_before_anything_is_written(script, tmp_path, monkeypatch, capsys):
    """And good ones play as if nobody had asked them before."""
    (tmp_path / "work").mkdir()
    (tmp_path / "players_of_tests.py").write_text(BAD_PLAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "players_of_tests", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    for name, text in {"long": "[4]", "real": "integer", "raises": "what it needs", "takes_less": "argument"}.items():
        words = arguments(options_of(script, co_players=f"self,players_of_tests:{name}"))
        line = refused(script, monkeypatch, capsys, *words)
        assert text in line and f"players_of_tests:{name}" in line
    for name in ("Waits", "waits"):
        options = {"co_players": f"self,players_of_tests:{name}", "total_timesteps": 160}
        metrics, _ = train(script, tmp_path / "work", **options)
        alone = trainer_of(script, **options)
        alone.iterate()
        assert_equal(networks(script.load_agent(metrics["run"])), networks(alone.agent))
        assert all(one.calls == 40 for _, _, one in alone.co_players.objects)


@pytest.mark.parametrize(
    "words, fragment",
    [
        (["--no-such-option"], "no-such-option"),
        (["--no-such-option", "3"], "no-such-option"),
        (["stray"], "stray"),
        (["--num-envs"], "num-envs"),
        (["--num-envs", "four"], "num-envs"),
        (["--num-envs", "1.5"], "num-envs"),
        (["--learning-rate", "fast"], "learning-rate"),
        (["--learning-rate", "nan"], "learning-rate"),
        (["--gamma", "1.5"], "gamma"),
        (["--num-steps", "0"], "num-steps"),
        (["--goal", "maybe"], "goal"),
        (["--moa-buffer", "some"], "moa-buffer"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(10**30)], "seed"),
        (["--total-timesteps", "100", "--num-envs", "8", "--num-steps", "16"], "total-timesteps"),
        (["--exp-name", "a/b"], "exp-name"),
        (["--exp-name", ""], "exp-name"),
        (["--env-id", "chess"], "chess"),
        (["--env-id", "msh-4x"], "msh-4x"),
        (["--env-id", "msh-0x4"], "msh-0x4"),
        (["--env-id", "msg-2x2-5d"], "msg-2x2-5d"),
        (["--env-id", ""], "game"),
        (["--env-id", "msh-1p-0h1s"], "nothing can be earned in msh-8x8-1p-0h1s"),
        (["--co-players", "nobody"], "nobody"),
        (["--co-players", ""], "co-player"),
        (["--co-players", "ns,,nh"], "co-player"),
        (["--co-players", "cleaner"], "cleaner"),
        (["--co-players", "no_such_module:player"], "no_such_module"),
        (["--co-players", "json:nobody"], "nobody"),
        (["--co-players", "math:pi"], "math:pi"),
    ],
)
def test_wrong_command_lines(script, tmp_path, monkeypatch, capsys, words, fragment):
    monkeypatch.chdir(tmp_path)
    assert fragment in refused(script, monkeypatch, capsys, *words)


def test_cuda_without_a_device(script, done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert "cuda" in refused(script, monkeypatch, capsys, "--cuda")
    assert "cuda" in refused(script, monkeypatch, capsys, "--cuda", "--evaluate", str(done.folder))
    with pytest.raises(script.UsageError):
        script.evaluate(done.folder, "nh", device="cuda")


def test_refusals_and_help_as_processes(script, tmp_path):
    """What the shell sees: status, one line on standard error, nothing on standard output and nothing written."""
    cases = [["--no-such-option"], ["--resume", "nowhere"], ["--help"]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::SyntaxWarning", script.__file__, *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for words in cases
    ]
    for words, process in zip(cases, processes, strict=True):
        out, err = process.communicate(timeout=120)
        if words == ["--help"]:
            assert process.returncode == 0
            for name in fields_of(script):
                assert f"--{name.replace('_', '-')}" in out
        else:
            assert process.returncode == 2 and out == ""
            (line,) = err.splitlines()
            assert line.startswith(f"{script.__name__}.py: error: ") and words[-1].strip("-") in line
    assert not list(tmp_path.iterdir())

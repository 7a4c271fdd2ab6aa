"""Runs that stop, are killed, go on, and start from others."""

import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import HUNT, one_script, plans, small_args, trust
from run_tools import assert_equal, assert_same_run, broken_run, networks, run, scalars, weights_of

BASE = {  # four iterations
    **dict(env_id=HUNT, co_players="self,nh,ns-noisy", total_timesteps=256, checkpoint_every=100),
    **dict(plan_update="offset", plan_until=1.0, update_epochs=1, moa_updates=2),
}
VARIANTS = {  # options, and after which iteration the run dies
    "snapshots": (dict(co_players="self,test_checkpoints:drawing", snapshot_every=1), 3),
    "runs": (dict(checkpoint_every=1, match_episodes=50, prosocial=0.4), 3),
    "pretraining": (dict(pretrain_moa_steps=150, checkpoint_every=1, moa_capacity=100), 2),
    "oracle": (dict(goal="oracle", plan_update="hop", plan_until=0.6), 2),
    "init": (dict(checkpoint_every=1, moa_buffer="positive"), 2),
}
OWN = {"hop_onestep": {}, "hop_mcts": {}}  # options of the variant "runs"
OWN["hop_ppo_gumbel"] = dict(inter_om="count", assignment="exclusive", goal_training="em")
OWN["latent_world_model"] = dict(td_target="model", co_player_model="nh")


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """The folder of a finished run whose planner went off."""
    folder = tmp_path_factory.mktemp("done")
    return run(script, small(**{**BASE, "plan_until": 0.5}), folder=folder).path


@pytest.fixture(scope="module")
def foreign(sibling, tmp_path_factory):
    """The folder of a finished run of another script, whose planner is on, and trusted."""
    folder = tmp_path_factory.mktemp("foreign")
    return run(sibling, small_args(sibling, **{**BASE, "total_timesteps": 64}), trust, folder).path


def step_of(script, path):
    return script.load_checkpoint(path)["progress"][0]


@one_script
@pytest.mark.parametrize("every, seconds, third", [(2, 0.0, 128), (100, 25.0, 0)])
def test_when_checkpoints_are_written(script, small, monkeypatch, every, seconds, third):
    """At the start, after so many iterations or a minute since the last one, and at the end: the
    steps of the one that lies there at the end of each iteration, which takes so many seconds."""
    steps = []
    clock = [1e9]

    def watch(folder, **names):
        steps.append(step_of(script, folder))
        clock[0] += seconds

    monkeypatch.setattr(time, "time", lambda: clock[0])
    finished = run(script, small(**{**BASE, "checkpoint_every": every}), watch)
    steps.append(step_of(script, finished.path))
    assert steps == [0, 0, third, 192 if seconds else 128, 256]


@one_script
def test_failed_write_keeps_the_old_checkpoint(script, small, typed, tmp_path, monkeypatch):
    """And the run goes on from that one; nothing of the failed one is left then."""
    save = torch.save

    def failing(content, file):
        save(content, file)
        if content["progress"][0] == 128:
            raise OSError("no space left")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        run(script, small(**{**BASE, "checkpoint_every": 1}))
    monkeypatch.undo()
    (path,) = tmp_path.glob("runs/*")
    assert step_of(script, path) == 64
    run(script, typed(resume=path))
    assert step_of(script, path) == 256
    assert {*path.glob("*.pt")} | {*path.glob(".*.pt")} == {path / "checkpoint.pt"}


def drawing(observation, action_mask, clock, generator):
    """A co-player that draws from its generator and from torch's global one."""
    noise = torch.rand(action_mask.shape, generator=generator) + torch.rand(action_mask.shape)
    return (noise * action_mask).argmax(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_an_unbroken_one(script, small, typed, done, foreign, tmp_path, variant):
    """To the bit, whatever its last checkpoint was, also where it was moved to, and without the run
    that it began from; figures do not stand twice in TensorBoard."""
    options, iteration = VARIANTS[variant]
    donor = shutil.copy(done / "checkpoint.pt", tmp_path / "donor.pt")
    if variant == "runs":
        options = {**OWN[script.SCRIPT], **options, "co_players": f"self,{done},{foreign.parent}"}
    begins = {"init": {"init": donor}, "pretraining": {"load_moa": donor}}.get(variant, {})
    args = typed(**vars(small(**BASE | options | begins)))
    unbroken = run(script, args)
    path = broken_run(script, args, iteration).rename(tmp_path / "moved")
    donor.unlink()
    assert script.load_checkpoint(path)["progress"][1] < iteration
    time.sleep(1.0 - time.time() % 1.0)  # names of TensorBoard's files have whole seconds
    assert run(script, typed(resume=path)).path == path
    assert_same_run(script, unbroken.path, path)
    whole, parts = scalars(unbroken.path), scalars(path)
    assert list(parts.pop("charts/SPS")) == list(whole.pop("charts/SPS")) == [64, 128, 192, 256]
    if variant != "snapshots":  # whose names are paths
        assert parts == whole


@one_script
def test_finished_run_can_be_made_longer(script, small, typed):
    """From its folder, or a copy of an earlier checkpoint in it; a planner that is off stays off,
    also where `--plan-until` lies ahead again."""
    modes = []

    def watch(agent, **names):
        modes.append(agent.plan_mode)

    options = {**BASE, "anneal": False, "plan_until": 0.5}
    short = run(script, small(**{**options, "total_timesteps": 128}), watch)
    shutil.copy(short.path / "checkpoint.pt", short.path / "early.pt")
    weights = []
    for file in ("", "early.pt"):
        run(script, typed(resume=short.path / file, total_timesteps=512), watch)
        assert step_of(script, short.path) == 512
        weights.append(weights_of(script, short.path))
    assert_equal(*weights)
    assert modes == ["offset"] + ["none"] * 13


@one_script
def test_run_of_a_gpu_goes_on_without_one_in_a_thread(script, done, typed, tmp_path):
    """With a fresh generator, as states differ by device. A thread cannot handle signals."""
    content = script.load_checkpoint(done)
    content["args"]["cuda"] = True
    content["generator"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(content, tmp_path / "checkpoint.pt")
    args = typed(f"--resume {tmp_path} --no-cuda --total-timesteps 320")
    thread = threading.Thread(target=run, args=(script, args))
    thread.start()
    thread.join()
    assert step_of(script, tmp_path) == 320


def test_init_goes_on_learning_within_one_match(script, done, typed, tmp_path):
    """With weights and options of the other run and fresh optimisers. What makes it one long match,
    and what the other run began with, is new, but for what is given. The MOA changes before any
    match or episode has ended, and a planner is on."""
    before = script.load_checkpoint(done)
    began = dict(load_moa="gone", pretrain_moa_steps=64, resume="gone")
    stored = before["args"] = {**before["args"], **began, "gamma": 0.8}
    donor = tmp_path / "donor.pt"
    torch.save(before, donor)
    given = dict(init=str(donor), num_steps=2, total_timesteps=2, co_players="nh")
    args = typed(**given)
    new = {name: value for name, value in script.INIT.items() if name in stored}
    assert vars(args) == {**stored, **new, **given}
    assert not any(getattr(args, name) for name in began)
    assert args.num_envs == 1 and args.match_episodes > 1000 and not args.anneal

    def watch(agent, buffer, folder, **names):
        assert int(buffer.episode_start) == 0
        assert not plans(script) or agent.plan_mode != "none"
        content = script.load_checkpoint(folder)
        if script.SCRIPT == "hop_mcts":
            before["agent"]["plan_slope"].fill_(1.0)  # of a search that is exact
        assert_equal(content["agent"], before["agent"])
        assert before["optimizer"]["state"] and not content["optimizer"]["state"]
        assert content["progress"][:2] == [0, 0] and content["buffer"][0] == 0
        for name, weights in networks(before["agent"]).items():
            assert 0.0 < (networks(agent)[name] - weights).abs().max() < 0.2, name

    run(script, args, watch)


@one_script
def test_snapshots_join_the_co_players(script, small):
    """The learner as it was then, without a planner, in the matches that begin later."""
    weights = []
    kinds = []

    def watch(iteration, agent, co_players, **others):
        trust(agent)
        weights.append(networks(agent))
        kinds.append(set(co_players.kind.flatten().tolist()))
        joined = [k for k in (2, 4, 6) if k <= iteration]
        assert len(co_players.names) == 2 + len(joined)
        assert co_players.pool.tolist() == [*range(1, 2 + len(joined))]
        for kind, k in enumerate(joined, 2):
            snapshot = co_players.agents[kind].agent
            assert_equal(networks(snapshot), weights[k - 1])
            assert snapshot.plan_mode == "none"

    options = dict(co_players="nh", snapshot_every=2, match_episodes=1, horizon=8)
    finished = run(script, small(**BASE | options | {"total_timesteps": 384}), watch)
    assert kinds[1] == {0, 1} and 2 in kinds[3] and {2, 3} <= kinds[5] and 4 not in kinds[5]
    snapshot = finished.path / "snapshot_2.pt"
    assert len(script.evaluate(snapshot, str(snapshot), episodes=2)["focal_returns"]) == 2


@one_script
def test_a_folder_of_runs_stands_for_all_of_them(script, small, typed, done, foreign, tmp_path):
    """Beside other co-players, each as if it had been named; a run's own folder is one. Who comes
    later is not in the running run, also when that goes on."""
    folder = tmp_path / "pool"
    runs = [shutil.copytree(foreign, f"{folder}/a"), shutil.copytree(done, f"{folder}/b")]
    pool = f"nh,{folder},self,{folder}/b"
    args = small(env_id=HUNT, co_players=pool, num_steps=4, total_timesteps=32)

    def watch(co_players, pool, iteration, **names):
        assert pool == ["nh", *runs, "self", f"{folder}/b"]
        assert co_players.names == ["self", "nh", *runs]
        assert co_players.pool.tolist() == [1, 2, 3, 0, 3]
        assert_equal(networks(co_players.agents[2].agent), weights_of(script, foreign))
        if iteration == 1:
            shutil.copytree(done, folder / "c", dirs_exist_ok=True)

    finished = run(script, args, watch)
    run(script, typed(resume=finished.path, total_timesteps=48), watch)


@one_script
@pytest.mark.parametrize("signals, status", [("INT", 130), ("TERM", 143), ("TERM TERM", 130)])
def test_signals_end_a_run(script, small, command, monkeypatch, signals, status):
    """After the iteration, with a checkpoint, or at once at the second one; the exit status is the
    shell's, and the caller's handlers are back."""
    train = script.train

    def watch(iteration, **names):
        assert iteration <= 2
        for name in signals.split() if iteration == 2 else ():
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])

    monkeypatch.setattr(script, "train", lambda args: train(args, watch))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    got, _, error = command(**vars(small(**BASE)))
    assert got == status and "ends after this iteration" in error and "Traceback" not in error
    (path,) = Path("runs").iterdir()
    assert step_of(script, path) == (0 if " " in signals else 128)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@one_script
@pytest.mark.parametrize("function, steps", [("ppo_loss", 0), ("moa_loss", 0), ("moa_loss", 256)])
def test_loss_that_is_not_finite(script, small, command, monkeypatch, function, steps):
    """It stops the run in the third iteration, pretraining (for so many steps) or not, by the
    metric's name and with status 1; the checkpoint of the second is kept."""
    loss_of = getattr(script, function)
    metric, good = {"ppo_loss": ("losses", 2), "moa_loss": ("moa", 4)}[function]
    calls = []

    def poisoned(*inputs):
        loss, terms = loss_of(*inputs)
        calls.append(loss)
        factor = 1.0 if len(calls) <= good else math.nan
        return loss * factor, {name: term * factor for name, term in terms.items()}

    monkeypatch.setattr(script, function, poisoned)
    options = {"checkpoint_every": 1, "num_minibatches": 1, "pretrain_moa_steps": steps}
    status, _, error = command(**vars(small(**BASE | options)))
    assert status == 1 and re.search(f"{metric}/.* is nan at step 192", error)
    (path,) = Path("runs").iterdir()
    assert step_of(script, path) == 128
    assert all(value.isfinite().all() for value in weights_of(script, path).values())
    assert all(math.isfinite(x) for series in scalars(path).values() for x in series.values())

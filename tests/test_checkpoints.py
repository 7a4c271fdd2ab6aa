"""Runs that stop, are killed, go on, and start from others."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from conftest import copied_script, plans, small_args
from run_tools import (
    arguments,
    assert_equal,
    assert_same_run,
    broken_run,
    main,
    networks,
    parsed,
    run,
    scalars,
    trust,
    weights_of,
)

ENV_ID = "msh-3x3-3p-2h1s"
BASE = {  # four iterations
    "env_id": ENV_ID,
    "co_players": "self,nh,ns-noisy",
    "total_timesteps": 256,
    "plan_update": "offset",
    "plan_until": 1.0,
    "update_epochs": 1,
    "moa_updates": 2,
    "checkpoint_every": 100,
}
PLAYERS = """
import torch


def both(observation, action_mask, clock, generator):
    noise = torch.rand(action_mask.shape, generator=generator) + torch.rand(action_mask.shape)
    return (noise * action_mask).argmax(1)
"""


@pytest.fixture
def players(tmp_path, monkeypatch):
    """Name of a co-player that draws from its generator and from torch's global one."""
    (tmp_path / "players_of_a_user.py").write_text(PLAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "players_of_a_user:both"
    sys.modules.pop("players_of_a_user", None)


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """The folder of a finished run whose planner went off."""
    folder = tmp_path_factory.mktemp("done")
    return run(script, small(**{**BASE, "plan_until": 0.5}), folder).path


@pytest.fixture(scope="module")
def foreign(sibling, tmp_path_factory):
    """The folder of a finished run of another script, whose planner is on, and trusted."""
    folder = tmp_path_factory.mktemp("foreign")
    return run(sibling, small_args(sibling, **{**BASE, "total_timesteps": 64}), folder, trust).path


def step_of(script, path):
    return script.load_checkpoint(path)["progress"][0]


def next_second():
    """TensorBoard reads files in the order of their names, which begin with whole seconds."""
    time.sleep(1.0 - time.time() % 1.0)


# ------------------------------------------------------------------------------------------------
# When checkpoints are written
# ------------------------------------------------------------------------------------------------
def steps_of_checkpoints(script, small, folder, seconds=0.0, **options):
    """Steps of the checkpoint that lies there at the end of each iteration, and of the last one.
    The clock goes `seconds` on in each iteration."""
    steps = []
    clock = [1e9]

    def watch(**names):
        steps.append(step_of(script, names["folder"]))
        clock[0] += seconds

    fake = types.SimpleNamespace(**{**vars(time), "time": lambda: clock[0]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "time", fake)
        finished = run(script, small(**{**BASE, **options}), folder, watch)
    return [*steps, step_of(script, finished.path)]


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_checkpoints_by_iterations(script, small, tmp_path):
    """One from step 0, then every so many iterations, and one at the end."""
    steps = steps_of_checkpoints(script, small, tmp_path, checkpoint_every=2, total_timesteps=320)
    assert steps == [0, 0, 128, 128, 256, 320]


@pytest.mark.only("hop_onestep")
def test_checkpoints_by_time(script, small, tmp_path):
    """One as soon as a minute has passed since the last one."""
    assert steps_of_checkpoints(script, small, tmp_path, seconds=25.0) == [0, 0, 0, 192, 256]


def test_failed_write_keeps_the_old_checkpoint(script, small, tmp_path, monkeypatch):
    """And the run goes on from that one; nothing of the failed one is left then."""
    save = torch.save
    args = small(**{**BASE, "checkpoint_every": 1})
    unbroken = run(script, args, tmp_path)
    written = []

    def failing(content, file, *rest):
        save(content, file, *rest)
        written.append(content["progress"][0])
        if len(written) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        run(script, args, tmp_path)
    monkeypatch.undo()
    assert written == [0, 64, 128]
    (path,) = set(tmp_path.glob("runs/*")) - {unbroken.path}
    assert step_of(script, path) == 64
    run(script, parsed(script, tmp_path, "--resume", path), tmp_path)
    assert [file.name for file in path.glob("*.pt")] == ["checkpoint.pt"]
    assert not list(path.glob(".*.pt*"))
    assert_same_run(script, unbroken.path, path)


# ------------------------------------------------------------------------------------------------
# Going on
# ------------------------------------------------------------------------------------------------
VARIANTS = {  # options, and after which iteration the run dies
    "callable": ({"checkpoint_every": 2, "match_episodes": 1}, 3),
    "from step 0": ({}, 2),
    "in pretraining": ({"pretrain_moa_steps": 150, "checkpoint_every": 1}, 2),
    "checkpoint": ({"checkpoint_every": 1, "match_episodes": 50, "goal": "none"}, 3),
    "init": ({"checkpoint_every": 1}, 3),
    "oracle": (
        {"goal": "oracle", "plan_update": "hop", "checkpoint_every": 2, "plan_until": 0.6},
        3,
    ),
    "sibling": ({"checkpoint_every": 1, "match_episodes": 50}, 3),
    "snapshots": (
        {"co_players": "self", "snapshot_every": 1, "match_episodes": 2, "checkpoint_every": 3},
        4,
    ),
    "own": ({"prosocial": 0.4, "checkpoint_every": 2}, 3),
    "plain": (
        {
            "plan_update": "none",
            "prosocial": 0.4,
            "moa_buffer": "positive",
            "moa_capacity": 100,
            "checkpoint_every": 2,
        },
        4,
    ),
}
OWN_OPTIONS = {  # of the variant "own"
    "hop_ppo_gumbel": {
        "goal_training": "em",
        "inter_om": "count",
        "inter_om_alpha": 0.5,
        "assignment": "exclusive",
        "pg": True,
    },
    "latent_world_model": {"td_target": "model", "co_player_model": "nh"},
}


def by_last_name(figures):
    """Figures by name, those of co-players without the folders in their paths."""
    return {re.sub("(?<=^returns/).*/", "", name): value for name, value in figures.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_an_unbroken_one(
    script, small, done, foreign, players, tmp_path, variant
):
    """To the bit, whatever its last checkpoint was; figures do not stand twice in TensorBoard."""
    options, iteration = VARIANTS[variant]
    if variant == "callable":
        options = {**options, "co_players": f"self,{players}"}
    if variant == "checkpoint":
        options = {**options, "co_players": f"self,{done},random"}
    if variant == "own":
        options = {**options, **OWN_OPTIONS.get(script.SCRIPT, {})}
    if variant == "sibling":
        options = {**options, "co_players": f"self,{foreign.parent}"}  # the runs in a folder
    if variant == "init":
        options = {**options, "init": str(done)}
    args = small(**{**BASE, **options})
    unbroken = run(script, args, tmp_path)
    path = broken_run(script, args, tmp_path, iteration)
    assert script.load_checkpoint(path)["progress"][1] < iteration
    next_second()
    resumed = run(script, parsed(script, tmp_path, "--resume", path), tmp_path)
    assert resumed.path == path != unbroken.path
    assert "done at step 256" in resumed.printed
    assert_same_run(script, unbroken.path, path)
    metrics = by_last_name(resumed.metrics)
    for name, value in by_last_name(unbroken.metrics).items():
        assert name == "charts/SPS" or value == metrics[name], name
    whole = by_last_name(scalars(unbroken.path))
    parts = by_last_name(scalars(path))
    assert set(whole) == set(parts)
    for name in set(whole) - {"charts/SPS"}:
        assert parts[name] == whole[name], name
    assert [step for step, _ in parts["charts/SPS"]] == [64, 128, 192, 256]


def test_killed_run_goes_on(script, small, tmp_path):
    """To the bit, as if it had not been; while the process lives, its run is its own."""
    base = {**BASE, "anneal": False, "checkpoint_every": 1, "snapshot_every": 2}
    options = dataclasses.asdict(small(**{**base, "total_timesteps": 10**7}))
    options = {name: value for name, value in options.items() if value is not None}
    process = subprocess.Popen(
        [sys.executable, copied_script(script, tmp_path), *arguments(**options)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        (path,) = tmp_path.glob("runs/*")
        while step_of(script, path) < 192 and time.monotonic() < deadline:
            time.sleep(0.05)
        before = {file.name for file in path.iterdir()}
        args = parsed(script, tmp_path, "--resume", path)
        with pytest.raises(script.UsageError) as refusal:
            run(script, args, tmp_path)
        assert "\n" not in str(refusal.value) and path.name in str(refusal.value)
        after = {file.name for file in path.iterdir() if "snapshot" not in file.name}
        assert after <= before | {".checkpoint.pt"}
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    content = json.loads((path / "args.json").read_text())
    steps = step_of(script, path) + 128
    assert steps >= 320
    resumed = run(script, dataclasses.replace(args, total_timesteps=steps), tmp_path)
    assert resumed.path == path
    assert json.loads((path / "args.json").read_text()) == content
    unbroken = run(script, small(**{**base, "total_timesteps": steps}), tmp_path)
    assert_same_run(script, unbroken.path, path)


def test_second_process_on_a_run_is_refused(script, small, tmp_path):
    """Before it writes anything; and the first goes on as if nothing had happened."""
    refusals = []

    def watch(**names):
        path = Path(names["folder"]).absolute()
        args = dataclasses.replace(names["args"], resume=str(path))
        with pytest.raises(script.UsageError) as refusal:
            script.train(args)
        refusals.append(str(refusal.value))

    finished = run(script, small(**BASE), tmp_path, watch)
    assert len(refusals) == 4
    for line in refusals:
        assert "\n" not in line and finished.path.name in line
    steps = [step for step, _ in scalars(finished.path)["losses/policy"]]
    assert steps == [64, 128, 192, 256]


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_finished_run_can_be_made_longer(script, small, tmp_path):
    """From its folder, its checkpoint or a copy of an earlier one in its folder."""
    options = {**BASE, "anneal": False}
    short = run(script, small(**{**options, "total_timesteps": 128}), tmp_path)
    long = run(script, small(**options), tmp_path)
    written = (short.path / "args.json").read_bytes()
    shutil.copy(short.path / "checkpoint.pt", short.path / "early.pt")
    for file in ("", "checkpoint.pt", "early.pt"):
        next_second()
        if file == "checkpoint.pt":
            shutil.copy(short.path / "early.pt", short.path / "checkpoint.pt")
        words = ["--resume", short.path / file, "--total-timesteps", 256]
        resumed = run(script, parsed(script, tmp_path, *words), tmp_path)
        assert resumed.path == short.path
        assert_same_run(script, long.path, short.path)
        assert (short.path / "args.json").read_bytes() == written
        for name, series in scalars(short.path).items():
            if name != "charts/SPS":
                assert series == scalars(long.path)[name], (file, name)


def test_options_of_a_resumed_run_are_its_own(script, small, done, tmp_path):
    """Those that would make another run of it are refused by name."""
    args = parsed(script, tmp_path, "--resume", done)
    stored = script.load_checkpoint(done)["args"]
    assert dataclasses.asdict(args) == {**stored, "resume": str(done)}
    others = {
        "num_envs": 8,
        "learning_rate": 0.5,
        "env_id": "msh",
        "goal": "none",
        "seed": 2,
        "match_episodes": 3,
        "moa_capacity": 5000,
    }
    for name, value in others.items():
        assert name not in script.FREE
        with pytest.raises(script.UsageError, match=f"--{name.replace('_', '-')}"):
            run(script, dataclasses.replace(args, **{name: value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_run_of_a_gpu_goes_on_without_one(script, small, done, tmp_path):
    """The generator of another device has another state; the run goes on with a fresh one."""
    assert "cuda" in script.FREE
    path = tmp_path / "runs" / "elsewhere"
    path.mkdir(parents=True)
    content = script.load_checkpoint(done)
    content["args"] = {**content["args"], "cuda": True}
    content["generator"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(content, path / "checkpoint.pt")
    words = ["--resume", path, "--no-cuda", "--total-timesteps", 320]
    resumed = run(script, parsed(script, tmp_path, *words), tmp_path)
    assert "done at step 320" in resumed.printed
    assert not torch.equal(weights_of(script, done)["actor"], weights_of(script, path)["actor"])


@pytest.mark.parametrize("freeze", [False, True])
def test_run_that_took_a_moa_is_resumed_without_it(script, small, done, tmp_path, freeze):
    donor = tmp_path / "donor.pt"
    shutil.copy(done / "checkpoint.pt", donor)
    moa = weights_of(script, done)["moa"]
    args = small(**{**BASE, "checkpoint_every": 2}, load_moa=str(donor), freeze_moa=freeze)
    unbroken = run(script, args, tmp_path)
    path = broken_run(script, args, tmp_path, 3)
    donor.unlink()
    run(script, parsed(script, tmp_path, "--resume", path), tmp_path)
    assert_same_run(script, unbroken.path, path)
    assert torch.equal(weights_of(script, path)["moa"], moa) == freeze


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_planner_that_is_off_stays_off(script, small, tmp_path):
    """Also where a longer run makes `--plan-until` lie ahead again; one that is on goes on."""
    modes = []

    def watch(**names):
        modes.append(names["agent"].plan_mode)

    for steps, on in ((256, 2), (64, 4)):
        expected = ["offset"] * on + ["none"] * (8 - on)
        modes.clear()
        options = {**BASE, "plan_until": 0.5, "total_timesteps": steps}
        short = run(script, small(**options), tmp_path, watch)
        words = ["--resume", short.path, "--total-timesteps", 512]
        run(script, parsed(script, tmp_path, *words), tmp_path, watch)
        assert modes == expected


# ------------------------------------------------------------------------------------------------
# Starting from another run
# ------------------------------------------------------------------------------------------------
def test_init_takes_weights_and_options_and_fresh_optimisers(script, done, tmp_path):
    """Game, goals and sizes stay; what makes it one long match, and what the other run began with,
    is new, but for what is given."""
    donor = tmp_path / "donor.pt"
    before = script.load_checkpoint(done)
    began = {"load_moa": "gone", "pretrain_moa_steps": 64, "resume": "gone"}
    stored = before["args"] = {**before["args"], **began, "gamma": 0.8, "seed": 7}
    torch.save(before, donor)
    new = {name: value for name, value in script.INIT.items() if name in stored}
    expected = {**stored, **new, "init": str(donor)}
    args = parsed(script, tmp_path, "--init", donor)
    assert dataclasses.asdict(args) == expected
    for name in ("env_id", "co_players", "gamma", "goal", "goal_size", "hidden_size", "seed"):
        assert getattr(args, name) == stored[name], name
    for name in began:
        assert not getattr(args, name), name
    assert args.num_envs == 1 and not args.anneal
    assert args.match_episodes >= args.total_timesteps >= 10 * args.num_steps
    typed = {"num_envs": 2, "learning_rate": 0.5, "anneal": True, "snapshot_every": 3, "gamma": 0.7}
    typed |= {"plan_update": "none", "plan_until": 0.2} if plans(script) else {}
    args = parsed(script, tmp_path, *arguments(init=donor, **typed))
    assert dataclasses.asdict(args) == {**expected, **typed}
    args = parsed(script, tmp_path, "--init", donor, "--num-steps", 2, "--total-timesteps", 4)
    content = script.load_checkpoint(broken_run(script, args, tmp_path, 1))
    if script.SCRIPT == "hop_mcts":
        before["agent"]["plan_slope"].fill_(1.0)  # of a search that is exact
    assert_equal(content["agent"], before["agent"])
    assert content["progress"][0] == content["progress"][1] == content["buffer"][0] == 0
    assert before["optimizer"]["state"] and before["buffer"][0] > 0
    assert content["optimizer"]["state"] == {}
    if plans(script):
        assert before["played"]["plan_update"] == "none" != content["played"]["plan_update"]
        assert content["agent"]["plan_slope"] != 0.0


def test_init_learns_within_the_running_match(script, done, tmp_path):
    """The MOA changes before any match or episode has ended, and a planner is on."""
    seen = []

    def watch(**names):
        weights = networks(names["agent"])
        ended = int(names["buffer"].episode_start)
        planned = not plans(script) or names["agent"].plan_mode != "none"
        seen.append((weights, ended, names["metrics"], planned))

    words = ["--init", done, "--co-players", "nh", "--num-steps", 2, "--total-timesteps", 4]
    run(script, parsed(script, tmp_path, *words), tmp_path, watch)
    before = weights_of(script, done)
    weights, ended, metrics, planned = seen[0]
    assert ended == 0 and planned
    assert "charts/episodic_length" not in metrics
    for name in before:
        assert not torch.equal(before[name], weights[name]), name
        change = (before[name] - weights[name]).abs().max()
        assert 0.0 < change < 0.2, name


# ------------------------------------------------------------------------------------------------
# Co-players that are runs
# ------------------------------------------------------------------------------------------------
def test_snapshots_join_the_co_players(script, small, done, tmp_path):
    """The learner as it was then, without a planner, in the matches that begin later."""
    weights = {}
    kinds = {}

    def watch(iteration, agent, co_players, **others):
        trust(agent)
        weights[iteration] = {name: value.clone() for name, value in agent.state_dict().items()}
        kinds[iteration] = set(co_players.kind.flatten().tolist())
        joined = [k for k in (2, 4, 6) if k <= iteration]
        assert [Path(name).name for name in co_players.names[2:]] == [
            f"snapshot_{k}.pt" for k in joined
        ]
        assert co_players.pool.tolist() == [1, *range(2, 2 + len(joined))]
        for kind, k in enumerate(joined, 2):
            snapshot = co_players.agents[kind].agent
            for name in set(weights[k]) - {"plan_slope"}:
                assert torch.equal(snapshot.state_dict()[name], weights[k][name]), (k, name)
            assert not plans(script) or snapshot.plan_mode == "none"

    options = {"co_players": "nh", "snapshot_every": 2, "match_episodes": 1, "horizon": 8}
    finished = run(script, small(**{**BASE, **options, "total_timesteps": 384}), tmp_path, watch)
    assert kinds[2] == {0, 1} and 2 in kinds[4] and {2, 3} <= kinds[6] and 4 not in kinds[6]
    actors = [weights[k]["actor.out.weight"] for k in (2, 4, 6)]
    assert not torch.equal(actors[0], actors[1]) and not torch.equal(actors[1], actors[2])
    assert len(list(finished.path.glob("*.pt"))) == 4
    assert not list(done.glob("snapshot*"))  # without the option
    args = parsed(script, tmp_path, "--evaluate", finished.path / "snapshot_2.pt")
    result = script.evaluate(args.evaluate, f"{finished.path}/snapshot_4.pt", episodes=2)
    assert len(result["focal_returns"]) == 2


@pytest.mark.only("hop_onestep")
def test_a_folder_of_runs_stands_for_all_of_them(script, done, foreign, tmp_path):
    """Beside other co-players, each as if it had been named; a run's own folder is one."""
    folder = tmp_path / "pool"
    runs = {f"{folder}/a": foreign, f"{folder}/b": done}
    for path, source in runs.items():
        shutil.copytree(source, path)
    (folder / "plots").mkdir()
    entries = ["nh", *runs, "self", f"{folder}/b"]
    options = {"env_id": ENV_ID, "num_envs": 2, "num_steps": 4, "total_timesteps": 16}
    pool = f"nh,{folder},self,{folder}/b"

    def watch(co_players, pool, iteration, **names):
        assert pool == entries
        assert co_players.names == ["self", "nh", *runs]
        assert co_players.pool.tolist() == [1, 2, 3, 0, 3]
        for k, source in zip((2, 3), runs.values(), strict=True):
            assert_equal(networks(co_players.agents[k].agent), weights_of(script, source))
        if iteration == 1:  # who comes later is not in the running run
            shutil.copytree(done, folder / "c")
            raise KeyboardInterrupt

    args = script.Args(**options, co_players=pool, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(script, args, tmp_path, watch)
    (path,) = (tmp_path / "runs").iterdir()
    run(script, parsed(script, tmp_path, "--resume", path), tmp_path, watch_again(entries))
    with pytest.raises(script.UsageError):
        script.evaluate(done, str(folder))


def watch_again(entries):
    def watch(pool, **names):
        assert pool == entries

    return watch


# ------------------------------------------------------------------------------------------------
# Ending early
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_with_a_checkpoint(
    script, small, tmp_path, monkeypatch, capsys, number, status
):
    """After the iteration; the exit status is the shell's, and the caller's handlers are back."""
    train = script.train
    iterations = []

    def watch(**names):
        iterations.append(names["iteration"])
        if names["iteration"] == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script, "train", lambda args: train(args, watch))
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    options = dataclasses.asdict(small(**BASE))
    options = {name: value for name, value in options.items() if value is not None}
    got, out, error = main(script, monkeypatch, capsys, *arguments(**options))
    assert got == status
    assert iterations == [1, 2]
    assert "ends after this iteration" in error and "Traceback" not in error
    assert "stopped at step 128" in out
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    (path,) = tmp_path.glob("runs/*")
    assert step_of(script, path) == 128
    assert [step for step, _ in scalars(path)["losses/policy"]] == [64, 128]


def test_second_signal_ends_at_once(script, small, tmp_path):
    """Where one iteration takes long."""
    iterations = []

    def watch(**names):
        iterations.append(names["iteration"])
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        iterations.append("not here")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(script, small(**BASE), tmp_path, watch)
    assert iterations == [1]
    assert signal.getsignal(signal.SIGINT) is handler
    (path,) = tmp_path.glob("runs/*")
    assert step_of(script, path) == 0


@pytest.mark.only("hop_onestep")
def test_runs_in_a_thread(script, small, tmp_path, monkeypatch):
    """Where signals cannot be handled."""
    monkeypatch.chdir(tmp_path)
    results = []
    args = small(**{**BASE, "total_timesteps": 64})
    thread = threading.Thread(target=lambda: results.append(script.train(args)))
    thread.start()
    thread.join()
    assert step_of(script, results[0]["run"]) == 64


@pytest.mark.parametrize(
    "function, metric", [("ppo_loss", "losses/policy"), ("moa_loss", "moa/nll")]
)
def test_loss_that_is_not_finite_stops_the_run(
    script, small, tmp_path, monkeypatch, capsys, function, metric
):
    """In the third iteration: status 1, the metric's name, and the checkpoint of the second."""
    loss_of = getattr(script, function)
    train = script.train
    iterations = []

    def poisoned(*inputs):
        loss, terms = loss_of(*inputs)
        if len(iterations) < 2:
            return loss, terms
        return loss * math.nan, {**terms, metric: terms[metric] * math.nan}

    monkeypatch.setattr(script, function, poisoned)
    monkeypatch.setattr(
        script, "train", lambda args: train(args, lambda **names: iterations.append(1))
    )
    monkeypatch.chdir(tmp_path)
    options = dataclasses.asdict(small(**{**BASE, "checkpoint_every": 1, "num_minibatches": 1}))
    options = {name: value for name, value in options.items() if value is not None}
    status, _, error = main(script, monkeypatch, capsys, *arguments(**options))
    assert status == 1
    line = error.strip().splitlines()[-1]
    assert metric in line and "nan" in line and "192" in line
    (path,) = Path().glob("runs/*")
    content = script.load_checkpoint(path)
    assert content["progress"][0] == 128
    assert all(value.isfinite().all() for value in content["agent"].values())
    assert all(math.isfinite(value) for series in scalars(path).values() for _, value in series)


@pytest.mark.only("hop_onestep")
def test_pretraining_that_is_not_finite_stops_the_run(script, small, tmp_path, monkeypatch):
    """At once: the last good checkpoint is kept."""
    loss_of = script.moa_loss
    calls = []

    def poisoned(*inputs):
        calls.append(1)
        loss, terms = loss_of(*inputs)
        if len(calls) <= 2:  # the first of two iterations
            return loss, terms
        return loss * math.nan, {name: term * math.nan for name, term in terms.items()}

    monkeypatch.setattr(script, "moa_loss", poisoned)
    args = small(**{**BASE, "checkpoint_every": 1}, pretrain_moa_steps=128)
    with pytest.raises(FloatingPointError, match="moa/"):
        run(script, args, tmp_path)
    (path,) = tmp_path.glob("runs/*")
    content = script.load_checkpoint(path)
    assert content["progress"][0] == 64
    assert all(value.isfinite().all() for value in content["agent"].values())

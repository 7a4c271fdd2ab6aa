"""What a run leaves behind, that every option does something, and that runs learn to play well."""

import collections
import copy
import dataclasses
import functools
import json
import time
import types

import pytest
import torch
from PIL import Image, ImageSequence

from conftest import HUNT, one_script, plans
from run_tools import assert_equal, broken_run, networks, run, scalars, trust, weights_of

LONGER = {  # four iterations with a planner that stays on, and episodes that end in each
    **dict(env_id=HUNT, co_players="self,nh,ns-noisy", num_steps=40, total_timesteps=640),
    **dict(plan_update="offset", plan_until=1.0, update_epochs=2, moa_updates=2),
}
STEPS = [160, 320, 480, 640]
OWN_METRICS = {  # beside those that all scripts log
    "hop_onestep": "losses/plan_slope losses/transition_reward losses/transition_value",
    "hop_mcts": "losses/plan_slope",
    "hop_ppo_gumbel": "moa/usage_entropy moa/kind_information moa/seat_information",
    "latent_world_model": "losses/plan_slope model/observation model/reward model/consistency",
}
PROFILED = {
    **dict(env_id=HUNT, num_envs=2, num_steps=4, total_timesteps=40, profile=True),
    **dict(plan_update="offset", plan_until=1.0, moa_updates=1, update_epochs=1),
}
LABELS = {  # after "players" and what they do
    "hop_onestep": "planner,game,MOA,transition,PPO",
    "hop_mcts": "planner,game,MOA,PPO",
}
BASE = {  # short, with everything at work
    **dict(env_id=HUNT, co_players="self,nh,ns", num_envs=2, num_steps=18, total_timesteps=72),
    **dict(plan_update="offset", plan_until=1.0, update_epochs=1, moa_updates=2, horizon=8),
}
CHANGES = {  # another value of each option that learning depends on
    **dict(seed=2, env_id="msh-3x3-3p-3h1s", horizon=7, co_players="nh", match_episodes=1),
    **dict(snapshot_every=1, prosocial=0.5, total_timesteps=108, num_envs=3, num_steps=17),
    **dict(learning_rate=3e-3, anneal=False, gamma=0.5, gae_lambda=0.1, update_epochs=2),
    **dict(num_minibatches=1, clip_coef=1e-4, ent_coef=0.5, vf_coef=2.0, max_grad_norm=1e-3),
    **dict(hidden_size=8, reward_scale=2.0, goal="none", goal_size=2, moa_learning_rate=1e-2),
    **dict(moa_updates=1, moa_buffer="positive", pretrain_moa_steps=36),
}
PLANNER = dict(moa_alpha=1.0, plan_update="hop", plan_beta=5.0, plan_until=0.0)
SEARCH = dict(num_simulations=12, num_goal_samples=1, puct_c=20.0, max_depth=1)
DISCRETE = dict(pg=True, soft_coef=0.2, goals=2, goal_training="em", temperature=3.0)
DISCRETE |= dict(inter_om="count", inter_om_alpha=0.5, assignment="hard")
OWN_CHANGES = {
    "hop_onestep": dict(**PLANNER, plan_samples=2),
    "hop_mcts": dict(**PLANNER, **SEARCH),
    "hop_ppo_gumbel": DISCRETE,
    "latent_world_model": dict(**PLANNER, plan_samples=2, co_player_model="nh", td_target="model"),
}
ELSEWHERE = """exp_name torch_deterministic cuda compile track wandb_project_name wandb_entity
    capture_video checkpoint_every resume init profile evaluate eval_episodes load_moa
    freeze_moa moa_capacity env_kwargs env_workers offline""".split()  # tested by name


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """A finished run with a GIF; and what `watch` saw."""
    seen = []

    def watch(iteration, global_step, metrics, agent, rows, **names):
        weights = copy.deepcopy(agent.state_dict())
        seen.append((iteration, global_step, metrics, weights, len(rows["return"])))

    folder = tmp_path_factory.mktemp("done")
    args = small(**LONGER, capture_video=True, exp_name="all.on_1")
    finished = run(script, args, watch, folder)
    return types.SimpleNamespace(**vars(finished), seen=seen, asked=args)


def test_every_parameter_is_trained(script, done):
    """From the first iteration to the last; the optimiser stepped all of them."""
    first = done.seen[0][3]
    content = script.load_checkpoint(done.path)
    same = [name for name, value in content["agent"].items() if torch.equal(value, first[name])]
    unread = ["moa.decoder.goal.weight"]  # on the goal 0: the table's come last
    assert same == (unread if script.SCRIPT == "hop_ppo_gumbel" else [])
    assert all(value.isfinite().all() for value in content["agent"].values())
    optimizer = content["optimizer"]
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    assert len(sizes) == len(networks(content["agent"])) - 1  # policy and value are in one
    assert sorted(optimizer["state"]) == list(range(sum(sizes)))
    assert all(int(state["step"]) >= 8 for state in optimizer["state"].values())
    iterations, steps, metrics, weights, learners = zip(*done.seen)
    assert iterations == (1, 2, 3, 4) and list(steps) == STEPS
    assert metrics[-1] == done.metrics
    assert_equal(weights[-1], content["agent"])
    assert all(160 <= rows <= 480 for rows in learners)


def test_metrics_are_logged_and_are_what_their_names_say(script, done):
    logged = scalars(done.path)
    always = """charts/SPS charts/episodic_return charts/episodic_length charts/learning_rate
        returns/self losses/policy losses/value losses/entropy losses/approx_kl
        moa/nll moa/kl moa/recon moa/buffer_fill""".split()
    sometimes = "returns/nh returns/ns-noisy returns/seat_0 returns/seat_1 returns/seat_2".split()
    assert {*always, *sometimes, *OWN_METRICS[script.SCRIPT].split()} <= set(logged)
    for name, series in logged.items():
        assert list(series) == STEPS or name not in always, name
    for k, (*_, metrics, _, _) in enumerate(done.seen):
        for name, value in metrics.items():
            assert logged[name][STEPS[k]] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    fill = [*logged["moa/buffer_fill"].values()]
    assert fill == pytest.approx([k * 40 / 512 for k in (1, 2, 3, 4)])


@one_script
def test_files_of_a_run(script, done):
    env_id, name, seed, moment = done.path.name.split("__")
    assert (env_id, name, seed) == (HUNT, "all.on_1", "1")
    assert abs(int(moment) - time.time()) < 3600
    names = {path.name.split("tfevents")[0] for path in done.path.iterdir()}
    assert names - {".lock"} == {"events.out.", "args.json", "checkpoint.pt", "episode.gif"}
    args = json.loads((done.path / "args.json").read_text())
    assert args == dataclasses.asdict(script.checked(done.asked, script.GridGame(HUNT)))
    content = torch.load(done.path / "checkpoint.pt", weights_only=True)
    assert args == content["args"] and content["progress"][0] == 640
    assert f"done at step 640: runs/{done.path.name}" in done.printed


def test_every_option_changes_the_outcome(script, small):
    """The weights of the policy at the end; the same options give the same ones."""

    def outcome(**options):
        return weights_of(script, run(script, small(**BASE | options), trust).path)["actor"]

    deep = {"num_simulations": 16}  # a search that comes back to an action
    plain = outcome()
    searched = outcome(**deep) if script.SCRIPT == "hop_mcts" else plain
    assert torch.equal(plain, outcome(exp_name="again"))
    changes = {**CHANGES, **OWN_CHANGES[script.SCRIPT]}
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert fields - set(ELSEWHERE) == set(changes)
    for name, value in changes.items():
        before, options = (searched, deep) if name in ("puct_c", "max_depth") else (plain, {})
        after = outcome(**{**options, name: value})
        assert before.shape != after.shape or not torch.equal(before, after), name


@pytest.mark.only("hop_onestep", "hop_ppo_gumbel")
@pytest.mark.parametrize("anneal", [True, False])
def test_schedules(script, small, anneal):
    """Learning rate and entropy bonus fall, the bonus to a tenth, and so does a temperature; a
    planner is switched off, and what it plans with is not trained then."""
    seen = []

    def watch(optimizer, agent, ent_coef, metrics, **names):
        last = agent.plan_mode if plans(script) else agent.temperature
        seen.append((optimizer.param_groups[0]["lr"], float(ent_coef), last))
        assert ("losses/transition_value" in metrics) == (last == "offset")

    options = {"learning_rate": 0.004, "ent_coef": 0.1, "plan_until": 0.5, "plan_update": "offset"}
    args = small(**options, total_timesteps=320, num_envs=2, num_steps=8, anneal=anneal)
    run(script, args, watch)
    left = [1.0 - k / 20 if anneal else 1.0 for k in range(20)]
    rates, bonuses, last = zip(*seen)
    assert rates == pytest.approx([0.004 * share for share in left])
    assert bonuses == pytest.approx([0.1 * max(share, 0.1) for share in left])
    expected = [max(share, 0.1) for share in left]
    assert last == (("offset",) * 10 + ("none",) * 10 if plans(script) else pytest.approx(expected))


def test_moa_is_loaded_and_frozen(script, small, typed, done):
    options = {**LONGER, "load_moa": str(done.path), "seed": 5, "total_timesteps": 320}
    donor = weights_of(script, done.path)["moa"]
    frozen = run(script, small(**options, freeze_moa=True))
    assert torch.equal(weights_of(script, frozen.path)["moa"], donor)
    assert "losses/policy" in frozen.metrics and "moa/nll" not in frozen.metrics
    trained = weights_of(script, run(script, small(**options)).path)["moa"]
    options["load_moa"] = None
    other = run(script, small(**options))
    alone = weights_of(script, other.path)["moa"]
    assert 0.0 < (trained - donor).norm() < (alone - donor).norm() / 2
    words = f"--init {other.path} --load-moa {done.path} --freeze-moa --total-timesteps 100"
    assert torch.equal(weights_of(script, run(script, typed(words)).path)["moa"], donor)


@pytest.mark.parametrize("env_id", [HUNT, "pettingzoo.classic.rps_v2"])
def test_pretraining_trains_goals_alone(script, record, env_id):
    """In the first steps of the run; of a VAE encoder and subgoals learn, and not the decoder; with
    discrete goals, or where there are no subgoals, all of the MOA; and no policy, ever."""
    options = {"num_envs": 4, "num_steps": 16, "total_timesteps": 256, "moa_updates": 3}
    options |= {"plan_update": "none"} if plans(script) else {}
    _, iterations = record(env_id=env_id, pretrain_moa_steps=100, **options)
    learnt = [("moa/recon" in one.metrics, "losses/policy" in one.metrics) for one in iterations]
    assert learnt == [(True, False)] * 2 + [(True, True)] * 2
    first, second = (one.weights for one in iterations[:2])
    changed = {name for name, value in second.items() if not torch.equal(value, first[name])}
    parts = {".".join(name.split(".")[:2]) for name in changed}
    expected = {"moa.subgoal"} if env_id == HUNT else {"moa.decoder"}
    if script.SCRIPT == "hop_ppo_gumbel":
        expected |= {"moa.table", "moa.decoder"}
    else:
        expected |= {"moa.step_feature", "moa.encoder"}
    assert parts == expected


@one_script
def test_compiled_loss_gives_nearly_the_same_run(script, small, monkeypatch):
    """Compiled without generating code; with torch's deterministic algorithms or not."""
    traced = functools.partial(torch.compile, backend="eager")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or traced(f))
    options = {"plan_update": "offset", "plan_until": 1.0, "num_envs": 2}
    plain = run(script, small(**options, torch_deterministic=False))
    assert not compiled and not torch.are_deterministic_algorithms_enabled()
    fast = run(script, small(**options, compile=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert compiled == [script.ppo_loss]
    weights = (weights_of(script, one.path) for one in (plain, fast))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.only("hop_onestep", "hop_mcts")
def test_profile(script, small):
    """A table by label of three iterations, and a trace."""
    finished = run(script, small(**PROFILED))
    table = {}
    for line in finished.printed.splitlines():
        figures = line[20:].split()
        label = line[:20].strip()
        if len(figures) == 3 and figures[1] == "s" and not label.startswith("Optimizer."):
            table[label] = float(figures[2].removesuffix("%"))  # of the iterations
    labels = LABELS[script.SCRIPT].split(",")
    first = ["ProfilerStep*", "rollout", "players", "goal inference", "policy and value"]
    assert list(table) == first + labels
    parts = ["rollout", *labels[labels.index("MOA") :]]
    assert 50.0 < sum(table[label] for label in parts) <= 100.5
    events = json.loads((finished.path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    calls = collections.Counter(name.partition("#")[0] for name in names)
    assert [calls[name] for name in ("ProfilerStep", "rollout", "PPO", "planner")] == [3, 3, 3, 12]


@pytest.mark.only("hop_ppo_gumbel")
def test_profiler_is_stopped_when_a_run_fails(script, small):
    """One that is left on slows everything down."""
    broken_run(script, small(**PROFILED), 2)
    assert not torch.autograd._profiler_enabled()


def frames_of(path):
    with Image.open(path / "episode.gif") as image:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]


@one_script
def test_video_is_a_whole_last_episode(script, small, done, command, monkeypatch):
    """All its states, the last one with the hunt included, the rewards so far, and beliefs where
    there are any; `--evaluate` shows the game and the co-players that were asked for."""
    frames = frames_of(done.path)
    assert 2 <= len(frames) <= 36
    assert all(before != after for before, after in zip(frames, frames[1:]))
    drawn = []

    def draw(self, state, title, beliefs):
        drawn.append((int(state.time[0]), state.items[0].tolist(), title, beliefs))
        return torch.rand(8, 8, 3).mul(255).byte().numpy()

    monkeypatch.setattr(script.GridGame, "draw", draw)
    options = {"env_id": "msh-1x1-2p-0h1s", "co_players": "ns", "match_episodes": 3, "seed": 3}
    path = run(script, small(**options, capture_video=True)).path
    times, items, titles, beliefs = zip(*drawn)
    assert times == tuple(range(len(drawn))) and 1 < len(drawn) <= 35
    assert items == ([0],) * (len(drawn) - 1) + ([-1],)
    assert all("[0.0, 0.0]" in title for title in titles[:-1]) and "[5.0, 5.0]" in titles[-1]
    assert "last episode" in titles[0] and "ns" in titles[0]
    assert all(len(belief) == 2 and 0.0 < belief[0][0] < 1.0 for belief in beliefs[:-1])
    drawn.clear()
    words = f"--evaluate {path} --co-players nh --env-id msh-1x2-2p-1h1s --eval-episodes 1"
    assert command(f"{words} --capture-video")[0] == 0
    assert all(len(items) == 2 and "nh" in title for _, items, title, _ in drawn) and drawn
    drawn.clear()
    run(script, small(goal="none", plan_update="none", capture_video=True))
    assert len(drawn) > 1 and all(beliefs == [] for *_, beliefs in drawn)


@one_script
def test_video_of_a_pettingzoo_environment(script, small, monkeypatch):
    """What the environment itself renders."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    options = {"env_id": "mpe2.simple_tag_v3", "horizon": 6, "match_episodes": 1}
    args = small(**options, num_envs=2, total_timesteps=32, capture_video=True, hidden_size=8)
    frames = frames_of(run(script, args).path)
    assert 2 < len(frames) <= 7 and frames[0] != frames[-1]  # those that look alike are one


@one_script
def test_tracking_offline(script, small, typed, tmp_path, monkeypatch):
    """Every metric at its step, also of a run that goes on. The run is finished, so that the next
    logs nothing into it. Without a login it is refused in one line."""
    wandb = pytest.importorskip("wandb")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    log = wandb.Run.log

    def noted(self, metrics, step):
        logged.append((self.id, self.project, step, set(metrics)))
        return log(self, metrics, step=step)

    def failing(**options):
        raise RuntimeError("no\nlogin")

    monkeypatch.setattr(wandb.Run, "log", noted)
    tracked = run(script, small(track=True, wandb_project_name="project-x"))
    assert wandb.run is None
    run(script, small())
    run(script, typed(resume=tracked.path, total_timesteps=192))
    ids, projects, steps, names = zip(*logged)
    assert steps == (64, 128, 192) and set(projects) == {"project-x"}
    assert len(set(ids)) == 1
    assert all({"losses/policy", "moa/nll", "charts/SPS"} <= metrics for metrics in names)
    assert script.load_checkpoint(tracked.path)["progress"] == [192, 3, ids[0]]
    monkeypatch.setattr(wandb, "init", failing)
    with pytest.raises(script.UsageError, match="--track: .*no login"):
        run(script, small(track=True))
    assert len(list(tmp_path.glob("runs/*"))) == 2  # nothing of the one that was refused


@one_script
def test_learns_within_one_match(script, typed):
    """Who has learnt to hunt the stag with a hunter of stags gets little beside a hunter of hares,
    however long the match; with `--init` it takes hares (1.0 each) before the match ends."""
    options = {"env_id": "msh-2x2-2p-3h1s", "horizon": 8, "num_envs": 32, "num_steps": 16}
    args = script.Args(**options, co_players="ns", total_timesteps=6144, hidden_size=32)
    path = run(script, args).path
    frozen = script.evaluate(path, "nh", episodes=200, num_envs=2, match_episodes=100)
    returns = []

    def watch(finished, co_players, **others):
        for _, kinds, totals in finished:
            returns.extend(totals[kinds == 0].tolist())
        assert int(co_players.episode) == len(returns)  # it is still the first match

    run(script, typed(init=path, co_players="nh", total_timesteps=1000), watch)
    late = returns[-(len(returns) // 3) :]
    assert len(returns) > 150
    assert sum(late) / len(late) > frozen["focal_return"] + 0.4

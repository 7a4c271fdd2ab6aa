"""What a run leaves behind, and that every option does something."""

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image, ImageSequence

from conftest import plans
from run_tools import assert_equal, main, networks, run, scalars, trust, weights_of

ENV_ID = "msh-3x3-3p-2h1s"
LONGER = {  # four iterations with a planner that stays on, and episodes that end in each
    "env_id": ENV_ID,
    "co_players": "self,nh,ns-noisy",
    "num_steps": 40,
    "total_timesteps": 640,
    "plan_update": "offset",
    "plan_until": 1.0,
    "update_epochs": 2,
    "moa_updates": 2,
}
STEPS = [160, 320, 480, 640]
SLOPE = "losses/plan_slope"
OWN_METRICS = {  # beside those that all scripts log; every time, and where matches are long enough
    "hop_onestep": ([SLOPE, "losses/transition_reward", "losses/transition_value"], []),
    "hop_mcts": ([SLOPE], []),
    "hop_ppo_gumbel": (
        [],
        ["moa/usage_entropy", "moa/kind_information", "moa/seat_information"],
    ),
    "latent_world_model": (
        [SLOPE, "model/observation", "model/reward", "model/value", "model/consistency"],
        [],
    ),
}


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """A finished run with a GIF: path, metrics, printed text; and what `watch` saw."""
    seen = []

    def watch(**names):
        kept = {name: names[name] for name in ("iteration", "global_step", "metrics", "args")}
        kept["agent"] = copy.deepcopy(names["agent"].state_dict())
        kept["rows"] = {name: names["rows"][name].shape for name in ("own", "action", "advantage")}
        seen.append(types.SimpleNamespace(**kept))

    folder = tmp_path_factory.mktemp("done")
    args = small(**LONGER, capture_video=True, exp_name="all.on_1")
    finished = run(script, args, folder, watch)
    return types.SimpleNamespace(**vars(finished), seen=seen, asked=args)


# ------------------------------------------------------------------------------------------------
# What a run leaves
# ------------------------------------------------------------------------------------------------
UNREAD = {"hop_ppo_gumbel": ["moa.decoder.goal.weight"]}  # on the goal 0: the table's come last


def test_every_parameter_is_trained(script, done):
    """From the first iteration to the last; the optimiser stepped all of them."""
    first = done.seen[0].agent
    content = script.load_checkpoint(done.path)
    same = []
    for name, value in content["agent"].items():
        assert value.isfinite().all(), name
        if torch.equal(value, first[name]):
            same.append(name)
    assert same == UNREAD.get(script.SCRIPT, [])
    assert_equal(content["agent"], done.seen[-1].agent)
    optimizer = content["optimizer"]
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    assert len(sizes) == len(networks(content["agent"])) - 1  # policy and value are in one
    assert min(sizes) > 4
    assert sorted(optimizer["state"]) == list(range(sum(sizes)))
    assert all(int(state["step"]) >= 8 for state in optimizer["state"].values())


def test_watch_is_called_after_every_iteration(done):
    assert [names.iteration for names in done.seen] == [1, 2, 3, 4]
    assert [names.global_step for names in done.seen] == STEPS
    assert done.seen[-1].metrics == done.metrics
    for names in done.seen:
        (learners,) = names.rows["action"]
        assert 160 <= learners <= 480
        assert names.rows["own"][0] == names.rows["advantage"][0] == learners


def test_documented_metrics_are_logged_once_a_step(script, done):
    logged = scalars(done.path)
    every = """charts/SPS charts/episodic_return charts/episodic_length charts/learning_rate
        returns/self losses/policy losses/value losses/entropy losses/approx_kl
        moa/nll moa/kl moa/recon moa/buffer_fill""".split()
    others = "returns/nh returns/ns-noisy returns/seat_0 returns/seat_1 returns/seat_2".split()
    own, sometimes = OWN_METRICS[script.SCRIPT]
    every += own
    others += sometimes
    assert {*every, *others} <= set(logged)
    for name in every:
        assert [step for step, _ in logged[name]] == STEPS, name
    for name in others:
        steps = [step for step, _ in logged[name]]
        assert steps == sorted(set(steps)) and set(steps) <= set(STEPS), name
    for name, series in logged.items():
        assert all(math.isfinite(value) for _, value in series), name
    last = {name: series[-1] for name, series in logged.items()}
    for name, value in done.metrics.items():
        assert last[name] == (640, pytest.approx(value, rel=1e-5, abs=1e-7)), name


def test_metrics_are_what_their_names_say(script, done):
    logged = scalars(done.path)
    best = script.GridGame(ENV_ID).best_return * 3
    for name, series in logged.items():
        if name.startswith("returns/"):
            assert all(0.0 <= value <= best for _, value in series), name
    assert logged["charts/episodic_return"] == logged["returns/self"]
    assert all(1.0 <= value <= 35.0 for _, value in logged["charts/episodic_length"])
    fill = [value for _, value in logged["moa/buffer_fill"]]
    assert fill == pytest.approx([40 / 512, 80 / 512, 120 / 512, 160 / 512])
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([done.asked.learning_rate * k / 4 for k in (4, 3, 2, 1)])
    assert all(0.0 < value <= math.log(7) for _, value in logged["losses/entropy"])


def test_files_of_a_run(script, done):
    env_id, name, seed, moment = done.path.name.rstrip("+").split("__")
    assert (env_id, name, seed) == (ENV_ID, "all.on_1", "1")
    assert abs(int(moment) - time.time()) < 600
    assert done.path.parent.name == "runs"
    names = {path.name for path in done.path.iterdir() if not path.name.startswith(".")}
    events = {name for name in names if "tfevents" in name}
    assert len(events) == 1
    assert names - events == {"args.json", "checkpoint.pt", "episode.gif"}
    args = json.loads((done.path / "args.json").read_text())
    assert args == dataclasses.asdict(script.checked(done.asked, script.GridGame(ENV_ID)))
    content = torch.load(done.path / "checkpoint.pt", weights_only=True)
    assert args == content["args"]
    assert content["progress"][0] == 640
    assert None not in (args["gamma"], args["reward_scale"], args["horizon"])
    assert f"done at step 640: runs/{done.path.name}" in done.printed


def test_two_runs_at_once_have_two_folders(script, small, tmp_path):
    """Also within the same second; without its switch there is no video, table or trace."""
    first = run(script, small(total_timesteps=64), tmp_path)
    second = run(script, small(total_timesteps=64), tmp_path)
    assert first.path != second.path
    names = {path.name.split(".")[0] for path in first.path.iterdir()}
    assert names - {""} == {"args", "checkpoint", "events"}
    assert "share" not in first.printed
    assert_equal(weights_of(script, first.path), weights_of(script, second.path))


# ------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------
BASE = {  # short, with everything at work
    "env_id": ENV_ID,
    "co_players": "self,nh,ns",
    "num_envs": 2,
    "num_steps": 36,
    "total_timesteps": 144,
    "plan_update": "offset",
    "plan_until": 1.0,
    "update_epochs": 1,
    "moa_updates": 2,
    "match_episodes": 2,
}
CHANGES = {  # another value of each option that learning depends on
    "seed": 2,
    "env_id": "msh-3x3-3p-3h1s",
    "horizon": 10,
    "co_players": "nh",
    "match_episodes": 1,
    "snapshot_every": 1,
    "prosocial": 0.5,
    "total_timesteps": 216,
    "num_envs": 3,
    "num_steps": 35,
    "learning_rate": 3e-3,
    "anneal": False,
    "gamma": 0.5,
    "gae_lambda": 0.1,
    "update_epochs": 2,
    "num_minibatches": 1,
    "clip_coef": 1e-4,
    "ent_coef": 0.5,
    "vf_coef": 2.0,
    "max_grad_norm": 1e-3,
    "hidden_size": 8,
    "reward_scale": 2.0,
    "goal": "none",
    "goal_size": 2,
    "moa_learning_rate": 1e-2,
    "moa_updates": 1,
    "moa_buffer": "positive",
    "pretrain_moa_steps": 72,
}
PLANNER_CHANGES = {"moa_alpha": 1.0, "plan_update": "hop", "plan_beta": 5.0, "plan_until": 0.0}
OWN_CHANGES = {
    "hop_onestep": {"plan_samples": 2},
    "hop_mcts": {"num_simulations": 12, "num_goal_samples": 1, "puct_c": 20.0, "max_depth": 1},
    "hop_ppo_gumbel": {
        "pg": True,
        "soft_coef": 0.2,
        "goals": 2,
        "goal_training": "em",
        "temperature": 3.0,
        "inter_om": "count",
        "inter_om_alpha": 0.5,
        "assignment": "hard",
    },
    "latent_world_model": {
        "plan_samples": 2,
        "co_player_model": "nh",
        "td_target": "model",
    },
}
ELSEWHERE = """exp_name torch_deterministic cuda compile track wandb_project_name wandb_entity
    capture_video checkpoint_every resume init profile evaluate eval_episodes load_moa
    freeze_moa moa_capacity env_kwargs env_workers""".split()  # tested by name
OWN_ELSEWHERE = {"latent_world_model": ["offline"]}


@pytest.fixture(scope="module")
def outcome(script, small, tmp_path_factory):
    """Makes the weights at the end of a short run with the options given; each is computed once."""
    known = {}

    def make(**options):
        key = tuple(sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("option")
            args = small(**{**BASE, **options})
            finished = run(script, args, folder, trust)
            known[key] = weights_of(script, finished.path)
        return known[key]

    return make


def test_every_option_is_tested(script):
    fields = [field.name for field in dataclasses.fields(script.Args)]
    changes = [*CHANGES, *OWN_CHANGES[script.SCRIPT], *OWN_ELSEWHERE.get(script.SCRIPT, [])]
    if plans(script):
        changes += PLANNER_CHANGES
    assert sorted(fields) == sorted([*changes, *ELSEWHERE])


def assert_changes(before, after):
    """The weights of the policy are others."""
    same = before["actor"].shape == after["actor"].shape
    assert not (same and torch.equal(before["actor"], after["actor"]))


@pytest.mark.parametrize("name", CHANGES)
def test_option_changes_the_outcome(outcome, name):
    assert_changes(outcome(), outcome(**{name: CHANGES[name]}))


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
@pytest.mark.parametrize("name", PLANNER_CHANGES)
def test_option_of_planning_changes_the_outcome(outcome, name):
    assert_changes(outcome(), outcome(**{name: PLANNER_CHANGES[name]}))


@pytest.mark.only("hop_ppo_gumbel")
@pytest.mark.parametrize("name", OWN_CHANGES["hop_ppo_gumbel"])
def test_option_of_discrete_goals_changes_the_outcome(outcome, name):
    assert_changes(outcome(), outcome(**{name: OWN_CHANGES["hop_ppo_gumbel"][name]}))


@pytest.mark.only("hop_ppo_gumbel")
def test_one_goal_for_each_player_changes_the_outcome(outcome):
    for other in ("soft", "hard"):
        assert_changes(outcome(assignment=other), outcome(assignment="exclusive"))


@pytest.mark.only("hop_onestep")
@pytest.mark.parametrize("name", OWN_CHANGES["hop_onestep"])
def test_option_of_one_step_changes_the_outcome(outcome, name):
    assert_changes(outcome(), outcome(**{name: OWN_CHANGES["hop_onestep"][name]}))


@pytest.mark.only("latent_world_model")
@pytest.mark.parametrize("name", OWN_CHANGES["latent_world_model"])
def test_option_of_the_latent_model_changes_the_outcome(outcome, name):
    assert_changes(outcome(), outcome(**{name: OWN_CHANGES["latent_world_model"][name]}))


@pytest.mark.only("hop_mcts")
@pytest.mark.parametrize("name", OWN_CHANGES["hop_mcts"])
def test_option_of_the_search_changes_the_outcome(outcome, name):
    """In a search that comes back to an action, and deeper than one step."""
    options = {"num_simulations": 16}
    assert_changes(outcome(**options), outcome(**{**options, name: OWN_CHANGES["hop_mcts"][name]}))


def test_the_same_options_give_the_same_outcome(outcome):
    assert_equal(outcome(), outcome(exp_name="again"))


def test_schedules(script, small, tmp_path):
    """Learning rate and entropy bonus fall, the bonus to a tenth, and so does a temperature; a
    planner is switched off."""
    seen = []

    def watch(**names):
        rate = names["optimizer"].param_groups[0]["lr"]
        agent = names["agent"]
        last = agent.plan_mode if plans(script) else agent.temperature
        seen.append((rate, float(names["ent_coef"]), last))

    options = {"learning_rate": 0.004, "ent_coef": 0.1, "plan_until": 0.5, "plan_update": "offset"}
    for anneal in (True, False):
        seen.clear()
        args = small(**options, total_timesteps=16 * 10, num_envs=2, num_steps=8, anneal=anneal)
        run(script, args, tmp_path, watch)
        left = [1.0 - k / 10 if anneal else 1.0 for k in range(10)]
        expected = ["offset"] * 5 + ["none"] * 5 if plans(script) else pytest.approx(left)
        assert [last for _, _, last in seen] == expected
        assert [rate for rate, _, _ in seen] == pytest.approx([0.004 * share for share in left])
        assert [bonus for _, bonus, _ in seen] == pytest.approx([0.1 * share for share in left])


def test_gradients_are_clipped_and_counted(script, small, tmp_path):
    """As many steps as passes times minibatches, each by a gradient no longer than asked for."""
    norms = []

    def note(optimizer, *_):
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        if gradients[0] is not None:  # else it is a step of another network
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))

    hooked = []

    def watch(**names):
        if not hooked:
            hooked.append(names["optimizer"].register_step_post_hook(note))

    args = small(max_grad_norm=1e-3, vf_coef=5.0, update_epochs=3, num_minibatches=5)
    run(script, args, tmp_path, watch)
    assert len(norms) == 15
    assert norms == pytest.approx([1e-3] * 15, rel=1e-3)


LEARNT_MODEL = {"hop_onestep": "transition", "latent_world_model": "model"}  # of a planner


@pytest.mark.only(*LEARNT_MODEL)
def test_planners_model_learns_until_the_planner_is_off(script, small, tmp_path):
    weights = []

    def watch(**names):
        weights.append(networks(names["agent"])[LEARNT_MODEL[script.SCRIPT]])

    options = {"env_id": ENV_ID, "plan_update": "offset", "plan_until": 0.5}
    run(script, small(**options, total_timesteps=256), tmp_path, watch)
    first, second, third, fourth = weights
    assert not torch.equal(first, second)
    assert torch.equal(second, third) and torch.equal(third, fourth)


@pytest.mark.only("hop_mcts")
@pytest.mark.parametrize("env_id", [ENV_ID, "msg-2x3-3p-3d"])
@pytest.mark.parametrize("plan_update", ["offset", "hop"])
def test_planner_on_exact_steps(script, small, tmp_path, env_id, plan_update):
    """Scores at the learner's seats; there is no network of transitions to learn."""
    weights = []
    plans = []

    def watch(agent, storage, metrics, **others):
        weights.append({name: value.clone() for name, value in networks(agent).items()})
        planned = torch.stack(storage["q_plan"]).any(3)
        learner = torch.stack(storage["learner"])
        assert not (planned & ~learner).any()
        assert planned.sum() > 0.5 * learner.sum()  # else all ends, whatever it does
        plans.append(float(torch.stack(storage["offset"]).abs().max()))
        assert not [name for name in metrics if "transition" in name]
        assert "losses/plan_slope" in metrics

    options = {**LONGER, "env_id": env_id, "co_players": "self,random", "plan_update": plan_update}
    finished = run(script, small(**options), tmp_path, watch)
    assert all(math.isfinite(value) for value in finished.metrics.values())
    assert plans[0] == 0.0 and max(plans) > 0.01
    assert set(weights[0]) == {"actor", "critic", "moa"}
    for name in weights[0]:
        assert not torch.equal(weights[0][name], weights[-1][name]), name


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_planner_alone_is_learnt_from_with_an_entropy_bonus(script, small, tmp_path, monkeypatch):
    """Rewards of PPO: -log of the probability of each action over beta, falling to 0 at the end of
    planning; the planner's model learns the rewards themselves."""
    given = {}
    rewards = set()
    loss = {"hop_onestep": "transition_loss", "latent_world_model": "model_loss"}
    loss = loss.get(script.SCRIPT)

    def note(name, place):
        function = getattr(script, name)

        def noted(*inputs):
            given[name] = inputs[place]
            return function(*inputs)

        monkeypatch.setattr(script, name, noted)

    def watch(args, storage, iteration, **others):
        reward = args.reward_scale * torch.stack(storage["reward"])
        share = 1.0 - (iteration - 1) / 4
        bonus = -share / 2.0 * torch.stack(storage["log_prob"])
        torch.testing.assert_close(given["generalised_advantages"], reward + bonus)
        assert (bonus.max() > 0.1) == (iteration < 5)
        rewards.update(reward.flatten().tolist())
        if loss:
            assert set(given[loss]["reward"].tolist()) <= rewards

    note("generalised_advantages", 0)
    if loss:
        note(loss, 1)
    options = {**LONGER, "plan_update": "hop", "plan_until": 0.8, "plan_beta": 2.0}
    run(script, small(**{**options, "total_timesteps": 800}), tmp_path, watch)
    assert len(rewards) > 2 and loss in [None, *given]


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
@pytest.mark.parametrize("beta", [0.0, 1e-12])
def test_planner_alone_without_a_weight(script, small, tmp_path, beta):
    """Acts at random; the run is like any other."""
    options = {"env_id": ENV_ID, "plan_update": "hop", "plan_until": 1.0}
    finished = run(script, small(**options, plan_beta=beta), tmp_path)
    assert all(math.isfinite(value) for value in finished.metrics.values())


@pytest.mark.parametrize("goal", ["inferred", "none", "oracle"])
def test_goal_sources(script, small, tmp_path, goal):
    """`none` is zero, `oracle` the truth, `inferred` something of each player's own."""
    goals = []
    truths = []

    def watch(**names):
        goals.append(names["rows"]["goal"])
        truths.append(names["rows"]["own"])

    args = small(env_id=ENV_ID, goal=goal, co_players="nh,ns", num_steps=40, total_timesteps=160)
    run(script, args, tmp_path, watch)
    (goal_rows,) = goals
    if goal == "none":
        assert not goal_rows.any()
        return
    assert goal_rows.std(0).max() > 0.01
    if goal == "oracle":
        kinds = goal_rows[:, :4].sum(1)  # the one-hot of each co-player's kind, summed over the two
        assert set(kinds.tolist()) == {2.0}
        assert not goal_rows[:, 3].any()  # nobody is unknown


# ------------------------------------------------------------------------------------------------
# The MOA
# ------------------------------------------------------------------------------------------------
def test_moa_is_loaded_and_frozen(script, small, done, tmp_path):
    options = {**LONGER, "load_moa": str(done.path), "seed": 5, "total_timesteps": 320}
    donor = weights_of(script, done.path)["moa"]
    frozen = run(script, small(**options, freeze_moa=True), tmp_path)
    assert torch.equal(weights_of(script, frozen.path)["moa"], donor)
    assert not {"moa/nll", "moa/kl"} & set(frozen.metrics)
    assert "losses/policy" in frozen.metrics
    trained = run(script, small(**options), tmp_path)
    moa = weights_of(script, trained.path)["moa"]
    alone = run(script, small(**{**options, "load_moa": None}), tmp_path)
    assert 0.0 < (moa - donor).norm() < (weights_of(script, alone.path)["moa"] - donor).norm() / 2


VAE = {"step_feature", "encoder", "subgoal"}
PRETRAINED = {  # parts of the MOA
    "hop_onestep": VAE,
    "hop_mcts": VAE,
    "hop_ppo_gumbel": {"table", "decoder", "subgoal"},
    "latent_world_model": VAE,
}


def test_pretraining_trains_goals_alone(script, small, tmp_path):
    """In the first steps of the run; of a VAE encoder and subgoals learn, and not the decoder; with
    discrete goals all of the MOA; and no policy, ever."""
    made = []
    calls = []
    agent_class = script.Agent
    loss = script.moa_loss

    class Noted(agent_class):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            made.append(self)
            self.first = copy.deepcopy(self.state_dict())

    def moa_loss(agent, batch, pretraining, generator):
        calls.append(pretraining)
        if not pretraining and calls.count(False) == 1:
            made[0].second = copy.deepcopy(made[0].state_dict())
        return loss(agent, batch, pretraining, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Agent", Noted)
        patch.setattr(script, "moa_loss", moa_loss)
        seen = []
        args = small(env_id=ENV_ID, pretrain_moa_steps=100, total_timesteps=256, moa_updates=3)
        finished = run(script, args, tmp_path, lambda **names: seen.append(names["global_step"]))
    assert calls == [True] * 6 + [False] * 6
    assert seen == [64, 128, 192, 256]
    logged = scalars(finished.path)
    assert [step for step, _ in logged["moa/recon"]] == seen
    assert [step for step, _ in logged["losses/policy"]] == [192, 256]
    agent = made[0]
    pairs = {name: (agent.first[name], agent.second[name]) for name in agent.first}
    changed = {name for name, (before, after) in pairs.items() if not torch.equal(before, after)}
    assert {name.split(".")[0] for name in changed} == {"moa"}
    parts = {name.split(".")[1] for name in changed}
    assert parts == PRETRAINED[script.SCRIPT]


@pytest.mark.only("hop_onestep")
def test_a_long_match_takes_no_more_memory(script, small, tmp_path):
    """The ring has a fixed size, and what is read of a running match is HISTORY steps at most."""
    lengths = []
    sizes = set()
    read = script.MatchBuffer.read

    def noted(self, *inputs):
        part = read(self, *inputs)
        lengths.append(part["action"].shape[1])
        return part

    def watch(**names):
        sizes.add(names["buffer"].ring["action"].shape)

    args = small(
        match_episodes=1000,
        num_envs=1,
        num_steps=400,
        total_timesteps=1600,
        moa_capacity=600,
        moa_updates=1,
        update_epochs=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.MatchBuffer, "read", noted)
        run(script, args, tmp_path, watch)
    assert sizes == {(600, 1, 4)}
    assert max(lengths) == script.HISTORY


def test_iterations_without_a_learner(script, small, tmp_path):
    """A learner that has left is not learnt from; in one game that can be a whole iteration."""
    learners = []

    def watch(**names):
        learners.append(int(torch.stack(names["storage"]["learner"]).sum()))

    options = {"env_id": "msh-2x2-4p-3h1s", "co_players": "random", "num_envs": 1, "num_steps": 2}
    args = small(**options, plan_until=1.0, total_timesteps=120, moa_updates=1, update_epochs=1)
    finished = run(script, args, tmp_path, watch)
    assert len(learners) == 60 and 0 in learners and 2 in learners
    for name, series in scalars(finished.path).items():
        assert all(math.isfinite(value) for _, value in series), name


@pytest.mark.only("hop_onestep")
@pytest.mark.parametrize("steps", [2**31 - 20, 2**40])
def test_match_buffer_counts_any_number_of_steps(script, small, steps):
    """What is read late in a run is what is read early, if the same was added."""
    game = script.GridGame("msg-1x1-3p-1d")
    args = script.checked(small(num_envs=2, moa_capacity=2 * 512), game)
    state = game.start(2, torch.Generator().manual_seed(0))
    batches = []
    for offset in (0, steps // 512 * 512):
        buffer = script.MatchBuffer(game, args)
        assert buffer.size == 512
        buffer.now = offset
        buffer.match_start = buffer.match_start + offset
        buffer.episode_start = buffer.match_start
        generator = torch.Generator().manual_seed(1)
        for k in range(520):
            actions = torch.randint(game.num_actions, (2, 3), generator=generator)
            alive = torch.ones(2, 3, dtype=torch.bool)
            step = {"action": actions, "alive": alive, "reached": torch.where(actions == 5, 0, -1)}
            step["reward"] = torch.rand(2, 3, generator=generator)
            ended = torch.tensor([True, k % 7 == 0])
            buffer.add(state, step, ended, torch.tensor([True, k % 14 == 0]))
        assert buffer.now == offset + 520
        start = torch.arange(offset + 8, offset + 520)
        game_of = torch.arange(2)[:, None].expand(2, 512).flatten()
        batches.append(buffer.read(game_of, start.repeat(2)))
    assert_equal(*batches)
    assert set(batches[0]["active"][:512].sum((1, 2)).tolist()) == {3}  # matches of one step
    assert set(batches[0]["active"][512:].sum((1, 2)).tolist()) == {3 * k for k in range(1, 15)}
    assert batches[0]["weight"].any() and (batches[0]["subgoal"] == 0).any()


# ------------------------------------------------------------------------------------------------
# What can go wrong, and switches
# ------------------------------------------------------------------------------------------------
@pytest.mark.only("hop_onestep")
def test_torch_deterministic(script, small, tmp_path):
    try:
        run(script, small(torch_deterministic=False, total_timesteps=64), tmp_path)
        assert not torch.are_deterministic_algorithms_enabled()
        run(script, small(total_timesteps=64), tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.only("hop_onestep")
def test_compiled_loss_gives_nearly_the_same_run(script, small, tmp_path, monkeypatch):
    """Traced by torch.compile and differentiated ahead of time, without generating code."""
    compile_function = torch.compile
    compiled = []

    def traced(function):
        compiled.append(function)
        return compile_function(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    options = {"plan_update": "offset", "plan_until": 1.0, "num_envs": 2}
    plain = run(script, small(**options), tmp_path)
    assert not compiled
    fast = run(script, small(**options, compile=True), tmp_path)
    assert compiled == [script.ppo_loss]
    first = weights_of(script, plain.path)
    second = weights_of(script, fast.path)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    assert plain.metrics["losses/policy"] == pytest.approx(fast.metrics["losses/policy"], abs=1e-3)


def table_of(printed):
    """{label: (seconds, share in percent)} of the table that a profiled run prints."""
    table = {}
    for line in printed.splitlines():
        figures = line[20:].split()
        label = line[:20].strip()
        if len(figures) == 3 and figures[1] == "s" and not label.startswith("Optimizer."):
            table[label] = (float(figures[0]), float(figures[2].removesuffix("%")))
    return table


def calls_of(folder):
    """{label: how often it was entered} by the trace in a run's folder."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    labels = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return collections.Counter(label.partition("#")[0] for label in labels)


PROFILED = {  # a tiny run: what the profiler records, it has to digest
    "env_id": ENV_ID,
    "num_envs": 2,
    "num_steps": 4,
    "total_timesteps": 40,
    "plan_update": "offset",
    "plan_until": 1.0,
    "moa_updates": 1,
    "update_epochs": 1,
}


SEARCH = ["policy", "MOA", "game", "value"]
LABELS = {  # a planner, what is inside it, and the update, in their order
    "hop_onestep": (["planner"], [], ["MOA", "transition", "PPO"]),
    "hop_mcts": (
        ["planner"],
        ["select", "expand", *(f"search: {part}" for part in SEARCH), "backup"],
        ["MOA", "PPO"],
    ),
    "hop_ppo_gumbel": ([], [], ["MOA", "PPO"]),
    "latent_world_model": (["planner"], [], ["MOA", "latent model", "PPO"]),
}


def test_profile(script, small, tmp_path):
    """A table by label of three iterations, in their order, whose shares are sensible; a trace."""
    finished = run(script, small(**PROFILED, profile=True), tmp_path)
    table = table_of(finished.printed)
    planner, inside, update = LABELS[script.SCRIPT]
    players = ["goal inference", "policy and value", *planner]
    labels = ["ProfilerStep*", "rollout", "players", *players, *inside, "game", *update]
    assert list(table) == labels
    shares = {label: share for label, (_, share) in table.items()}
    whole = table["ProfilerStep*"][0]
    for label, (seconds, share) in table.items():
        assert seconds / whole == pytest.approx(share / 100.0, abs=0.02), label
    assert shares["ProfilerStep*"] == 100.0
    assert 50.0 < shares["rollout"] + sum(shares[label] for label in update) <= 100.5
    assert 0.3 * shares["rollout"] < shares["players"] + shares["game"] <= shares["rollout"] + 0.5
    assert 0.3 * shares["players"] < sum(map(shares.get, players)) <= shares["players"] + 0.5
    calls = calls_of(finished.path)
    assert calls["rollout"] == calls["PPO"] == calls["MOA"] == calls["ProfilerStep"] == 3
    assert calls["players"] == calls["game"] == 12
    assert all(calls[label] == 12 for label in planner)
    if inside:
        searched = sum(shares[label] for label in ("select", "expand", "backup"))
        assert 0.3 * shares["planner"] < searched <= shares["planner"] + 0.5
        within = sum(shares[label] for label in inside if label.startswith("search: "))
        assert 0.3 * shares["expand"] < within <= shares["expand"] + 0.5
        assert calls["select"] == calls["expand"] == calls["backup"] == 12 * 4  # simulations
        assert calls["search: game"] == calls["search: value"] == 12 * 4
        assert 12 <= calls["search: policy"] == calls["search: MOA"] <= 12 * 4


@pytest.mark.only("hop_onestep")
def test_profile_of_a_run_that_goes_on(script, small, tmp_path):
    first = run(script, small(**PROFILED), tmp_path)
    args = script.Args(**script.load_checkpoint(first.path)["args"])
    args = dataclasses.replace(args, resume=str(first.path), total_timesteps=72, profile=True)
    finished = run(script, args, tmp_path)
    assert {"PPO", "rollout"} <= set(table_of(finished.printed))
    calls = calls_of(finished.path)
    assert calls["PPO"] == calls["rollout"] == 3


@pytest.mark.only("hop_onestep")
def test_profiler_is_stopped_when_a_run_fails(script, small, tmp_path):
    """One that is left on slows everything down, and crashes Python at its end."""
    profilers = []

    def watch(**names):
        if names["iteration"] == 2:
            profilers.append(names["profiler"])
            assert torch.autograd._profiler_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(script, small(**PROFILED, profile=True), tmp_path, watch)
    on = torch.autograd._profiler_enabled()
    if on:
        profilers[0].stop()
    assert not on


# ------------------------------------------------------------------------------------------------
# Videos
# ------------------------------------------------------------------------------------------------
def frames_of(path):
    with Image.open(path) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


def test_gif_of_a_run(done):
    """Several frames of one size, each unlike the one before."""
    frames = frames_of(done.path / "episode.gif")
    assert 2 <= len(frames) <= 36
    assert len({frame.size for frame in frames}) == 1
    for before, after in zip(frames, frames[1:], strict=False):
        assert before.tobytes() != after.tobytes()


def test_video_shows_the_last_episode_of_a_match_to_its_end(script, small, tmp_path, monkeypatch):
    """All its states, the last one with the hunt included, the rewards so far, and beliefs."""
    drawn = []
    draw = script.GridGame.draw

    def noted(self, state, title, beliefs):
        drawn.append((state, title, beliefs))
        return draw(self, state, title, beliefs)

    monkeypatch.setattr(script.GridGame, "draw", noted)
    options = {"env_id": "msh-1x1-2p-0h1s", "co_players": "ns", "match_episodes": 3, "seed": 3}
    run(script, small(**options, capture_video=True), tmp_path)
    times = [int(state.time[0]) for state, _, _ in drawn]
    assert times == list(range(len(times))) and len(times) > 1
    for state, title, beliefs in drawn[:-1]:
        assert int(state.items[0, 0]) == 0
        assert "[0.0, 0.0]" in title
        assert len(beliefs) == 2
        assert all(0.0 < belief < 1.0 for (belief,) in beliefs)
    state, title, _ = drawn[-1]
    hunted = int(state.items[0, 0]) < 0
    assert hunted == ("[5.0, 5.0]" in title) and hunted == (times[-1] < 35)
    assert hunted
    assert "last episode" in drawn[0][1] and "ns" in drawn[0][1]


@pytest.mark.only("hop_onestep")
def test_video_of_a_run_without_a_moa_has_no_beliefs(script, small, tmp_path, monkeypatch):
    drawn = []
    draw = script.GridGame.draw

    def noted(self, state, title, beliefs):
        drawn.append(beliefs)
        return draw(self, state, title, beliefs)

    monkeypatch.setattr(script.GridGame, "draw", noted)
    args = small(goal="none", plan_update="none", capture_video=True, total_timesteps=64)
    finished = run(script, args, tmp_path)
    assert len(drawn) > 1
    assert all(beliefs == [] for beliefs in drawn)
    assert len(frames_of(finished.path / "episode.gif")) > 1


@pytest.mark.only("hop_onestep")
def test_picture_of_a_large_world_is_of_bounded_size(script):
    game = script.GridGame("msg-16x16-64p-80d")
    state = game.start(1, torch.Generator().manual_seed(0))
    image = game.draw(state, "a large world", torch.rand(64, 80).tolist())
    assert min(image.shape[:2]) > 300 and max(image.shape[:2]) < 1000
    small_world = script.GridGame("msh-4x4")
    image = small_world.draw(
        small_world.start(1, torch.Generator().manual_seed(0)), "a small one", []
    )
    assert min(image.shape[:2]) > 300 and max(image.shape[:2]) < 1000


@pytest.mark.only("hop_onestep")
def test_video_of_a_pettingzoo_environment(script, small, tmp_path, monkeypatch, capsys):
    """What the environment itself renders, of every state."""
    drawn = []
    draw = script.PettingZooGame.draw

    def noted(self, state, *rest):
        drawn.append(int(state.time[0]))
        return draw(self, state, *rest)

    monkeypatch.setattr(script.PettingZooGame, "draw", noted)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    options = {"env_id": "mpe2.simple_tag_v3", "horizon": 6, "match_episodes": 1}
    args = small(**options, num_envs=2, total_timesteps=32, capture_video=True, hidden_size=8)
    finished = run(script, args, tmp_path)
    frames = frames_of(finished.path / "episode.gif")
    assert drawn == [0, 1, 2, 3, 4, 5, 6]
    assert 1 < len(frames) <= 7  # those that look alike are one
    assert frames[0].tobytes() != frames[-1].tobytes()
    assert len(frames[0].getcolors(10**6)) > 2
    (finished.path / "episode.gif").unlink()
    words = ["--evaluate", finished.path, "--eval-episodes", 2, "--num-envs", 2, "--capture-video"]
    drawn.clear()
    assert main(script, monkeypatch, capsys, *words, "--match-episodes", 1)[0] == 0
    assert drawn == [0, 1, 2, 3, 4, 5, 6]
    assert len(frames_of(finished.path / "episode.gif")) > 1


# ------------------------------------------------------------------------------------------------
# Weights & Biases
# ------------------------------------------------------------------------------------------------
def records_of(path):
    """The records in a file of an offline W&B run (LevelDB's log format)."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    place = 7
    content = b""
    records = []
    while place + 7 <= len(data):
        left = 32768 - place % 32768  # of the block
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        content += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # else it goes on in the next block
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            records.append(record)
            content = b""
    return records


def logged_offline(folder, runs):
    """{step: metric names} and {(id, project)} of the finished offline W&B runs in `folder`, when
    there are as many as `runs`: files are written a little after a run is finished."""
    deadline = time.monotonic() + 30
    exits = 0
    while exits < runs:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        files = [records_of(path) for path in folder.rglob("*.wandb")]
        exits = sum(records[-1].WhichOneof("record_type") == "exit" for records in files if records)
    assert len(files) == runs
    steps = {}
    ids = set()
    for record in itertools.chain(*files):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            ids.add((record.run.run_id, record.run.project))
        if kind == "history":
            names = {item.key or item.nested_key[0] for item in record.history.item}
            steps[record.history.step.num] = names
    return steps, ids


@pytest.mark.only("hop_onestep")
def test_tracking_offline(script, small, tmp_path, monkeypatch):
    """The run is finished, so that the next logs nothing into it; its id is kept and used again."""
    import wandb

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked = run(script, small(track=True, wandb_project_name="project-x"), tmp_path)
    assert wandb.run is None
    first = logged_offline(tmp_path, 1)
    content = script.load_checkpoint(tracked.path)
    *_, tracking_id = content["progress"]
    assert first[1] == {(tracking_id, "project-x")}
    assert set(first[0]) == {64, 128}
    for step, names in first[0].items():
        assert {"losses/policy", "moa/nll", "charts/SPS"} <= names, step
    run(script, small(), tmp_path)
    assert logged_offline(tmp_path, 1) == first
    args = script.Args(**content["args"])
    args = dataclasses.replace(args, resume=str(tracked.path), total_timesteps=192)
    run(script, args, tmp_path)
    steps, ids = logged_offline(tmp_path, 2)
    assert set(steps) == {64, 128, 192}
    assert ids == first[1]
    assert script.load_checkpoint(tracked.path)["progress"] == [192, 3, tracking_id]


@pytest.mark.only("hop_onestep")
def test_tracking_without_a_login_is_refused(script, tmp_path):
    """In one line, with status 2, and without a folder or a question."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "WANDB_MODE": "online"}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    words = [sys.executable, script.__file__, "--track", "--total-timesteps", "5000"]
    finished = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert "wandb login" in line and "--track" in line
    assert not (tmp_path / "runs").exists() and not (tmp_path / "wandb").exists()

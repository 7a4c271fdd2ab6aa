"""Few-shot evaluation: what `evaluate` plays, counts and returns."""

import dataclasses
import math
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import OWN, plans, small_args
from run_tools import broken_run, main, refused, run, trust

ENV_ID = "msh-3x3-3p-2h1s"
OTHER = "msh-2x7-3p-1h1s"
OFFSET = {"plan_update": "offset", "plan_until": 1.0, "update_epochs": 1}
CELL = "msh-1x1-2p-0h1s"  # one cell and one stag: whoever hunts can, and two hunters catch it


@pytest.fixture(scope="module")
def done(script, small, tmp_path_factory):
    """The folder of a run with a planner, if there is one, that is on, and trusted, at its end."""
    folder = tmp_path_factory.mktemp("done")
    return run(script, small(env_id=ENV_ID, co_players="self,nh", **OFFSET), folder, trust).path


@pytest.fixture(scope="module")
def plain(script, small, tmp_path_factory):
    """The folder of a run without a planner."""
    folder = tmp_path_factory.mktemp("plain")
    return run(script, small(env_id=ENV_ID, plan_update="none", update_epochs=1), folder).path


@pytest.fixture(scope="module")
def foreign(sibling, tmp_path_factory):
    """As `done`, of another script."""
    folder = tmp_path_factory.mktemp("foreign")
    args = small_args(sibling, env_id=ENV_ID, co_players="self,nh", **OFFSET)
    return run(sibling, args, folder, trust).path


@pytest.fixture
def planned(monkeypatch):
    """Notes the planner's scores and the options that it goes by, whenever it is asked: a list.
    Where there is no planner, the goals that are assigned."""
    calls = []

    def note(script):
        owner, name = (script, "scores") if plans(script) else (script.MOA, "encode")
        function = getattr(owner, name)

        def noted(agent, *inputs):
            result = function(agent, *inputs)
            calls.append((result, agent.args))
            return result

        monkeypatch.setattr(owner, name, noted)
        return calls

    return note


class Constant:
    """Plays one action all the time, and notes what is asked of it."""

    action = 4
    steps = Counter()

    def __call__(self, observation, action_mask, clock, generator):
        self.steps[len(observation)] += 1
        return torch.full((len(observation),), self.action)


@pytest.fixture
def constant():
    """Makes a co-player that always plays one action."""
    Constant.steps = Counter()
    return lambda action: type("Constant", (Constant,), {"action": action})


# ------------------------------------------------------------------------------------------------
# What it returns
# ------------------------------------------------------------------------------------------------
def test_keys_and_exactly_the_episodes_asked_for(script, done):
    result = script.evaluate(done, "nh", episodes=10, num_envs=2, match_episodes=4)
    assert set(result) == {"focal_return", "focal_returns", "co_player_return", "by_episode"}
    returns = result["focal_returns"]
    assert len(returns) == 10
    assert result["focal_return"] == pytest.approx(sum(returns) / 10)
    assert all(type(value) is float for value in [*returns, *result["by_episode"]])
    assert type(result["focal_return"]) is type(result["co_player_return"]) is float
    assert len(result["by_episode"]) == 4


def test_fewer_episodes_than_a_match_has(script, done):
    result = script.evaluate(done, "nh", episodes=3, match_episodes=1000)
    assert len(result["focal_returns"]) == len(result["by_episode"]) == 3
    assert result["by_episode"] == result["focal_returns"]
    assert result["focal_return"] == pytest.approx(sum(result["focal_returns"]) / 3)


@pytest.mark.only("hop_onestep")
@pytest.mark.parametrize("num_envs", [1, 2, 3, 64])
@pytest.mark.parametrize("episodes", [7, 12])
def test_every_episode_counts_once_and_in_order(script, done, monkeypatch, num_envs, episodes):
    """Each game plays match after match, of three episodes, every `num_envs`-th; what is played
    beyond the episodes that were asked for does not count."""
    games = min(num_envs, math.ceil(episodes / 3))
    played = torch.zeros(games)

    class Numbered(script.GridGame):
        """An episode's return is 100 times the number of the game, and its number in that."""

        def step(self, state, actions):
            state, reward, terminated, truncated = super().step(state, actions)
            ended = (terminated | truncated).all(1)
            number = ended * (100 * torch.arange(games) + played)
            played.add_(ended)
            return state, number[:, None].expand_as(reward), terminated, truncated

    monkeypatch.setattr(script, "GridGame", Numbered)
    options = {"episodes": episodes, "num_envs": num_envs, "match_episodes": 3}
    result = script.evaluate(done, "nh,random", **options)
    expected = []
    for number in range(episodes):
        rounds, game = divmod(number // 3, games)
        expected.append(100.0 * game + 3 * rounds + number % 3)
    assert result["focal_returns"] == expected
    assert result["focal_return"] == pytest.approx(sum(expected) / episodes)
    assert result["co_player_return"] == pytest.approx(result["focal_return"])
    means = [sum(expected[k::3]) / len(expected[k::3]) for k in range(3)]
    assert result["by_episode"] == pytest.approx(means)


def test_returns_are_counted_to_the_end_of_an_episode(script, done, constant):
    """With a co-player that never hunts all episodes last 35 steps and bring nothing; with one that
    always does, both hunt or none, so both returns are the same, 0 or 5."""
    options = {"env_id": CELL, "match_episodes": 3}
    result = script.evaluate(done, constant(4), episodes=12, num_envs=2, **options)
    assert result["focal_returns"] == [0.0] * 12
    assert result["co_player_return"] == 0.0
    assert Constant.steps == {4: 2 * 3 * 35}  # two matches in each of two games with two seats
    result = script.evaluate(done, constant(5), episodes=20, **options)
    assert set(result["focal_returns"]) <= {0.0, 5.0} and 5.0 in result["focal_returns"]
    assert result["co_player_return"] == pytest.approx(result["focal_return"])


def test_returns_of_a_drift_that_is_always_removed(script, small, tmp_path, constant):
    """One cell, one drift, two players that always remove it: 6 for each, less a share of 4."""
    args = small(env_id="msg-1x1-3p-1d", co_players="cleaner,exploiter", total_timesteps=64)
    path = run(script, args, tmp_path).path
    result = script.evaluate(path, constant(5), episodes=30, match_episodes=3)
    removed = []
    for value in result["focal_returns"]:
        assert value in (pytest.approx(6.0), pytest.approx(6 - 4 / 3))
        removed.append(value < 5.0)
    share = sum(removed) / 30
    assert 0.0 < share < 1.0
    others = share * (6 - 4 / 3) + (1 - share) * 4
    assert result["co_player_return"] == pytest.approx(others)
    with pytest.raises(script.UsageError):
        script.evaluate(path, "cleaner", env_id=ENV_ID)
    with pytest.raises(script.UsageError):
        script.evaluate(path, "nh")


# ------------------------------------------------------------------------------------------------
# What it plays
# ------------------------------------------------------------------------------------------------
def test_seed_determines_it_and_the_callers_random_state_is_left_alone(script, done):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = script.evaluate(done, "random", episodes=20, match_episodes=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    options = {"episodes": 20, "match_episodes": 2}
    assert script.evaluate(done, "random", **options) == first
    assert script.evaluate(done, "random", **options, seed=2) != first


def test_focal_player_sits_on_every_seat(script, done, monkeypatch):
    """The one learned player of a match is dealt a seat at random; it alone is the focal one."""
    dealt = []
    made = script.CoPlayers

    class Noted(made):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options)
            dealt.append((self.focal.clone(), self.kind.clone()))

    monkeypatch.setattr(script, "CoPlayers", Noted)
    options = {"episodes": 60, "match_episodes": 1, "num_envs": 60}
    script.evaluate(done, "nh", env_id="msh-2x2-4p-2h1s", **options)
    ((focal, kind),) = dealt
    counts = torch.bincount(focal, minlength=4)
    assert (counts >= 5).all() and int(counts.sum()) == 60
    learner = kind == 0
    assert (learner.sum(1) == 1).all()
    assert torch.equal(learner.int().argmax(1), focal)


def test_forms_of_co_players(script, done):
    """One for all of them, or N-1; names, callables and checkpoints."""

    def stay(observation, action_mask, clock, generator):
        return torch.full((len(observation),), 4)

    options = {"episodes": 6, "match_episodes": 2}
    groups = [
        ["nh", "nh,nh", ["nh"], ("nh", "nh")],
        ["ns,nh", ["ns", "nh"]],
        [str(done), f"{done},{done}", [str(done)] * 2],
        [str(done / "checkpoint.pt"), [done / "checkpoint.pt"]],
        [stay, [stay], [stay, stay]],
    ]
    results = []
    for forms in groups:
        played = [script.evaluate(done, form, **options) for form in forms]
        assert all(result == played[0] for result in played), forms
        results.append((*played[0]["focal_returns"], played[0]["co_player_return"]))
    assert results[2] == results[3]  # a folder and its checkpoint
    assert len(set(results)) >= 3  # nobody may earn anything beside those who stay
    for wrong in (["nh"] * 3, "nh,nh,nh", [], ["nh", 3], "nobody", "", [stay, "cleaner"]):
        with pytest.raises(script.UsageError):
            script.evaluate(done, wrong, episodes=2)


def test_run_of_another_script_is_played_by_that(script, sibling, done, foreign, planned, tmp_path):
    """Its planner, or its assignment of goals, included; in an evaluation and in training."""
    game = script.make_game(script.Args(env_id=ENV_ID), "cpu")
    player = script.load_player(foreign, game, 2)
    assert type(player) is sibling.Player is not script.Player
    weights = script.load_checkpoint(foreign)["agent"]
    for name, value in player.agent.state_dict().items():
        assert torch.equal(value, weights[name])
    calls = planned(sibling)
    result = script.evaluate(done, foreign, episodes=4, match_episodes=2)
    assert len(result["focal_returns"]) == 4
    names = {field.name for field in dataclasses.fields(sibling.Args)}
    assert calls and all(set(vars(args)) == names for _, args in calls)
    calls.clear()
    options = {"co_players": f"self,{foreign}", "num_steps": 40, "total_timesteps": 160}
    finished = run(script, small_args(script, env_id=ENV_ID, **options), tmp_path)
    assert calls and f"returns/{foreign}" in finished.metrics


def test_run_of_another_script_in_a_process_of_its_own(script, done, foreign, tmp_path):
    """The other one is found beside it, from any folder."""
    words = ["--evaluate", done, "--co-players", foreign, "--eval-episodes", "2"]
    finished = subprocess.run(
        [sys.executable, script.__file__, *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 episodes" in finished.stdout


def test_run_of_another_script_is_no_run_of_this_one(
    script, foreign, tmp_path, monkeypatch, capsys
):
    """To evaluate, to go on with or to start from: refused."""
    monkeypatch.chdir(tmp_path)
    for option in ("--evaluate", "--resume", "--init"):
        line = refused(script, monkeypatch, capsys, option, foreign)
        assert "run of other options" in line


def test_other_games_of_the_family(script, done):
    """No network depends on the size of the world or on the numbers of players and items."""
    games = {"msh-5x2-2p-3h2s": 2, "msh-4x4-5p-1h2s": 5, "msh-4x4-4h1s": 4}
    for env_id, players in games.items():
        best = script.GridGame(env_id).best_return * players
        for co_players in (["nh"] * (players - 1), "self"):
            result = script.evaluate(done, co_players, env_id=env_id, episodes=4, match_episodes=2)
            assert len(result["focal_returns"]) == 4
            assert all(0.0 <= value <= best for value in result["focal_returns"])


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_planner_is_on_as_asked(script, done, plain, planned):
    calls = planned(script)
    options = {"episodes": 4, "match_episodes": 2}
    script.evaluate(done, "nh", **options)
    assert {args.plan_update for _, args in calls} == {"offset"}
    calls.clear()
    script.evaluate(done, "nh", **options, plan_update="none")
    script.evaluate(plain, "nh", **options)
    assert not calls
    script.evaluate(done, "nh", **options, plan_update="hop", plan_beta=3.0)
    assert {(args.plan_update, args.plan_beta) for _, args in calls} == {("hop", 3.0)}


@pytest.mark.only("hop_mcts")
def test_search_is_played_as_asked(script, done, monkeypatch):
    """With the options in PLAYED of the run, or as they say."""
    calls = []
    search = script.search

    def noted(model, value, args):
        q, visits = search(model, value, args)
        own = (args.num_simulations, args.num_goal_samples, args.puct_c, args.max_depth)
        if len(visits):  # else no player decides
            calls.append((int(visits.sum(1).unique()), *own))
        return q, visits

    monkeypatch.setattr(script, "search", noted)
    options = {"episodes": 4, "match_episodes": 2}
    script.evaluate(done, "nh", **options)
    assert set(calls) == {(4, 4, 2, 1.25, 50)}
    calls.clear()
    own = {"num_simulations": 7, "num_goal_samples": 1, "puct_c": 2.0, "max_depth": 1}
    script.evaluate(done, "nh", **options, **own)
    assert set(calls) == {(7, *own.values())}


@pytest.mark.only("hop_mcts")
@pytest.mark.parametrize("plan_update", ["offset", "hop"])
def test_exact_planner_on_top_of_a_plain_run(script, plain, planned, plan_update):
    """It steps the game and needs no training: it is trusted in full, and what is played is another
    policy."""
    calls = planned(script)
    options = {"episodes": 20, "match_episodes": 2, "plan_beta": 100.0}
    result = script.evaluate(plain, "nh", **options, plan_update=plan_update)
    assert len(calls) > 10 and max(scores.std() for scores, _ in calls) > 0.0
    assert result != script.evaluate(plain, "nh", **options)
    game = script.make_game(script.Args(env_id=ENV_ID), "cpu")
    player = script.load_player(plain, game, 2, plan_update=plan_update)
    assert float(player.agent.plan_slope) == 1.0
    assert float(script.load_checkpoint(plain)["agent"]["plan_slope"]) == 0.0


@pytest.mark.only("hop_mcts")
def test_exact_planner_on_top_of_a_plain_run_on_the_command_line(
    script, plain, planned, monkeypatch, capsys
):
    calls = planned(script)
    words = ["--evaluate", plain, "--co-players", "nh", "--eval-episodes", 4]
    status, out, _ = main(script, monkeypatch, capsys, *words)
    assert status == 0 and "4 episodes" in out and not calls
    status, out, _ = main(script, monkeypatch, capsys, *words, "--plan-update", "offset")
    assert status == 0 and "4 episodes" in out and calls


@pytest.mark.only("hop_onestep")
def test_planner_is_played_as_asked(script, done, plain, monkeypatch):
    """As at the end of the run, or as the options in PLAYED say."""
    calls = []
    outcome = script.outcome

    def noted(network, own, others, other_actions, action):
        calls.append(other_actions.shape[1])
        return outcome(network, own, others, other_actions, action)

    monkeypatch.setattr(script, "outcome", noted)
    options = {"episodes": 4, "match_episodes": 2}
    script.evaluate(done, "nh", **options)
    assert set(calls) == {4}
    calls.clear()
    script.evaluate(done, "nh", **options, plan_update="none")
    script.evaluate(plain, "nh", **options)
    assert not calls
    script.evaluate(done, "nh", **options, plan_update="hop", plan_samples=3)
    assert set(calls) == {3}
    with pytest.raises(script.UsageError, match="has not learnt"):  # a network never trained
        script.evaluate(plain, "nh", **options, plan_update="offset")


HOP = {"plan_update": "hop"}
LONG = {
    "hop_onestep": HOP,
    "hop_mcts": {**HOP, "num_simulations": 16},  # after 4 puct_c decides little
    "hop_ppo_gumbel": {},
    "latent_world_model": HOP,
}
PLANNER = {"plan_update": "none", "plan_beta": 0.0}
PLAY = {  # other values of the options in PLAYED
    "hop_onestep": {**PLANNER, "plan_samples": 1},
    "hop_mcts": {
        **PLANNER,
        "num_simulations": 1,
        "num_goal_samples": 1,
        "puct_c": 20.0,
        "max_depth": 1,
    },
    "hop_ppo_gumbel": {"assignment": "hard"},
    "latent_world_model": {**PLANNER, "plan_samples": 1, "co_player_model": "ns"},
}


def test_every_option_of_play_changes_what_is_played(script, done, tmp_path):
    options = {"episodes": 40, "match_episodes": 4, **LONG[script.SCRIPT]}
    path = done
    if not plans(script):  # the first policies hardly depend on goals: one that does
        path = tmp_path / "checkpoint.pt"
        content = script.load_checkpoint(done)
        content["agent"]["actor.out.weight"] *= 100.0
        torch.save(content, path)
    first = script.evaluate(path, "nh", **options)
    assert set(PLAY[script.SCRIPT]) == set(script.PLAYED)
    for name, value in PLAY[script.SCRIPT].items():
        assert script.evaluate(path, "nh", **{**options, name: value}) != first, name


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_players_remember_before_the_next_state_is_seen(script, done):
    """All steps of the episode, the last one included."""
    times = []

    def watch(player, state, **others):
        steps = player.memory[:, :, 1, -1]
        assert torch.equal(steps, state.time.unsqueeze(1).expand_as(steps))
        times.append(int(state.time[0]))

    script.evaluate(done, "nh", env_id=CELL, episodes=2, match_episodes=2, watch=watch)
    assert times == [*range(36)] * 2


@pytest.mark.only("hop_ppo_gumbel")
def test_likelihoods_of_all_steps_are_remembered(script, done):
    """As above, by how unlikely under every goal all that was done is; begun anew by an episode."""
    times = []
    before = []

    def watch(player, state, **others):
        likelihood = player.memory[:, :, 1]
        time = int(state.time[0])
        assert not likelihood.any() if time == 0 else (likelihood < before[-1]).all()
        times.append(time)
        before.append(likelihood)

    script.evaluate(done, "nh", env_id=CELL, episodes=2, match_episodes=2, watch=watch)
    assert times == [*range(36)] * 2


@pytest.mark.only("hop_ppo_gumbel")
def test_assignment_is_played_as_asked(script, done, planned):
    """As in the run, or as asked: shares of goals, one for each, and one-to-one."""
    calls = planned(script)
    options = {"episodes": 4, "match_episodes": 2}
    largest = {}
    for play in ({}, {"assignment": "hard"}, {"assignment": "exclusive"}):
        calls.clear()
        script.evaluate(done, "nh", **options, **play)
        name = play.get("assignment", "soft")
        assert calls and {args.assignment for _, args in calls} == {name}
        shares = torch.stack([share for (_, share), _ in calls])
        assert torch.allclose(shares.sum(3), torch.ones(()))
        largest[name] = shares.amax(3).min()
        if name == "exclusive":  # three goals of three players
            assert torch.allclose(shares.sum(2), torch.ones(()))
    assert largest["hard"] == 1.0 > largest["soft"]
    with pytest.raises(script.UsageError, match="exclusive"):
        script.evaluate(done, "nh", env_id="msh-3x3-4p-2h1s", assignment="exclusive")


@pytest.mark.only("hop_onestep", "hop_mcts", "latent_world_model")
def test_planner_can_be_switched_off_before_it_has_learnt(script, small, tmp_path):
    """A checkpoint of the first steps is played without it."""
    path = broken_run(script, small(env_id=ENV_ID, plan_update="offset"), tmp_path, 1)
    options = {"episodes": 2, "plan_update": "none"}
    assert len(script.evaluate(path, "nh", **options)["focal_returns"]) == 2


def test_wrong_options_of_an_evaluation(script, done):
    names = [*PLAY[script.SCRIPT], "episodes", "num_envs", "match_episodes", "no_such_option"]
    for name in names:
        with pytest.raises(script.UsageError):
            script.evaluate(done, "nh", **{"episodes": 2, name: 0})
    for path in ("", "nowhere", str(done / "args.json"), str(done.parent)):
        with pytest.raises(script.UsageError):
            script.evaluate(path, "nh", episodes=2)


# ------------------------------------------------------------------------------------------------
# On the command line
# ------------------------------------------------------------------------------------------------
def test_evaluation_on_the_command_line(script, done, tmp_path, monkeypatch, capsys):
    """Prints what `evaluate` returns, on the game that was trained on, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    words = f"--evaluate {done} --co-players nh,ns --eval-episodes 9 --match-episodes 3"
    words = f"{words} --seed 4 --num-envs 2".split()
    status, out, _ = main(script, monkeypatch, capsys, *words)
    assert status == 0
    options = {"episodes": 9, "num_envs": 2, "match_episodes": 3, "seed": 4}
    result = script.evaluate(done, "nh,ns", **options)
    focal, others, by_episode = out.splitlines()
    means = [sum(result["focal_returns"][k : k + 3]) / 3 for k in (0, 3, 6)]
    centre = sum(means) / 3
    spread = math.sqrt(sum((mean - centre) ** 2 for mean in means) / 2)
    assert f"{result['focal_return']:.3f} +- {1.96 * spread / math.sqrt(3):.3f}" in focal
    assert "9 episodes" in focal
    assert f"{result['co_player_return']:.3f}" in others and "nh,ns" in others
    figures = by_episode.split("[")[1].rstrip("]").split()
    assert [float(figure) for figure in figures] == pytest.approx(result["by_episode"], abs=0.0051)
    assert not list(tmp_path.iterdir())
    assert {path.name for path in done.iterdir()} & {"episode.gif"} == set()


def test_evaluation_of_one_match_has_no_finite_interval(script, done, monkeypatch, capsys):
    words = ["--evaluate", done, "--co-players", "nh", "--eval-episodes", 2, "--match-episodes", 2]
    status, out, error = main(script, monkeypatch, capsys, *words)
    assert status == 0
    assert "nan" not in out and "+- inf" in out
    assert "Warning" not in error


def test_evaluation_writes_a_video(script, done, tmp_path, monkeypatch, capsys):
    """Beside the checkpoint, of one match with the same co-players."""
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "checkpoint.pt").write_bytes((done / "checkpoint.pt").read_bytes())
    drawn = []
    draw = script.GridGame.draw

    def noted(self, state, title, beliefs):
        drawn.append(title)
        return draw(self, state, title, beliefs)

    monkeypatch.setattr(script.GridGame, "draw", noted)
    words = f"--evaluate {copied} --co-players nh,ns --eval-episodes 2 --match-episodes 2".split()
    status, _, _ = main(script, monkeypatch, capsys, *words, "--capture-video")
    assert status == 0
    with Image.open(copied / "episode.gif") as image:
        assert 1 < image.n_frames <= 36
        assert image.n_frames == len(drawn)
    assert all("nh,ns" in title for title in drawn)
    drawn.clear()
    sizes = []
    monkeypatch.setattr(script.GridGame, "draw", lambda self, *given: sizes.append(self.width))
    monkeypatch.setattr(script.Image, "fromarray", lambda array: Image.new("RGB", (2, 2)))
    status, _, _ = main(script, monkeypatch, capsys, *words, "--env-id", OTHER, "--capture-video")
    assert status == 0 and set(sizes) == {7}  # of the game that was played


def test_checkpoint_is_played_with_its_own_options(script, done):
    """Also where the defaults of the script are others: the options that count are the run's."""
    args = script.load_checkpoint(done)["args"]
    game = script.make_game(script.Args(**args), "cpu")
    player = script.load_player(done, game, 2)
    assert isinstance(player, script.Player)
    assert dataclasses.asdict(player.agent.args)["hidden_size"] == 16
    played = dataclasses.asdict(player.agent.args)
    assert {name: played[name] for name in OWN[script.SCRIPT]} == OWN[script.SCRIPT]
    if plans(script):
        assert player.agent.plan_mode == "offset"


def test_evaluation_through_a_relative_path(script, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    relative = script.evaluate(Path(done.name), "nh", episodes=2)
    assert relative == script.evaluate(done, "nh", episodes=2)
    assert isinstance(types.SimpleNamespace(**relative).focal_return, float)

"""Checkpoints played: as co-players, and with other options than they were trained with."""

import contextlib
import io
import sys

import pytest
import torch

from siblings.conftest import SMALL
from siblings.test_runs import refused

ENV_ID = "msh-3x3-3p-2h1s"
SIZES = {"episodes": 6, "match_episodes": 2, "num_envs": 3}


@pytest.fixture(scope="module")
def path(script, tmp_path_factory):
    """Folder of a small run."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = script.train(script.Args(env_id=ENV_ID, co_players="self,nh", **SMALL))["run"]
    return str(folder / run)


def test_a_checkpoint_is_a_co_player(script, path):
    """By its run's folder or its file, for all seats or each; in other games of the family."""
    result = script.evaluate(path, path, **SIZES)
    assert result == script.evaluate(path, [path] * 2, **SIZES)
    assert result == script.evaluate(f"{path}/checkpoint.pt", f"{path}/checkpoint.pt", **SIZES)
    smaller = script.evaluate(path, path, env_id="msh-2x3-3p-1h1s", **SIZES)
    assert len(smaller["focal_returns"]) == 6


def test_a_checkpoint_of_a_missing_script_is_refused(script, path, tmp_path):
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    for name in ("another", "../hop_onestep", "os"):
        torch.save({**content, "script": name}, tmp_path / "checkpoint.pt")
        with pytest.raises(script.UsageError, match="or of a script beside it"):
            script.evaluate(tmp_path, "nh", **SIZES)


def test_a_checkpoint_of_another_script_is_refused(script, path, tmp_path):
    """Those of the present shape are played otherwise."""
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    for name in ("hop_onestep", "hop_mcts", "hop_ppo_gumbel"):
        torch.save({**content, "script": name}, tmp_path / "checkpoint.pt")
        with pytest.raises(script.UsageError, match=f"cannot import {name}"):
            script.evaluate(path, str(tmp_path), **SIZES)
        with pytest.raises(script.UsageError):
            script.train(script.parse_arguments(["--resume", str(tmp_path)]))


def test_a_game_of_the_other_family_is_refused_in_one_line(script, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    game = ["--env-id", "msg-3x3-3p-2d"]
    for words in ([*game, "--co-players", path], ["--evaluate", path, *game, "--co-players", "cleaner"]):
        line = refused(script, monkeypatch, capsys, *words)
        assert "it cannot play msg-3x3-3p-2d" in line and "import" not in line


def test_a_run_with_a_checkpoint_as_co_player_is_resumed(script, path, small):
    """What that co-player remembers is saved and taken up again."""
    args = small(env_id=ENV_ID, co_players=f"self,{path}")
    first, second = script.Trainer(args), script.Trainer(args)
    first.iterate()
    saved = io.BytesIO()
    torch.save(first.content(), saved)
    saved.seek(0)
    second.load(torch.load(saved, weights_only=True))
    for k, memory in first.co_players.memory.items():
        assert type(second.co_players.memory[k]) is type(memory)
        assert all(torch.equal(a, b) for a, b in zip(memory, second.co_players.memory[k], strict=True))
    for trainer in (first, second):
        trainer.iterate()
    weights = zip(first.agent.parameters(), second.agent.parameters(), strict=True)
    assert first.co_players.memory and all(torch.equal(a, b) for a, b in weights)


def test_a_planner_that_was_never_trained_is_not_switched_on(script, tmp_path, path):
    """It would plan by what its networks were initialised with."""
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    untold = {"goal": "none", "plan_update": "none"}  # nothing trains the MOA, nor what is learnt by planning
    for options in (untold, {"plan_update": "none"}, {"plan_until": 0.0}):
        torch.save({**content, "args": {**content["args"], **options}}, tmp_path / "checkpoint.pt")
        with pytest.raises(script.UsageError, match="trained"):
            script.load_agent(tmp_path, options={"plan_update": "hop"})


def test_the_planner_can_be_switched_off_and_on(script, path):
    trained = script.load_agent(path)
    off = script.load_agent(path, options={"plan_update": "none"})
    assert (trained.plan_mode, off.plan_mode) == ("none", "none")  # --plan-until is over
    on = script.load_agent(path, options={"plan_update": "hop", "plan_beta": 3.0})
    assert (on.plan_mode, on.args.plan_beta) == ("hop", 3.0)
    assert float(on.plan_slope) == 1.0 and 1e-3 <= float(on.plan_rms) < 5.0
    assert float(on.plan_rms) != float(trained.plan_rms)
    results = [
        script.evaluate(path, "nh", **SIZES, **play) for play in ({}, {"plan_update": "none"}, {"plan_update": "hop"})
    ]
    assert results[0] == results[1] != results[2]


def test_the_scale_of_a_planner_that_was_off_is_that_of_its_scores(script, path):
    """Scores are divided by the root mean square that they have where the policy plays alone and has a choice."""
    agent = script.load_agent(path, options={"plan_update": "offset"})
    generator, squares, count, measured = torch.Generator().manual_seed(5), 0.0, 0, float(agent.plan_rms)
    agent.plan_rms.fill_(1e9)  # the scores do not count in play
    state, memory = agent.game.initial_state(64, generator), agent.moa.initial_memory(64)
    for _ in range(agent.game.horizon):  # whole episodes: scores differ from the start of one to its end
        mask = agent.game.action_mask(state)
        decision = agent.act(state, mask, memory, torch.ones_like(state.players, dtype=torch.bool), generator, None)
        for q, legal in zip(decision.q_plan.flatten(0, 1), mask.flatten(0, 1), strict=True):
            if legal.sum() > 1:
                squares, count = squares + float((q[legal] - q[legal].mean()).square().sum()), count + int(legal.sum())
        after, _, terminated, truncated = agent.game.step(state, decision.action)
        ended = terminated | truncated
        memory = agent.remember(memory, state, decision.action, ended, ended)
        state = after.replaced(ended, agent.game.initial_state(64, generator))
    assert measured == pytest.approx((squares / count) ** 0.5, rel=0.25)


def test_the_scale_is_measured_on_the_game_that_is_played(script, path, monkeypatch):
    env_id, play, seen = "msh-6x6-2p-4h3s", script.play_matches, []
    monkeypatch.setattr(script, "play_matches", lambda agent, *rest: seen.append(agent) or play(agent, *rest))
    for game in (None, env_id):
        script.evaluate(path, "nh", env_id=game, **SIZES, plan_update="offset")
    turned = script.load_agent(path)
    turned.on_game(env_id)
    turned.turn_planner("offset")
    assert seen[1].game.id == turned.game.id and torch.equal(seen[1].plan_rms, turned.plan_rms)
    assert not torch.equal(seen[0].plan_rms, turned.plan_rms)


def test_played_options_on_the_command_line(script, path, monkeypatch, capsys):
    seen, load = [], script.load_agent
    monkeypatch.setattr(
        script, "load_agent", lambda p, d, options, game: (seen.append(options), load(p, d, options, game))[1]
    )
    words = ["--evaluate", path, "--co-players", "nh", "--eval-episodes", "4", "--match-episodes", "2"]
    for more in ([], ["--plan-update", "offset"]):
        monkeypatch.setattr(sys, "argv", ["script", *words, *more])
        script.main()
    assert seen == [{}, {"plan_update": "offset"}]
    assert "focal return" in capsys.readouterr().out
    with pytest.raises(script.UsageError, match="options that may change when an agent is played"):
        script.evaluate(path, "nh", learning_rate=1.0)
    with pytest.raises(script.UsageError, match="must be one of"):
        script.evaluate(path, "nh", plan_update="perhaps")


def test_what_cannot_be_judged_is_refused_before_a_game_is_played(script, path, monkeypatch, capsys):
    """`--evaluate` with `--dataset`, and no such file."""
    monkeypatch.setattr(script, "evaluate", None)
    words = ["--evaluate", path, "--co-players", "nh", "--dataset", "nowhere.npz"]
    monkeypatch.setattr(sys, "argv", ["latent_world_model.py", *words])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and "no data set at nowhere.npz" in capsys.readouterr().err

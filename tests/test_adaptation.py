"""What the figures of benchmarks/adaptation.py rest on, and the strangers that it has."""

from math import isnan

import pytest
import torch

import adaptation
import strangers

TINY = {"env_id": "msh-3x3-3p-2h1s", "total_timesteps": 2048, "num_envs": 16, "hidden_size": 16}


def test_an_episode_counts_in_the_window_in_which_it_ends():
    found = adaptation.windows([(0, 1.0), (299, 3.0), (300, 5.0), (899, 7.0), (900, 9.0)], 900)
    assert found[:2] == [2.0, 5.0] and found[2] == 7.0
    assert isnan(adaptation.windows([(0, 1.0)], 600)[1])


def test_scores_lie_between_random_play_and_who_was_trained_on_the_same():
    reference = {"setting": "reference | msg | exploiter", "game": "msg", "kind": "exploiter"}
    scales = adaptation.scale([{**reference, "random": 2.0, "trained": [10.0, 12.0]}])
    result = {"game": "msg", "kind": "exploiter", "learning": [[2.0, 7.0, 12.0], [2.0, 2.0, 7.0]]}
    assert adaptation.scored(result, "learning", scales).tolist() == [[0, 0.5, 1], [0, 0, 0.5]]
    assert adaptation.late(adaptation.scored(result, "learning", scales)) == 0.5
    assert adaptation.scored(result, "frozen", scales) is None
    near = adaptation.scale([{**reference, "random": 11.9, "trained": [12.0]}])
    assert adaptation.scored(result, "learning", near) is None


def small_run(folder, **options):
    script = adaptation.ppo
    plain = {"goal": "none", "plan_update": "none", "co_players": "self"}
    with adaptation.quiet(folder):
        name = script.train(script.Args(**TINY, **plain | options))["run"]
    return str(folder / name)


def test_frozen_matches_are_played_as_evaluation_plays_them(tmp_path):
    """One match of 20 episodes from the same random numbers: history is carried on."""
    path = small_run(tmp_path, goal="inferred")
    content = adaptation.ppo.load_checkpoint(path)
    for name, weight in content["agent"].items():
        if name.endswith("weight"):
            torch.nn.init.normal_(weight, std=0.3)  # so that history matters
    torch.save(content, f"{path}/checkpoint.pt")
    options = {"episodes": 20, "num_envs": 1, "match_episodes": 10**6, "seed": 3}
    expected = adaptation.ppo.evaluate(path, "ns", **options)["focal_returns"]
    steps = 20 * 35
    returns, first = adaptation.frozen(adaptation.ppo, path, "ns", 1, steps, 3)
    assert first == pytest.approx(sum(expected[:10]) / 10)
    assert len(returns) == steps // adaptation.WINDOW


def test_a_learning_co_player_gets_what_pays(tmp_path):
    """Rewarded for one action whatever happens, it comes to prefer it. The learner does not learn
    here, and of the agents only that of the co-players changes."""
    script = adaptation.ppo
    path = small_run(tmp_path)
    learner = adaptation.Learner()
    chosen = []

    def watch(co_players, storage, **variables):
        weights = [agent.agent.actor.out.weight for agent in co_players.agents.values()]
        before = [weight.clone() for weight in weights]
        stays = torch.stack(storage["action"]) == script.STAY
        chosen.append(float(stays[:, co_players.kind == 1].float().mean()))
        storage["reward"] = [*stays.float()]
        learner.learn(co_players=co_players, storage=storage, **variables)
        assert [torch.equal(x, y) for x, y in zip(before, weights)] == [True, False]

    words = ["--init", path, "--co-players", path, "--num-envs", "16", "--num-steps", "20"]
    with adaptation.quiet(tmp_path):
        script.train(script.parse_arguments([*words, "--total-timesteps", "1920"]), watch)
    assert chosen[-1] > chosen[0] + 0.2


FAMILIES = {"msh": "msh-4x4-4h1s", "msg": "msg-4x4-4p-6d"}


def played_by(family, name, steps=35, batch=64):
    """Bool [steps, B, M]: items that are left after each step of games in which strangers sit at
    all seats but one, where a player stays."""
    script = adaptation.ppo
    game = script.GridGame(FAMILIES[family])
    generator = torch.Generator().manual_seed(1)
    entry = getattr(strangers, name)
    players = script.CoPlayers(game, [entry] * 3, batch, 10**6, generator, fixed=True)
    state = game.start(batch, generator)
    left = []
    for _ in range(steps):
        mask = game.action_mask(state)
        actions = players.act(state, mask)
        assert script.pick(mask, actions).all()
        actions = torch.where(players.kind == 0, game.idle(mask), actions)
        state, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        left.append(state.items >= 0)
        players.observe(ended)
        state = game.restart(state, ended, generator)
    return torch.stack(left)


def test_strangers_do_what_they_are_said_to_do():
    left = played_by("msh", "Waiting", 10)
    assert left[7].all() and not left[9].all()
    left = played_by("msh", "Late", 14)
    assert left[:, :, 1:].all() and not left[-1, :, 0].all()  # stags come first
    left = played_by("msh", "Shy", 14)
    assert left[:, :, 0].all() and not left[-1].all()
    for family in ("msh", "msg"):
        for stranger in strangers.DEVELOPMENT[family] + strangers.HELD_OUT[family]:
            gone = ~played_by(family, stranger.__name__, 14)
            assert gone.any() and not gone[0].all()
    counts = {
        name: played_by("msg", name, 4)[-1].sum(1).float().mean()
        for name in ("Tired", "Fair", "Waverer", "Lazy", "Halves")
    }
    assert counts["Tired"] < counts["Fair"] and counts["Tired"] < counts["Waverer"]
    assert counts["Tired"] < min(counts["Lazy"], counts["Halves"]) < 6

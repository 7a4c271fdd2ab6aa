"""benchmarks/offline.py: what it writes is what was played, what it refuses, and how it judges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import offline

script = offline.script
GAME = "msh-3x3-3p-1h1s"
PLAY, WRONG = Path("play.npz"), Path("wrong.npz")


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(offline, "GAMES", 6)
    monkeypatch.setattr(offline, "EPISODES", 2)
    monkeypatch.chdir(tmp_path)


def collect(env_id=GAME, players="ns,nh,random", file=PLAY, steps=240):
    words = f"collect --env-id {env_id} --co-players {players} --steps {steps} --file {file}"
    offline.main(f"{words} --horizon 7".split())
    return dict(np.load(file))


def refusal(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        offline.main([*map(str, words)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_file_is_what_was_played():
    arrays = collect()
    game = script.GridGame(GAME, horizon=7)
    data = offline.load(PLAY, game, GAME).data
    assert all((values.numpy() == arrays[name]).all() for name, values in data.items())
    assert [x.itemsize for x in arrays.values() if x.dtype.kind in "iu" and x.ndim] == [1] * 9
    state, after = offline.states(game, data), offline.states(game, data, "next_")
    stepped, *outcome = game.step(state, data["action"].flatten(0, 1))
    told = [*after, *(data[k].flatten(0, 1) for k in ("reward", "terminated", "truncated"))]
    assert all(map(torch.equal, [*stepped, *outcome], told))
    ended = (arrays["terminated"] | arrays["truncated"]).all(2)
    assert ended.shape == (40, 6) and (arrays["time"][1:][ended[:-1]] == 0).all()
    assert all((x[6:] == y[:-6])[~ended[:-1].flatten()].all() for x, y in zip(state, after))
    assert (arrays["match_ended"] == (ended & (ended.cumsum(0) % 2 == 0))).all()


def test_all_seats_are_of_the_pool_and_told_of_matches():
    told = []
    kind = type("Told", (), {"start_match": lambda self, which: told.append(which.int())})
    players = offline.Company(script.GridGame(GAME), [kind, "ns"], 50, 2, torch.Generator())
    assert set(players.kind[torch.arange(50), players.focal].tolist()) == {1, 2}
    assert (sum(told) == (players.kind == 1).flatten()).all() and (players.kind > 0).all()


def test_what_is_refused(capsys):
    a = collect()
    changes = [{k: a[k] + 77} for k in ("action", "next_items")]
    changes += [{k: a[k][:-1]} for k in ("reward", "next_players")]
    changes += [{k: x[:0] for k, x in a.items() if x.ndim}, {"env_id": "msh-4x4-3p-1h1s"}]
    changes += [{k: a[k][:, :, :2] for k in ("players", "next_players", "action")}]
    for change in changes:
        np.savez(WRONG, **{**a, **change})
        assert "wrong.npz" in refusal(capsys, "check", WRONG)
    whole = PLAY.read_bytes()
    for content in (b"", b"text", whole[:-100], whole[:500] + b"??" + whole[502:]):
        WRONG.write_bytes(content)
        assert "wrong.npz" in refusal(capsys, "check", WRONG)
    assert "play.npz" in refusal(capsys, "check", PLAY, "--env-id", "msg")
    words = ["collect", "--co-players", "ns", "--file"]
    assert "no/x.npz" in refusal(capsys, *words, "no/x.npz")
    assert "self" in refusal(capsys, *words, "x.npz", "--co-players", "ns,self")


class Knows(nn.Module):
    """A model that looks up what the file says next; its latents are numbers of steps."""

    def encode(self, own, others):
        return own[..., :1] * 0 + self.recorded.episode[0], others[..., :1] * 0

    def forward(self, own, others, action, other_actions):
        t = int(own.max())
        joint = torch.cat([action[:, :, None], other_actions], 2)
        assert (joint == self.data["action"][t][:, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]]).all()
        reward = self.data["reward"][t] + 9 * (self.wrong == "rewarded")
        return own + 1, others, self.args.reward_scale * reward

    def decode(self, own, others):
        t = int(own.max()) - 1
        after = [self.data[f"next_{name}"][t] for name in script.GridState._fields]
        own, views = self.recorded.game.features(script.GridState(*after))
        views[..., 8] += (self.wrong == "cells") / 3
        return own, views, ~self.data["terminated"][t] | (self.wrong == "ends")

    def value(self, own, others, goal):
        total, over = 0.0, self.data["terminated"] | self.data["truncated"]
        for t in reversed(range(int(own.max()), 40)):
            total = self.data["reward"][t] + self.args.gamma * ~over[t] * total
        return (self.wrong != "value") * self.args.reward_scale * total[..., None]


@pytest.mark.parametrize("wrong", ["nothing", "cells", "rewarded", "ends", "value"])
def test_judgement(wrong):
    collect()
    game = script.GridGame(GAME, horizon=7)
    args = script.checked(script.Args(env_id=GAME, hidden_size=8, plan_update="none"), game)
    recorded = offline.load(PLAY, game, GAME)
    player = script.Player(script.Agent(game, args), 6)
    player.agent.model = Knows()
    vars(player.agent.model).update(recorded=recorded, data=recorded.data, args=args, wrong=wrong)
    sums, value, following = offline.judged(recorded, player, args)
    error = sums.pop("reward_error")
    assert error[:, 0].allclose(9 * (wrong == "rewarded") * error[:, 1])
    for name, figure in sums.items():
        right = wrong != name and (wrong, name) != ("rewarded", "unrewarded")
        assert (figure[:, 0] == figure[:, 1] * right).all() and figure[:, 1].all(), name
    assert following.allclose(value, atol=1e-5) == (wrong != "value")
    alive = recorded.data["players"] >= 0
    assert error[0, 1] == alive.sum() > len(value) > 0
    on = alive & ~recorded.data["terminated"]
    assert sums["cells"][0, 1] == sum((on & on.roll(k, 2)).sum() for k in (1, 2))


def test_judge_a_run(capsys):
    collect()
    words = f"--env-id {GAME} --offline {PLAY} --horizon 7 --num-envs 6 --num-steps 8"
    words += " --total-timesteps 48 --hidden-size 8 --moa-updates 1"
    run = script.train(script.parse_arguments(words.split()))["run"]
    for words in (["--file", "play.npz"], ["--steps", "60", "--co-players", "self,ns"]):
        offline.main(["judge", run, *words, "--json", "x.jsonl", "--picture", "x.png"])
    first, second = map(json.loads, Path("x.jsonl").read_text().splitlines())
    assert first["played"] == "play.npz" and len(second["cells"]) == 5 and Path("x.png").exists()
    collect("msg-3x3-2p-1d", "random", WRONG)
    assert "wrong.npz is of msg" in refusal(capsys, "judge", run, "--file", WRONG)


def test_environments(capsys):
    name = "test_pettingzoo_game:Leaving"
    arrays = collect(name, "random", steps=60)
    assert (arrays["terminated"][:6, 0] == [[t >= 1, t >= 4, False] for t in range(6)]).all()
    offline.main(["check", str(PLAY), "--env-id", name])
    assert "| steps that truncate | " in capsys.readouterr().out
    assert name in refusal(capsys, "check", PLAY)

"""benchmarks/offline.py: what it writes is what was played, what it refuses, and how it judges."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import offline
from run_tools import generator_of

script = offline.script
GAME = "msh-3x3-3p-1h1s"
PLAY, WRONG = Path("play.npz"), Path("wrong.npz")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(offline, "GAMES", 6)
    monkeypatch.setattr(offline, "EPISODES", 2)
    monkeypatch.setattr(script, "MODEL_UPDATES", 2)


def collect(env_id=GAME, players="ns,nh,random", file=PLAY, steps=240):
    words = f"collect --env-id {env_id} --co-players {players} --steps {steps} --file {file}"
    offline.main(f"{words} --horizon 7".split())
    return dict(np.load(file))


def refusal(capsys, *words):
    with pytest.raises(SystemExit, match="^2$"):
        offline.main([*map(str, words)])
    return capsys.readouterr().err.splitlines()[-1]


def test_the_file_is_what_was_played():
    arrays = collect()
    game = script.GridGame(GAME, horizon=7)
    data = offline.load(PLAY, game, GAME).data
    assert all((values.numpy() == arrays[name]).all() for name, values in data.items())
    assert [x.itemsize for x in arrays.values() if x.dtype.kind in "iu" and x.ndim] == [1] * 9
    names = [[prefix + name for name in script.GridState._fields] for prefix in ("", "next_")]
    state, after = (script.GridState(*(data[k].flatten(0, 1) for k in each)) for each in names)
    stepped, *outcome = game.step(state, data["action"].flatten(0, 1))
    told = [*after, *(data[k].flatten(0, 1) for k in ("reward", "terminated", "truncated"))]
    assert all(map(torch.equal, [*stepped, *outcome], told))
    ended = (arrays["terminated"] | arrays["truncated"]).all(2)
    assert ended.shape == (40, 6) and (arrays["time"][1:][ended[:-1]] == 0).all()
    assert all((x[6:] == y[:-6])[~ended[:-1].flatten()].all() for x, y in zip(state, after))
    assert (arrays["match_ended"] == (ended & (ended.cumsum(0) % 2 == 0))).all()


class Told:
    """A co-player that counts, by row, the matches that it is told of."""

    count = 0

    def start_match(self, which):
        self.count = self.count + which.int()


def test_all_seats_are_drawn_from_the_pool():
    """There is no learner. Who plays a seat is told of each match, once."""
    players = offline.Company(script.GridGame(GAME), ["ns", Told], 4000, 1, generator_of(0))
    (told,) = players.callables.values()
    seats = torch.zeros(4000, 3)
    for _ in range(2):
        assert players.kind.min() == 1
        focal = players.kind.gather(1, players.focal[:, None]).float() - 1
        assert focal.mean() == pytest.approx(0.5, abs=0.05)
        seats += players.kind == 2
        assert torch.equal(told.count.view(4000, 3), seats.int())
        players.advance(torch.ones(4000).bool())


def test_what_is_refused(capsys):
    WRONG.write_text("text")
    with pytest.raises(script.UsageError, match="wrong.npz"):
        offline.load(WRONG, script.GridGame(GAME), GAME)
    words = ["collect", "--file", "x.npz", "--co-players", "ns"]
    assert "no/x.npz" in refusal(capsys, *words, "--file", "no/x.npz")
    assert "self" in refusal(capsys, *words, "--co-players", "ns,self")


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
        offline.main(["judge", run, *words])
        (cells,) = [line for line in capsys.readouterr().out.splitlines() if "| cells |" in line]
        assert len(cells.split("|")) == 8 and 0.0 <= float(cells.split("|")[2]) <= 1.0
    arrays = collect("test_pettingzoo_game:Leaving", "random", WRONG, steps=60)
    assert (arrays["terminated"][:6, 0] == [[t >= 1, t >= 4, False] for t in range(6)]).all()
    assert "wrong.npz is of test" in refusal(capsys, "judge", run, "--file", WRONG)

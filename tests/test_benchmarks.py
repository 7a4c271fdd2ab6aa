"""The runner of the benchmarks, the arithmetic of their tables, that their jobs can be run, and
what the figures of adaptation.py rest on."""

import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import adaptation
import figures
import run as runner
import strangers
from copies import ROOT

JOBS = [{"setting": f"{game} | a", "seed": seed} for seed in (1, 2) for game in ("msh", "msg")]
PLACES = sorted((job["setting"], job["seed"]) for job in JOBS)
TINY = {"env_id": "msh-3x3-3p-2h1s", "total_timesteps": 2048, "num_envs": 16, "hidden_size": 16}
FAMILIES = {"msh": "msh-4x4-4h1s", "msg": "msg-4x4-4p-6d"}
ppo = adaptation.ppo


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs jobs with a stand-in for the processes; returns the results' file and what was run."""
    file = tmp_path / "new" / "results.jsonl"
    ran = []

    def in_process(job, running):
        if job["setting"] == "bad":
            return "bad, seed 1, failed"
        ran.append((job["setting"], job["seed"]))
        return {**job, "seconds": 1.0}

    def go(given=JOBS, **options):
        ran.clear()
        monkeypatch.setattr(importlib.import_module("goals"), "jobs", lambda *_: given)
        options = runner.Options(**options)
        go.failed = runner.run_all("goals", options, time.time() + 60 * options.minutes)
        return file, sorted(ran)

    monkeypatch.setattr(runner, "in_process", in_process)
    monkeypatch.setattr(runner, "results_of", lambda name, options: file)
    return go


def test_what_asks_for_nothing_is_refused(run, capsys):
    assert run(only="msg")[1] == PLACES[:2]
    assert runner.main(runner.Options(names=("goals",), only="mgs")) == 2
    assert "no setting has 'mgs' in it" in capsys.readouterr().err
    assert runner.main(runner.Options(names=("goals",), jobs=0)) == 2
    assert "--jobs" in capsys.readouterr().err


def test_what_is_there_is_not_run_again(run):
    """And nothing starts after the deadline."""
    file, ran = run(minutes=0.0)
    assert not ran and not file.exists()
    assert run(only="msg | a")[1] == PLACES[:2]
    assert run(only="msg | a,msh")[1] == PLACES[2:]
    file, ran = run()
    assert not ran
    results = runner.results_in(file)
    assert [(r["setting"], r["seed"]) for r in results] == PLACES
    assert all(r["commit"] and r["benchmark"] == "goals" for r in results)
    assert len(run(quick=True)[1]) == len(JOBS)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_failed_run_costs_no_other_its_result(run, at_once, capsys):
    file, ran = run([*JOBS[:2], {"setting": "bad", "seed": 1}, *JOBS[2:]], jobs=at_once)
    assert len(ran) == len(JOBS) == len(runner.results_in(file))
    assert run.failed == 1
    assert "bad, seed 1, failed" in capsys.readouterr().err


def test_higher_stages_wait_for_lower_ones(run):
    jobs = [{"setting": f"{k}", "seed": 1, "stage": 2 - k % 3} for k in range(9)]
    file, _ = run(jobs, jobs=3)
    stages = [json.loads(line)["stage"] for line in file.read_text().splitlines()]
    assert stages == sorted(stages)


def test_an_unfinished_line_is_left_out_and_not_written_to(run, capsys):
    file, _ = run()
    file.write_bytes(file.read_bytes()[:-5])  # as if killed while it wrote
    assert len(runner.results_in(file)) == len(JOBS) - 1
    assert "no whole result" in capsys.readouterr().err
    assert len(run()[1]) == 1
    assert len(runner.results_in(file)) == len(JOBS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_the_benchmark(tmp_path, number):
    """A benchmark that is ended leaves no process behind, starts no further one, and is silent."""
    script = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import run, goals
def work(job):
    open(f"{tmp_path}/{{job['setting']}}", "w").write(str(os.getpid()))
    time.sleep(600)
run.results_of = lambda *_: run.Path("{tmp_path}/results.jsonl")
if "--worker" in sys.argv:
    work(json.loads(sys.argv[-1]))
goals.jobs = lambda *_: [{{"setting": f"{{k}}", "seed": 1}} for k in range(4)]
popen = run.subprocess.Popen
run.subprocess.Popen = lambda command, **more: popen(
    [sys.executable, __file__, *command[2:]] if "--worker" in command else command, **more
)
run.main(run.Options(names=("goals",)))
"""
    (tmp_path / "program.py").write_text(script)
    command = [sys.executable, tmp_path / "program.py"]
    benchmark = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started = [tmp_path / name for name in ("0", "1")]
    until = time.time() + 60
    while not all(file.exists() and file.read_text() for file in started) and time.time() < until:
        time.sleep(0.1)
    workers = [int(file.read_text()) for file in started]
    benchmark.send_signal(number)
    assert "Traceback" not in benchmark.communicate(timeout=30)[1]
    assert benchmark.returncode == 128 + number
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert not (tmp_path / "2").exists()


def test_results_and_pictures_do_not_make_the_code_another(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.commit() == "unknown"
    made = ("benchmarks/results/a.jsonl", "benchmarks/pictures/a.png", "benchmarks/results.md")
    for name in ("code.py", *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    first = runner.commit()
    for name in made:
        (tmp_path / name).write_text("2")
    assert runner.commit() == first and first.isalnum()
    (tmp_path / "code.py").write_text("2")
    assert runner.commit() == f"{first}-dirty"


@pytest.mark.parametrize("name", runner.NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_jobs_can_be_run(name, quick):
    """Each has a place of its own, a line of results can hold it, and its options are good ones."""
    jobs = list(importlib.import_module(name).jobs((), quick))
    assert len({(job["setting"], job["seed"]) for job in jobs}) == len(jobs)
    kept = [job["keep"] for job in jobs if "keep" in job]
    assert len(set(kept)) == len(kept)
    known = set()
    for job in jobs:
        assert json.loads(json.dumps(job)).keys() == job.keys()
        words = shlex.split(job.get("options", ""))
        words = [word for word in words if not word.endswith(".pt")]
        if "{file}" in words or "--load-moa" in words or not words:
            continue
        settled = [word for k, word in enumerate(words) if "--seed" not in words[k - 1 : k + 1]]
        if "." in job["options"] or (job["script"], *settled) in known:
            continue  # of a PettingZoo environment, or of another seed
        known.add((job["script"], *settled))
        script = importlib.import_module(job["script"])
        args = script.parse_arguments(words)
        args = script.checked(args, script.make_game(args, "cpu"))
        assert args.seed == job["seed"]


def test_figures():
    """Intervals; curves, smoothed; runs of the same seeds; what random play gets."""
    assert figures.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), abs=1e-3)
    assert math.isnan(figures.interval([4.0])[1])
    assert figures.figure([1.0, 2.0, 3.0]) == "2.00 ± 2.48 (3)"
    assert figures.figure([None, 2.0]) == "2.00 (1)"
    run = {"curve": [[10 * k, k, value] for k, value in enumerate((1.0, 2.0, 6.0, 3.0, 3.0, 6.0))]}
    places, means = figures.curves([run], 0)
    assert places.tolist() == [0, 10, 20, 30, 40, 50]
    assert means.tolist() == [[1.0, 1.5, 3.0, 3.0, 3.0, 4.0]]
    first, second = ([{"seed": seed} for seed in seeds] for seeds in ((1, 2, 4), (2, 3, 4)))
    assert figures.paired(first, second) == [[{"seed": 2}, {"seed": 4}]] * 2
    returns = [figures.random_return("msh-4x4-4h1s", kind) for kind in ("nh", "self")]
    assert 0.0 < returns[0] < returns[1] < ppo.GridGame("msh-4x4-4h1s").best_return


def test_share_of_what_true_goals_are_worth():
    goals = importlib.import_module("goals")
    none = np.array([1.0, 1.1, 0.9])
    assert goals.share([none, none + 0.5, none + 1.0]) == "50%"
    assert goals.share([none, none + 0.5, np.array([2.0, 0.0, 1.0])]) == ""  # may be noise
    assert goals.share([none[:1], none[:1], none[:1] + 1.0]) == ""


def test_true_goals_are_those_of_the_step_that_is_predicted(monkeypatch):
    """With the item that a scripted player walks to in this step, not in the one before."""
    moa_data = importlib.import_module("moa_data")
    game = ppo.GridGame("msh-3x3-3p-2h1s")
    agent = ppo.Agent(game, ppo.Args(goal="oracle", plan_update="none"))
    act = ppo.CoPlayers.act
    told, truth = [], []

    def noted(players, state, mask):
        actions = act(players, state, mask)
        truth.append(game.oracle(state, *players.scripted()))
        return actions

    def predictions(script, player, memory, mask):
        told.append(player.decision["goals"])
        return mask.float().log_softmax(2)

    monkeypatch.setattr(ppo.CoPlayers, "act", noted)
    monkeypatch.setattr(moa_data, "predictions", predictions)
    monkeypatch.setattr(moa_data, "MATCHES", 3)
    moa_data.play(ppo, agent, "ns,nh", 1)
    assert len(told) > 10 and all(map(torch.equal, told, truth))


def test_times_are_compared_with_the_same_seed_on_the_same_machine():
    learning = importlib.import_module("learning")
    times = {"one step": [(1, "a", "x", 30.0), (2, "b", "x", 80.0), (3, "b", "x", 1.0)]}
    times["plain PPO"] = [(1, "a", "x", 10.0), (2, "b", "x", 20.0), (3, "a", "x", 1.0)]
    for name in times:
        times[name].append((4, "a", name, 5.0))  # of another commit
    names = ("seed", "machine", "commit", "train_cpu_seconds")
    runs = {f"msg | mixture | {k}": [dict(zip(names, r)) for r in of] for k, of in times.items()}
    assert learning.pace(runs, "one step") == "3.0 to 4.0 (msg)"
    assert learning.pace(runs, "Direct-OM") == ""


def test_return_after_some_time():
    run = {"curve": [[10, 10.0, 1.0], [20, 20.0, 2.0], [30, 30.0, 3.0], [40, 40.0, 4.0]]}
    scaling = importlib.import_module("scaling")
    assert scaling.return_after(run, 40.0) == 4.0
    assert scaling.return_after(run, 26.0) == 2.0
    assert math.isnan(scaling.return_after(run, 9.0))


@pytest.mark.parametrize("name", ["learning", "goals", "scaling", "environments"])
def test_tables_and_pictures_of_whatever_is_there(name, tmp_path, monkeypatch):
    """Of all results, and of one: each run is found in the tables."""
    monkeypatch.setattr(figures, "PICTURES", tmp_path)
    monkeypatch.setattr(figures, "random_return", lambda *_: 0.5)
    benchmark = importlib.import_module(name)
    monkeypatch.setattr(benchmark, "random_return", lambda *_: 0.5, raising=False)
    results = []
    for number, job in enumerate(benchmark.jobs((1, 2), False)):
        value = 100.0 + number
        returns = dict.fromkeys(job["kinds"], value)
        result = {**job, "returns": returns, "all_seats": returns, "train_cpu_seconds": 30.0}
        result |= {"machine": "any", "commit": "any"}
        result["by_episode"] = {kind: [value] * 10 for kind in job["kinds"]}
        results.append({**result, "curve": [[100, 10.0, 1.0], [200, 30.0, value]]})
    results.sort(key=lambda result: (result["setting"], result["seed"]))
    page = benchmark.report(results)
    for result in results[::7]:
        both = [r for r in results if r["setting"] == result["setting"]]
        values = [next(iter(r["returns"].values())) for r in both]
        assert figures.figure(values) in page or "games" in result["setting"]
    benchmark.report(results[:1])
    if hasattr(benchmark, "draw"):
        benchmark.draw(results)
        assert list(tmp_path.glob("*.png"))
        benchmark.draw(results[:1])


def test_an_episode_counts_in_the_window_in_which_it_ends():
    found = adaptation.windows([(0, 1.0), (299, 3.0), (300, 5.0), (899, 7.0), (900, 9.0)], 900)
    assert found[:2] == [2.0, 5.0] and found[2] == 7.0
    assert math.isnan(adaptation.windows([(0, 1.0)], 600)[1])


def test_scores_lie_between_random_play_and_who_was_trained_on_the_same():
    reference = {"setting": "reference | msg | exploiter", "game": "msg", "kind": "exploiter"}
    scales = adaptation.scale([{**reference, "random": 2.0, "trained": [10.0, 12.0]}])
    result = {"game": "msg", "kind": "exploiter", "learning": [[2.0, 7.0, 12.0], [2.0, 2.0, 7.0]]}
    assert adaptation.scored(result, "learning", scales).tolist() == [[0, 0.5, 1], [0, 0, 0.5]]
    assert adaptation.late(adaptation.scored(result, "learning", scales)) == 0.5
    assert adaptation.scored(result, "frozen", scales) is None
    near = adaptation.scale([{**reference, "random": 11.9, "trained": [12.0]}])
    assert adaptation.scored(result, "learning", near) is None


def test_shares_are_of_seeds_that_met_all_kinds():
    """By sort of kinds, each for itself; random play beside."""
    names = ["cleaner", "exploiter", "random", "held-out A"]
    scales = {("msg", kind): (4.0 + k, 10.0) for k, kind in enumerate(names)}
    scales["msh", "ns"] = (9.0, 10.0)
    result = {"game": "msg", "learning": [[9.0]]}
    met = [(1, "cleaner", 2.0), (1, "exploiter", 3.0), (1, "random", 7.0), (2, "random", 9.0)]
    results = [{**result, "seed": s, "kind": k, "frozen": [99.0, x, x]} for s, k, x in met]
    assert adaptation.share(results[0], scales) == pytest.approx(0.2)
    assert adaptation.share(result, scales) is None
    results.append({**result, "seed": 1, "kind": "held-out A", "frozen": [1.0]})
    assert adaptation.mean_shares(results, scales) == ["0.40 (1)", "", ""]
    assert adaptation.random_shares("msg", scales) == ["0.50", "", "0.70"]


def test_the_pool_of_a_diverse_learner_is_trained_before_it():
    jobs = {job["setting"]: job for job in adaptation.jobs((2,), False)}
    learner = jobs["training | msg | diverse | hop_onestep"]
    company = learner["options"].split("--co-players ")[1].split()[0].split(",")
    pool = [job for setting, job in jobs.items() if setting.startswith("training | msg | pool")]
    assert len(pool) == 6 and len(company) == 7
    for job in pool:
        assert Path(job["keep"]).match(f"{company[-1]}/*/checkpoint.pt")
        assert job.get("stage", 0) < learner["stage"]


def small_run(goal):
    return ppo.train(ppo.Args(**TINY, goal=goal, plan_update="none", co_players="self"))["run"]


def test_frozen_matches_are_played_as_evaluation_plays_them():
    """One match of 20 episodes from the same random numbers: history is carried on."""
    path = small_run("inferred")
    content = ppo.load_checkpoint(path)
    for name, weight in content["agent"].items():
        if name.endswith("weight"):
            torch.nn.init.normal_(weight, std=0.3)  # so that history matters
    torch.save(content, f"{path}/checkpoint.pt")
    options = {"episodes": 20, "num_envs": 1, "match_episodes": 10**6, "seed": 3}
    expected = ppo.evaluate(path, "ns", **options)["focal_returns"]
    steps = 20 * 35
    returns, first = adaptation.frozen(ppo, path, "ns", 1, steps, 3)
    assert first == pytest.approx(sum(expected[:10]) / 10)
    assert len(returns) == steps // adaptation.WINDOW


def test_a_learning_co_player_gets_what_pays():
    """Rewarded at its seats for one action, it comes to prefer it. The learner does not learn here,
    and of the agents only that of the co-players changes."""
    path = small_run("none")
    learner = adaptation.Learner()
    chosen = []

    def watch(co_players, storage, **variables):
        weights = [agent.agent.actor.out.weight for agent in co_players.agents.values()]
        before = [weight.clone() for weight in weights]
        stays = torch.stack(storage["action"]) == ppo.STAY
        chosen.append(float(stays[:, co_players.kind == 1].float().mean()))
        storage["reward"] = [*torch.where(co_players.kind == 1, 1.0, -1.0) * stays]
        learner.learn(co_players=co_players, storage=storage, **variables)
        assert [torch.equal(x, y) for x, y in zip(before, weights)] == [True, False]

    words = f"--init {path} --co-players {path} --num-envs 16 --num-steps 20"
    ppo.train(ppo.parse_arguments(f"{words} --total-timesteps 1920".split()), watch)
    assert chosen[-1] > chosen[0] + 0.2


def played_by(family, name, steps=35, batch=64):
    """Bool [steps, B, M]: items left after each step; a player stays, strangers sit elsewhere."""
    game = ppo.GridGame(FAMILIES[family])
    generator = torch.Generator().manual_seed(1)
    pool = [getattr(strangers, name)] * 3
    players = ppo.CoPlayers(game, pool, batch, 10**6, generator, fixed=True)
    state = game.start(batch, generator)
    left = []
    for _ in range(steps):
        mask = game.action_mask(state)
        actions = players.act(state, mask)
        assert ppo.pick(mask, actions).all()
        actions = torch.where(players.kind == 0, game.idle(mask), actions)
        state, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        left.append(state.items >= 0)
        players.advance(ended)
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
            gone = ~played_by(family, stranger, 14)
            assert gone.any() and not gone[0].all()
    counts = {}
    for name in ("Tired", "Fair", "Waverer", "Lazy", "Halves"):
        counts[name] = played_by("msg", name, 4)[-1].sum(1).float().mean()
    assert counts["Tired"] < counts["Fair"] and counts["Tired"] < counts["Waverer"]
    assert counts["Tired"] < min(counts["Lazy"], counts["Halves"]) < 6

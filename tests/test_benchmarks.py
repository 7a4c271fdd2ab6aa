"""What the benchmarks share (benchmarks/runs.py): what is run, what is left out, and the arithmetic of the tables."""

import importlib
import json
import math
import sys

import numpy as np
import pytest

from conftest import ROOT

JOBS = [
    {"setting": f"{game} | {way}", "seed": seed} for seed in (1, 2) for game in ("msh", "msg") for way in ("a", "b")
]


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("runs")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def run(runs, tmp_path, monkeypatch):
    """Runs jobs with a stand-in for the processes; returns the results' file and the jobs that were run."""
    file, ran = tmp_path / "new" / "results.jsonl", []

    def in_process(program, job, root):
        if job["setting"] == "bad":
            raise RuntimeError("bad")
        ran.append((job["setting"], job["seed"]))
        return {**job, "seconds": 1.0}

    monkeypatch.setattr(runs, "in_process", in_process)

    def go(given=JOBS, **options):
        ran.clear()
        runs.run_all("program.py", given, runs.Running(**options), file)
        return file, ran

    return go


def test_what_is_there_is_not_run_again(run, runs):
    file, ran = run(only="msg | a")
    assert sorted(ran) == [("msg | a", 1), ("msg | a", 2)]
    _, ran = run(only="msg | a,msh")
    assert len(ran) == 4 and all(setting.startswith("msh") for setting, _ in ran)
    _, ran = run()
    assert sorted(ran) == [("msg | b", 1), ("msg | b", 2)]
    results = runs.results_in(file)
    assert [(r["setting"], r["seed"]) for r in results] == sorted((j["setting"], j["seed"]) for j in JOBS)
    assert all(r["commit"] for r in results)
    assert {k: [r["seed"] for r in v] for k, v in runs.by_setting(file).items()} == {j["setting"]: [1, 2] for j in JOBS}


def test_nothing_starts_after_the_deadline(run):
    file, ran = run(minutes=0.0)
    assert not ran and not file.exists()


def test_a_failed_run_loses_no_result(run):
    with pytest.raises(RuntimeError, match="bad"):
        run([*JOBS[:2], {"setting": "bad", "seed": 1}, *JOBS[2:]], jobs=1)
    _, ran = run()
    assert 0 < len(ran) <= len(JOBS) - 2


def test_a_job_in_a_process_of_its_own(runs, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    program = "import json, os, sys\nprint('noise')\nprint(json.dumps(json.loads(sys.argv[2]) | dict(os.environ)))"
    (tmp_path / "benchmarks" / "echo.py").write_text(program)
    result = runs.in_process("echo.py", {"setting": "a", "seed": 3}, str(tmp_path))
    assert result["seed"] == 3 and result["OMP_NUM_THREADS"] == "1"
    (tmp_path / "benchmarks" / "echo.py").write_text("raise SystemExit('broken')")
    with pytest.raises(RuntimeError, match="a, seed 3:\nbroken"):
        runs.in_process("echo.py", {"setting": "a", "seed": 3}, str(tmp_path))


def test_jobs_of_the_learning_curves(runs):
    learning = importlib.import_module("learning")
    jobs = learning.all_jobs(learning.Options(quick=True))
    assert len(jobs) == len(learning.METHODS) * len(learning.STEPS) * len(learning.COMPANIES)
    assert len({job["keep"] for job in jobs}) == len({job["setting"] for job in jobs}) == len(jobs)
    for job in jobs:  # the command lines are good ones, and a result line can hold them
        script = importlib.import_module(job["script"])
        args = script.resolved(script.parse_arguments(job["options"].split()))
        assert args.seed == 1 and set(job["kinds"]) == set(args.co_players.split(","))
        json.dumps(job)


def test_interquartile_mean(runs):
    middle, low, high = runs.interquartile_mean([[0.0, 1.0], [2.0, 3.0]])
    assert middle == pytest.approx(1.5) and 0.0 <= low < middle < high <= 3.0
    generator = np.random.default_rng(1)
    tasks = [generator.normal(k, 1.0, 50).tolist() for k in range(4)]
    values = np.sort(np.concatenate(tasks))
    middle, low, high = runs.interquartile_mean(tasks)
    assert middle == pytest.approx(values[50:150].mean()) and low < middle < high
    draws = [[generator.choice(task, len(task)) for task in tasks] for _ in range(2000)]
    wanted = np.percentile([np.sort(np.concatenate(d))[50:150].mean() for d in draws], [2.5, 97.5])
    assert np.allclose([low, high], wanted, atol=0.05)
    middle, low, high = runs.interquartile_mean([[1.0], [2.0]])
    assert middle == 1.5 and math.isnan(low) and math.isnan(high)


def test_interval_of_a_mean(runs):
    mean, low, high = runs.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 4.3027 / 3**0.5, 2.0 + 4.3027 / 3**0.5), abs=1e-3)
    assert runs.interval([4.0])[0] == 4.0 and math.isnan(runs.interval([4.0])[1])


def test_score_of_random_play(runs):
    alone, with_hares, mixed = (runs.random_return("msh-4x4-4h1s", name) for name in ("self", "nh", "nh,nh,random"))
    assert 0.0 < with_hares < mixed < alone < runs.best_return("msh-4x4-4h1s") == pytest.approx(3.0)

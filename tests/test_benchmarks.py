"""What the benchmarks share (benchmarks/runs.py): what is run, what is left out, and the
arithmetic of the tables."""

import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from conftest import ROOT

JOBS = [
    {"setting": f"{game} | {way}", "seed": seed}
    for seed in (1, 2)
    for game in ("msh", "msg")
    for way in ("a", "b")
]


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("runs")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def run(runs, tmp_path, monkeypatch):
    """Runs jobs with a stand-in for the processes; returns the results' file and what was run."""
    file, ran = tmp_path / "new" / "results.jsonl", []

    def in_process(program, job, root, running):
        if job["setting"] == "bad":
            return "bad, seed 1, failed"
        ran.append((job["setting"], job["seed"]))
        return {**job, "seconds": 1.0}

    monkeypatch.setattr(runs, "in_process", in_process)

    def go(given=JOBS, **options):
        ran.clear()
        go.failed = runs.run_all("program.py", given, runs.Running(**options), file)
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
    assert [(r["setting"], r["seed"]) for r in results] == sorted(
        (j["setting"], j["seed"]) for j in JOBS
    )
    assert all(r["commit"] for r in results)
    assert {k: [r["seed"] for r in v] for k, v in runs.by_setting(file).items()} == {
        j["setting"]: [1, 2] for j in JOBS
    }


def test_what_has_no_checkpoint_is_run_again_if_asked(run, runs, tmp_path):
    jobs = [
        {"setting": "msh", "seed": seed, "keep": str(tmp_path / f"{seed}.pt")} for seed in (1, 2)
    ]
    (tmp_path / "1.pt").touch()
    assert len(run(jobs)[1]) == 2 and not run(jobs)[1]
    file, ran = run(jobs, again=True)
    assert (
        ran == [("msh", 2)]
        and len(runs.results_in(file)) == 2
        and len(file.read_text().splitlines()) == 3
    )


def test_nothing_starts_after_the_deadline(run):
    file, ran = run(minutes=0.0)
    assert not ran and not file.exists()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_failed_run_costs_no_other_its_result(run, runs, at_once, capsys):
    file, ran = run([*JOBS[:2], {"setting": "bad", "seed": 1}, *JOBS[2:]], jobs=at_once)
    assert len(ran) == len(JOBS) == len(runs.results_in(file)) and run.failed == 1
    assert "bad, seed 1, failed" in capsys.readouterr().err
    assert not run()[1] and run.failed == 0


def test_results_of_other_options_are_told_and_run_again_if_asked(run, runs, capsys):
    jobs = [{"setting": "msh", "seed": seed, "episodes": 20, "turns": (1, 2)} for seed in (1, 2)]
    run(jobs)
    assert not run(jobs)[1] and not capsys.readouterr().err.count("other options")
    changed = [jobs[0], {**jobs[1], "episodes": 500}]
    assert not run(changed)[1]
    assert (
        "1 results were made with other options (msh, seed 2: other episodes"
        in capsys.readouterr().err
    )
    file, ran = run(changed, again=True)
    assert ran == [("msh", 2)] and [r["episodes"] for r in runs.results_in(file)] == [20, 500]
    assert len(run(jobs, quick=True)[1]) == 2  # always anew


def test_an_unfinished_line_is_left_out_and_not_written_to(run, runs, capsys):
    file, _ = run(only="msg")
    file.write_bytes(file.read_bytes()[:-5])  # as if killed while it wrote
    assert (
        len(runs.results_in(file)) == 3 and "line 4 is no whole result" in capsys.readouterr().err
    )
    assert len(run()[1]) == len(JOBS) - 3 and len(runs.results_in(file)) == len(JOBS)


def test_workers_end_with_the_benchmark(runs, tmp_path):
    """A killed benchmark leaves no process behind, and starts no further one."""
    program = """
        import json, os, sys, time, tyro, runs
        def work(job):
            open(job["setting"], "w").write(str(os.getpid()))
            time.sleep(600)
        options = tyro.cli(runs.Running)
        jobs = [{"setting": f"FOLDER/{k}", "seed": 1} for k in range(4)]
        file = runs.Path("FOLDER/results.jsonl")
        runs.benchmark("FOLDER/program.py", options, jobs, work, file)"""
    (tmp_path / "benchmarks").mkdir()
    for path in (tmp_path / "benchmarks" / "program.py", tmp_path / "program.py"):
        path.write_text(textwrap.dedent(program).replace("FOLDER", str(tmp_path)))
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})"
    start += "; import runs; runs.ROOT = runs.Path('.')"
    start += f"; sys.argv[0] = 'program.py'; exec(open({str(tmp_path / 'program.py')!r}).read())"
    path = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    benchmark = subprocess.Popen(
        [sys.executable, "-c", start, "--jobs", "2"], cwd=tmp_path, env=path
    )
    started = [tmp_path / name for name in ("0", "1")]
    until = time.time() + 60
    while not all(file.exists() and file.read_text() for file in started) and time.time() < until:
        time.sleep(0.1)
    workers = [int(file.read_text()) for file in started]
    benchmark.terminate()
    assert benchmark.wait(30) == 143
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert not (tmp_path / "2").exists()


def test_results_do_not_make_the_code_another(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.commit() == "unknown"
    for name in ("code.py", "benchmarks/results/a.jsonl", "docs/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    first = runs.commit()
    assert first.isalnum() and first != "unknown"
    for name, wanted in (
        ("benchmarks/results/a.jsonl", first),
        ("docs/a.png", first),
        ("code.py", f"{first}-dirty"),
    ):
        (tmp_path / name).write_text("2")
        assert runs.commit() == wanted


def test_a_job_in_a_process_of_its_own(runs, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    program = "import json, os, sys\nprint('noise')\n"
    program += "print(json.dumps(json.loads(sys.argv[2]) | dict(os.environ)))"
    (tmp_path / "benchmarks" / "echo.py").write_text(program)
    result = runs.in_process("echo.py", {"setting": "a", "seed": 3}, str(tmp_path), set())
    assert result["seed"] == 3 and result["OMP_NUM_THREADS"] == "1"
    (tmp_path / "benchmarks" / "echo.py").write_text("raise SystemExit('broken')")
    assert runs.in_process("echo.py", {"setting": "a", "seed": 3}, str(tmp_path), set()).startswith(
        "a, seed 3, failed:\nbroken"
    )


def arguments_of(job):
    """The options of a job's command line, with the game's defaults."""
    script = importlib.import_module(job["script"])
    args = script.parse_arguments(job["options"].split())
    return script.checked(args, script.make_game(args, "cpu"))


def test_jobs_of_the_learning_curves(runs):
    learning = importlib.import_module("learning")
    jobs = learning.all_jobs(learning.Options(quick=True))
    longer = sum(map(len, learning.LONGER.values()))
    assert (
        len(jobs) == len(learning.METHODS) * len(learning.STEPS) * len(learning.COMPANIES) + longer
    )
    assert len({job["keep"] for job in jobs}) == len({job["setting"] for job in jobs}) == len(jobs)
    for job in jobs:  # the command lines are good ones, and a result line can hold them
        args = arguments_of(job)
        assert args.seed == 1 and set(job["kinds"]) == set(args.co_players.split(","))
        json.dumps(job)


def test_jobs_and_figures_of_scaling(runs):
    scaling = importlib.import_module("scaling")
    jobs = scaling.parallel_jobs(scaling.Options())
    assert len({(job["setting"], job["seed"]) for job in jobs}) == len(jobs)
    for job in jobs:
        assert "," not in job["setting"]  # or `--only` would split it
        args = arguments_of(job)
        assert args.total_timesteps % (args.num_envs * args.num_steps) == 0
        assert args.num_envs == job["num_envs"]
    run = {
        "train_cpu_seconds": 40.0,
        "curve": [[10, 0.0, 1.0], [20, 3.0, 2.0], [30, 6.0, 3.0], [40, 9.0, 4.0]],
    }
    assert runs.by_cpu_time(run) == [
        [10, 10.0, 1.0],
        [20, 20.0, 2.0],
        [30, 30.0, 3.0],
        [40, 40.0, 4.0],
    ]
    assert scaling.return_after(run, 40.0) == 4.0 and scaling.return_after(run, 26.0) == 2.0
    assert math.isnan(scaling.return_after(run, 9.0))
    assert runs.by_cpu_time({"train_cpu_seconds": 5.0, "curve": [[10, 0.0, 1.0]]}) == [
        [10, 5.0, 1.0]
    ]


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


def test_mean_over_tasks(runs):
    mean, low, high = runs.mean_over_tasks(
        [[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]
    )  # equal variances: 4 degrees of freedom
    half = 2.7764 * (2 * 1.0 / 3) ** 0.5 / 2
    assert (mean, low, high) == pytest.approx((4.0, 4.0 - half, 4.0 + half), abs=1e-3)
    _, low, high = runs.mean_over_tasks([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])  # only one varies: 2
    assert (high - low) / 2 == pytest.approx(4.3027 * (1.0 / 3) ** 0.5 / 2, abs=1e-3)
    assert runs.mean_over_tasks([[1.0, 1.0], [3.0, 3.0]]) == (2.0, 2.0, 2.0)
    assert math.isnan(runs.mean_over_tasks([[1.0], [2.0, 3.0]])[1])


def test_fresh_results_are_kept_apart(runs):
    places = {
        runs.Running(quick=quick, fresh=fresh).results("a")
        for quick in (True, False)
        for fresh in (True, False)
    }
    assert len(places) == 3 and all(place.name == "a.jsonl" for place in places)


def test_interval_of_a_mean(runs):
    mean, low, high = runs.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx(
        (2.0, 2.0 - 4.3027 / 3**0.5, 2.0 + 4.3027 / 3**0.5), abs=1e-3
    )
    assert runs.interval([4.0])[0] == 4.0 and math.isnan(runs.interval([4.0])[1])


def test_score_of_random_play(runs):
    alone, with_hares, mixed = (
        runs.random_return("msh-4x4-4h1s", name) for name in ("self", "nh", "nh,nh,random")
    )
    assert 0.0 < with_hares < mixed < alone < runs.best_return("msh-4x4-4h1s") == pytest.approx(3.0)

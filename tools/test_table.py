"""tools/table.py against numbers worked out by hand and by rliable, and the array of
tools/atari100k.sbatch against a Slurm of three lines."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from test_curves import BAD_SETTINGS
from test_drama import DAMAGED

from tools import table

ROOT = Path(__file__).parent.parent
# Frozen output of rliable 1.2.0 (arch 7.2.0, scipy 1.17.1, numpy 2.4.6): get_interval_estimates
# with 100,000 draws of RATED, seeds down, games across, human-normalised percent.
RATED = np.array([[(37 * s * s + 53 * g + 11 * s * g) % 97 + 20 * g for g in range(7)]
                  for s in range(5)], float)
RLIABLE = {"mean": (94.0571, 85.8857, 102.6), "median": (99.6, 74.8, 119.6),
           "IQM": (90.6316, 80.4737, 102.2632), "optimality gap": (26.3714, 21.7143, 30.8571)}
RLIABLE_PUBLISHED = {"SPR": (61.7372, 40.1462, 41.5993, 53.5020),
                     "STORM": (126.7195, 58.2123, 67.9796, 41.6833),
                     "Drama_XS_DFS": (104.8826, 26.9728, 41.6357, 53.8097),
                     "Drama_XS_uniform": (80.1898, 28.4063, 35.1534, 57.3848)}


def make_run(folder: Path, evaluations=(), game="Breakout", seed=0, settings=(), training=(1, 2, 3),
             updated=900):
    """A run folder: `evaluations` are (step, scores), `settings` what differs from a plain run."""
    folder.mkdir(parents=True)
    plain = dict(preset="laptop", game=game, seed=seed, steps=1000, sampling="dfs", batch=4)
    (folder / "settings.json").write_text(json.dumps(plain | dict(settings)))
    (folder / "episodes.csv").write_text("step,score,length,human_normalised\n" + "".join(
        f"{100 * i},{score},100,0\n" for i, score in enumerate(training, 1)))
    (folder / "metrics.csv").write_text(f"step,updates,seconds\n800,1,2\n{updated},2,3\n")
    for step, scores in evaluations:
        write_evaluation(folder, step, scores, training)
    return folder


def write_evaluation(folder: Path, step: int, scores, training, other="", **more):
    (folder / f"evaluation-{step:06d}{other}.json").write_text(json.dumps(dict(
        step=step, scores=scores, last_training_scores=list(training[-5:]), **more)))


def lines(capsys, *arguments, code=0):
    """Cells of every line of the tables that a call prints; or what it complains of."""
    assert table.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return err if code else [[cell.strip() for cell in line.strip("|").split("|")]
                             for line in out.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------- statistics


def test_published_scores_recompute_to_the_papers_means():
    percent = {agent: [table.human_normalised(game, row[agent])
                       for game, row in table.PUBLISHED.items()] for agent in table.AGENTS}
    assert len(table.PUBLISHED) == 26
    assert round(np.mean(percent["Drama_XS_DFS"])) == 105
    assert round(np.median(percent["Drama_XS_DFS"])) == 27
    assert round(np.mean(percent["Drama_XS_uniform"])) == 80
    assert table.PUBLISHED["Breakout"]["random"] == 1.7  # not the rounded columns
    assert table.human_normalised("Breakout", 7) == pytest.approx(100 * 5.3 / 28.8)


def test_aggregates_and_intervals_are_those_of_rliable():
    scores = list(RATED.T)
    expected = np.array([RLIABLE[name] for name in table.AGGREGATES])
    np.testing.assert_allclose(table.aggregate(scores), expected[:, 0], rtol=1e-5)
    # Two calls of rliable differ by 0.1; 10,000 draws waver by 2.7 % of a standard deviation
    np.testing.assert_allclose(table.interval(scores).T, expected[:, 1:], atol=0.6)


def test_aggregates_of_published_agents_are_those_of_rliable():
    for agent, expected in RLIABLE_PUBLISHED.items():
        scores = [np.array([table.human_normalised(game, row[agent])])
                  for game, row in table.PUBLISHED.items()]
        np.testing.assert_allclose(table.aggregate(scores), expected, atol=1e-4)


def test_games_of_fewer_seeds_weigh_as_much():
    """By hand: 0 and 90 of one game, 30 twice of the other; the middle half is 30, 30."""
    mean, median, iqm, gap = table.aggregate([np.array([0.0, 90.0]), np.array([30.0])])
    assert (mean, median, iqm, gap) == (37.5, 37.5, 30, (100 + 10 + 70 + 70) / 4)


# ---------------------------------------------------------------- tables


def test_a_run_without_an_evaluation_counts_at_its_last_save(tmp_path, capsys):
    """Or at its last row of one of its tables: episodes end at 300, an update was at 900."""
    folder = make_run(tmp_path / "run", updated=900)

    def steps():
        head, _, row, *_ = lines(capsys, tmp_path)
        return dict(zip(head, row))["steps"]

    assert steps() == "900"
    (folder / "save-001000.json").touch()
    assert steps() == "1,000"
    with open(folder / "episodes.csv", "a") as file:
        file.write("1200,4,100,0\n")
    assert steps() == "1,200"


def test_seeds_are_averaged_and_both_protocols_shown(tmp_path, capsys):
    """By hand: seeds of 10 and 14 are 12 +- 2, and 36 % of the way from 1.7 to 30.5."""
    make_run(tmp_path / "a", [(500, [99, 99]), (1000, [9, 11])], training=(50, 4, 4, 4, 4, 9))
    make_run(tmp_path / "b", [(1000, [13, 15, 14])], seed=1, training=(5, 5, 6))
    for other in ("-prior", "-temperature-0.5"):
        write_evaluation(tmp_path / "a", 1000, [77], (1,), other)
    head, _, row, *rest = lines(capsys, tmp_path)
    shown = dict(zip(head, row))
    assert (shown["game"], shown["settings"], shown["steps"]) == ("Breakout", "laptop", "1,000")
    assert (shown["seeds"], shown["episodes"]) == ("2", "5")
    assert shown["evaluation"] == "12.0 ± 2.0 (36 %)"
    assert shown["last five in training"] == "5.2 ± 0.2 (12 %)"
    assert (shown["random"], shown["human"]) == ("1.7", "30.5")
    assert (shown["Drama_XS_DFS"], shown["Drama_XS_uniform"]) == ("7.0 (18 %)", "11.0 (32 %)")
    others = dict(zip(rest[0], rest[2]))
    assert others["IRIS"] == "84.0 (286 %)" and others["PPO"] == "3.0 (5 %)"
    assert ["IRIS", "100,000", "286 %", "286 %", "286 %", "0 %"] in rest
    ours = next(row for row in rest if row[0] == "laptop: evaluation")
    assert ours[2] == "36 % [29, 43]"  # (10 - 1.7) / 28.8 and (14 - 1.7) / 28.8


def test_a_branch_is_no_further_seed_of_its_run(tmp_path, capsys):
    make_run(tmp_path / "a", [(1000, [10])])
    (make_run(tmp_path / "b", [(1000, [20])], seed=1) / "branch.json").write_text('{"step": 700}')
    rows = lines(capsys, tmp_path)
    assert [row[1:6] for row in rows[2:4]] == [
        ["laptop", "1,000", "1", "1", "10.0 (29 %)"],
        ["laptop, branched at 700", "1,000", "1", "1", "20.0 (64 %)"]]


def test_the_error_of_one_seed_is_marked_and_gives_no_interval(tmp_path, capsys):
    make_run(tmp_path / "a", [(1000, [9, 11])])
    rows = lines(capsys, tmp_path / "a")
    assert rows[2][5] == "10.0 ± 1.0* (29 %)"
    assert ["laptop: evaluation", "1,000", "29 %", "29 %", "29 %", "71 %"] in rows


def test_runs_of_unequal_steps_or_settings_are_rows_of_their_own(tmp_path, capsys):
    make_run(tmp_path / "a", [(1000, [10])])
    make_run(tmp_path / "b", [(1000, [20])], seed=1, settings=dict(threads=8, device="cuda"))
    make_run(tmp_path / "c", [(1000, [40])], seed=2, settings=dict(sampling="uniform"))
    make_run(tmp_path / "d", [(2000, [30])], seed=3)
    make_run(tmp_path / "e", [(1000, [50])], seed=4, settings=dict(preset="paper", batch=16))
    make_run(tmp_path / "f", seed=5, training=(60, 60))  # not evaluated yet, at step 900
    make_run(tmp_path / "g", [(1000, [70])], seed=6, settings=dict(new=1, batch=5, sampling="x"))
    make_run(tmp_path / "h", [(1000, [9])], seed=7, settings=dict(new=1, batch=5, sampling="x"))
    rows = lines(capsys, tmp_path)[2:9]
    assert [(row[1], row[2], row[3]) for row in rows if row[0] == "Breakout"][:6] == [
        ("laptop", "900", "1"), ("laptop", "1,000", "2"), ("laptop", "2,000", "1"),
        ("laptop, sampling uniform", "1,000", "1"), ("laptop, variant 1", "1,000", "2"),
        ("paper", "1,000", "1")]
    assert rows[1][5].startswith("15.0 ± 5.0 ") and rows[4][5].startswith("39.5 ")
    assert rows[0][5:7] == ["-", "60.0 ± 0.0* (202 %)"]
    table.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "variant 1: batch 5, new 1, sampling x." in out
    assert "laptop, where nothing else is said: batch 4, new absent, sampling dfs." in out


def test_a_run_that_has_cooled_down_is_no_seed_of_one_that_has_not(tmp_path, capsys):
    """--cooldown lets rates fall at the end: at step 1,000 they are 0 in one, and whole in another
    that goes on to 5,000."""
    for seed, (steps, cooldown) in enumerate([(1000, 0.2), (1000, 0.2), (5000, 0.2), (5000, 0.2),
                                              (1000, 0), (5000, 0)]):
        make_run(tmp_path / str(seed), [(1000, [10 * seed])], seed=seed,
                 settings=dict(steps=steps, cooldown=cooldown))
    rows = lines(capsys, tmp_path)[2:5]
    assert sorted((row[3], row[5].split()[0]) for row in rows) == [
        ("2", "25.0"), ("2", "45.0"), ("2", "5.0")]


def test_a_run_that_went_on_after_its_end_is_known_by_its_evaluations(tmp_path, capsys):
    """Seeds 0 and 1 ended at step 1,000, seed 0 goes on since then. Seeds 2 and 3 ended at 5,000,
    and seed 2 once before: its rates fell twice."""
    for seed, evaluations in enumerate([[1000], [1000], [1000, 5000], [5000]]):
        folder = make_run(tmp_path / str(seed), seed=seed,
                          settings=dict(steps=1000 if seed == 1 else 5000, cooldown=0.2))
        for step in evaluations:
            write_evaluation(folder, step, [10 * seed], (1, 2, 3), steps=step)
    rows = lines(capsys, tmp_path)[2:5]
    assert sorted((row[3], row[5].split()[0]) for row in rows) == [
        ("1", "20.0"), ("1", "30.0"), ("2", "5.0")]
    assert [row[1] for row in rows if row[5].startswith("20.0")] == [
        "laptop, steps as many, after 1000"]


def test_settings_that_an_older_version_wrote_in_its_words_are_the_same(tmp_path, capsys):
    then = dict(event_weights=True, graphs=False, floor=0.0)
    now = dict(event_weight=2.0, local=False, policy_unimix=0.0)
    make_run(tmp_path / "a", [(1000, [1])], settings=then)
    make_run(tmp_path / "b", [(1000, [3])], seed=1, settings=now)
    head, _, row, *_ = lines(capsys, tmp_path)
    assert dict(zip(head, row))["seeds"] == "2"


def test_aggregates_are_over_the_games_that_were_run(tmp_path, capsys):
    """By hand: 100 % in Breakout and 0 % in Pong; Drama there 18.4 % and 101.1 %."""
    make_run(tmp_path / "a", [(1000, [30.5])])
    make_run(tmp_path / "b", [(1000, [-20.7])], game="Pong")
    make_run(tmp_path / "c", [(1000, [7])], game="Pacman")  # a game without published scores
    rows = lines(capsys, tmp_path)
    assert ["laptop: evaluation", "1,000", "50 %", "50 %", "50 %", "50 %"] in rows
    assert ["Drama_XS_DFS", "100,000", "60 %", "60 %", "60 %", "41 %"] in rows
    pacman = next(row for row in rows if row[0] == "Pacman")
    assert pacman[5:] == ["7.0", "2.0 ± 0.6*", "-", "-", "-", "-"]


def test_a_run_under_way_may_end_in_half_a_row(tmp_path, capsys):
    folder = make_run(tmp_path / "a", training=(1, 2))
    for name, half in ("episodes", "300,77"), ("metrics", "9999"):
        with open(folder / f"{name}.csv", "a") as file:
            file.write(half)
    row = lines(capsys, folder)[2]
    assert row[2] == "900" and row[6].startswith("1.5 ± 0.5* ")


def test_csv_has_a_row_a_run_and_protocol_and_one_a_published_score(tmp_path, capsys):
    make_run(tmp_path / "a", [(1000, [9, 11])], seed=3)
    lines(capsys, tmp_path, "--csv", tmp_path / "out.csv")
    first, second, *published = csv.DictReader(open(tmp_path / "out.csv"))
    assert (first["agent"], first["seed"], first["protocol"]) == ("laptop", "3", "evaluation")
    assert float(first["score"]) == 10 and first["episodes"] == "2" and first["steps"] == "1000"
    assert float(first["human_normalised"]) == pytest.approx(100 * 8.3 / 28.8)
    assert second["protocol"] == "training" and float(second["score"]) == 2
    assert len(published) == 12
    assert {row["agent"]: float(row["score"]) for row in published}["STORM"] == 16


def test_games_of_other_arguments_are_other_games(tmp_path, capsys):
    """Of the same seed, and no copies of each other."""
    for name, score in (("MemoryS7", 1), ("DoorKey", 3)):
        make_run(tmp_path / name, [(900, [score])], "grid.py:Partial", 0,
                 dict(game_args=f"game={name}", action_repeat=2))
    assert [row[0] for row in lines(capsys, tmp_path) if row[0].startswith("grid")] == [
        "grid.py:Partial game=DoorKey", "grid.py:Partial game=MemoryS7"]
    table.main([str(tmp_path), "--json", str(tmp_path / "out")])
    first, *_ = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert first["task"].startswith("grid.py:Partial game=") and first["xs"] == [200, 400, 600]


def test_json_is_in_the_formats_others_read(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", [(1000, [9, 11])], game="KungFuMaster")
    make_run(tmp_path / "runs" / "b", [(1000, [7])], game="KungFuMaster", seed=1)
    make_run(tmp_path / "runs" / "c", [(1000, [3])], game="UpNDown", training=(8,))
    make_run(tmp_path / "runs" / "d", game="UpNDown", seed=1, training=(4,), updated=1000)
    lines(capsys, tmp_path / "runs", "--json", tmp_path / "out")

    def read(name):
        return json.loads((tmp_path / "out" / name).read_text())

    assert read("scores-laptop-1000-evaluation.json") == {"KungFuMaster": [10, 7], "UpNDown": [3]}
    assert read("scores-laptop-1000-training.json") == {"KungFuMaster": [2, 2], "UpNDown": [8, 4]}
    curves = {(curve["task"], curve["seed"]): curve for curve in read("curves.json")}
    assert set(curves) == {("atari_kung_fu_master", "0"), ("atari_kung_fu_master", "1"),
                           ("atari_up_n_down", "0"), ("atari_up_n_down", "1")}
    assert curves["atari_kung_fu_master", "1"] == dict(
        task="atari_kung_fu_master", method="drama laptop", seed="1", xs=[400, 800, 1200],
        ys=[1, 2, 3])


def test_older_scores_beside_new_ones_are_named(tmp_path, capsys):
    for name, step in ("a", 700), ("b", 900):
        run = make_run(tmp_path / name, [(step, [9, 11])])
        assert table.main([str(run), "--json", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"older scores stay in {tmp_path / 'out'}: ")
    assert re.findall(r"[\w-]+\.json", err) == ["scores-laptop-700-evaluation.json",
                                               "scores-laptop-700-training.json"]


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, capsys):
    make_run(tmp_path / "a" / "one", [(1000, [9])])
    shutil.copytree(tmp_path / "a" / "one", tmp_path / "a" / "two")
    assert "are one run, or copies" in lines(capsys, tmp_path / "a", code=2)
    assert "there is no folder" in lines(capsys, tmp_path / "none", code=2)
    (tmp_path / "empty").mkdir()
    assert "holds no run" in lines(capsys, tmp_path / "empty", code=2)
    young = make_run(tmp_path / "young", training=())
    assert "left out" in (err := lines(capsys, young, code=2)) and "none of these" in err
    (tmp_path / "file").touch()
    good = make_run(tmp_path / "good", [(1000, [9])])
    assert lines(capsys, good, "--json", tmp_path / "file", code=2) == (
        f"tools.table: {tmp_path / 'file'} cannot be written to: --json FOLDER names another "
        "place.\n")
    for name, text in [("episodes.csv", "step,score\nx,1\n"), ("branch.json", "[]"),
                       *(("settings.json", text) for text in BAD_SETTINGS),
                       *(("evaluation-001000.json", text) for text in DAMAGED)]:
        folder = make_run(tmp_path / "bad", [(1000, [9])])
        (folder / name).write_text(text)
        assert f"{folder / name} is damaged" in lines(capsys, folder, code=2), text
        shutil.rmtree(folder)
    both = ["--csv", tmp_path / "new.csv", "--json", tmp_path / "file"]
    assert "cannot be written to" in lines(capsys, good, *both, code=2)
    assert not (tmp_path / "new.csv").exists()


def test_all_results_of_this_repository_make_a_table(capsys):
    rows = lines(capsys, ROOT / "results")
    krull = next(row for row in rows if row[0] == "Krull" and row[2] == "36,158")
    assert krull[5] == "9,026 ± 348* (696 %)"  # as in results/README.md


# ---------------------------------------------------------------- the array for Slurm

FAKE = {"python": """#!/bin/bash
echo "python $*" >> calls
trap 'echo TERM >> calls; exit 130' TERM
touch started
if [ -e finish ]; then exit 0; fi
while :; do sleep 0.05; done
""", "scontrol": """#!/bin/bash
echo "scontrol $*" >> calls
"""}


@pytest.fixture
def cluster(tmp_path):
    """Starts a task of the array with python and scontrol that only write down what they hear."""
    if not all(map(shutil.which, ("bash", "flock"))):
        pytest.skip("the array is for Linux")
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "atari100k.csv", tmp_path / "results")
    for name, text in FAKE.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(task, *flags):
        return subprocess.Popen(
            ["bash", ROOT / "tools" / "atari100k.sbatch", *flags], cwd=tmp_path,
            env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_ARRAY_JOB_ID="71",
                                  SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID="71",
                                  SLURM_CPUS_PER_TASK="2"))

    return start


def wait_for(path: Path):
    while not path.exists():
        time.sleep(0.02)


def test_a_task_plays_its_game_with_its_seed(cluster, tmp_path):
    (tmp_path / "finish").touch()
    assert cluster(26 + 7, "--preset", "debug").wait(10) == 0
    assert (tmp_path / "calls").read_text() == (
        "python drama.py --game Breakout --seed 1 --run runs/atari100k/Breakout-s1 --threads 2 "
        "--preset debug\n")
    assert (tmp_path / "runs" / "atari100k" / "Breakout-s1").is_dir()


def test_a_task_at_its_time_limit_saves_and_is_queued_again(cluster, tmp_path):
    """And no other: one task of an array bears the array's own number, as here."""
    process = cluster(0)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert (tmp_path / "calls").read_text().splitlines()[1:] == ["TERM", "scontrol requeue 71_0"]


def test_a_task_that_is_preempted_lets_python_save_and_does_not_disturb_it(cluster, tmp_path):
    """Slurm sends TERM to python itself, and queues the task again whatever it answers."""
    process = cluster(0)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None and "TERM" not in (tmp_path / "calls").read_text()
    process.send_signal(signal.SIGUSR1)  # to end the test
    process.wait(10)


def test_a_task_waits_until_its_predecessor_has_let_go_of_the_folder(cluster, tmp_path):
    """It may outlive its node's slurmd."""
    (tmp_path / "finish").touch()
    folder = tmp_path / "runs" / "atari100k" / "Alien-s0"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(["flock", folder / "lock", "sh", "-c", "touch held; cat"],
                              cwd=tmp_path, stdin=subprocess.PIPE)
    wait_for(tmp_path / "held")
    process = cluster(0)
    time.sleep(0.3)
    assert not (tmp_path / "started").exists()
    holder.communicate()
    assert process.wait(10) == 0 and (tmp_path / "started").exists()

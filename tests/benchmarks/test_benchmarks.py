"""The benchmarks' users and what is said of them, by closed forms; and dry runs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_zipf_draws_the_first_as_often_as_its_weight_says() -> None:
    from traffic import zipf

    drawn = np.array(list(itertools.islice(zipf(2000, 1.0, 0), 100_000)))
    weight = 1 / sum(1 / k for k in range(1, 2001))
    assert (drawn == 0).mean() == pytest.approx(weight, rel=0.05)
    assert (drawn == 9).mean() == pytest.approx(weight / 10, rel=0.2)


def test_poisson_arrivals_come_at_their_rate() -> None:
    from traffic import poisson

    users = poisson(50, 100, 8)
    assert len(users) == 5000
    gaps = np.diff([request.arrival for (request,) in users])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential gaps have


def test_steady_users_begin_in_the_middle() -> None:
    from traffic import steady
    from workload import textgen_lengths

    users = steady(16, "distinct", 5)
    prompts, outputs = textgen_lengths(1024)
    whole = set((prompts + outputs).tolist())
    assert all(user[0].prompt + user[0].output in whole for user in users)
    assert len({user[0].adapter for user in users}) == 16
    assert np.mean([user[0].prompt for user in users]) > 5 * np.mean(prompts)


def test_lags_find_their_steps_whatever_the_streams_begin_with() -> None:
    from latencies import Record, lags
    from traffic import Request

    rng = np.random.default_rng(1)
    steps = np.cumsum(rng.uniform(0.006, 0.009, 400))
    twin = Record(0, 0, Request(1, 400), 0.0, steps.tolist())
    true = rng.uniform(0.0005, 0.002, (3, 300))
    records = [
        Record(1, 0, Request(1, 300), 0.0, (steps[begin : begin + 300] + late).tolist())
        for begin, late in zip((20, 33, 90), true, strict=True)
    ]
    found = lags(twin, records)
    assert np.median(found) == pytest.approx(np.median(true), rel=0.05)
    assert found.max() < 0.0021


def test_the_long_run_counts_tokens_between_the_last_start_and_the_first_end() -> None:
    from latencies import Record, steady_tokens_per_s
    from traffic import Request

    request = Request(7, 100)
    users = ((request,), (request, request))
    records = [
        Record(0, 0, request, 0.0, [i * 0.1 for i in range(100)]),
        Record(1, 0, request, 0.0, [1 + i * 0.1 for i in range(40)]),
        Record(1, 1, request, 5.0, [5 + i * 0.1 for i in range(60)]),
    ]
    assert steady_tokens_per_s(records, users) == pytest.approx((89 + 39 + 50 + 7) / 8.9, rel=0.02)


@pytest.mark.parametrize(
    "command",
    [
        ("serving.py", "--only", "engine", "--scenarios", "steady,ttft"),
        ("loads.py", "--only", "churn", "--loads", "20", "--resident", "8", "--hosted", "6",
         "--adapters", "40", "--files", "4", "--adapter-bytes", "200000"),
        ("start_up.py", "--files", "4", "--adapter-bytes", "200000"),
    ],
)  # fmt: skip
def test_a_dry_run_leaves_its_results(tmp_path: Path, command: tuple[str, ...]) -> None:
    script, *arguments = command
    common = ("--model", "tiny", "--device", "cpu", "--batch", "2", "--rank", "8", "--seconds", "2")
    out = tmp_path / "out.json"
    places = ("--out", str(out), "--dir", str(tmp_path))
    line = [sys.executable, str(BENCHMARKS / script), *arguments, *common, *places]
    subprocess.run(line, check=True, capture_output=True)
    run = json.loads(out.read_text())
    assert run["command"].startswith("python ")
    assert {row["scenario"] for row in run["rows"]} in (
        {"steady", "ttft"},
        {"churn"},
        {"start", "captures", "no captures"},
    )

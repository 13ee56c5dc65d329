"""Draws docs/*.svg from the results files.

python benchmarks/plot.py benchmarks/results/h200 docs
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Row, read_rows

mpl.rcParams.update(
    {"svg.hashsalt": "granatum", "font.size": 9, "figure.constrained_layout.use": 1}
)

OURS, SERVICE, BARE = "#b5123e", "#e58a9f", "#c9c9c9"
PEERS = {"vLLM 0.22.1": "#4878a8", "SGLang 0.5.17": "#7fb08a"}

STEPS = {
    "vLLM 0.22.1": {"1": 6.64, "8": 9.37, "32": 19.5, "32 identical": 9.0},
    "SGLang 0.5.17": {"1": 7.24, "8": 8.23, "32": 11.3, "32 identical": 10.3},
}
"""Milliseconds of a 7B decode step with an adapter per request; one H200, rank 16."""
TEXTGEN = {
    "vLLM 0.22.1": {"distinct": 1510, "identical": 2884, "backbone": 3719},
    "SGLang 0.5.17": {"distinct": 2433, "identical": 2468, "backbone": 3550},
}
"""(prompt + output) tokens per second of Punica's requests, 7B, batch 32."""


def decode(rows: list[Row]) -> Figure:
    """Step times, 7B."""
    rows = [row for row in rows if row["scenario"] == "step" and row["context"] != "running"]
    ours = {}
    for row in rows:
        if row["model"] == "7b" and row["popularity"] in ("distinct", "identical"):
            name = str(row["batch"]) + (" identical" if row["popularity"] == "identical" else "")
            ours[name] = row["step_ms"]
    names = [name for name in STEPS["vLLM 0.22.1"] if name in ours]
    figure: Figure
    figure, axes = pyplot.subplots(figsize=(6, 2.8))
    series = {"granatum": [ours[name] for name in names]}
    series |= {peer: [steps[name] for name in names] for peer, steps in STEPS.items()}
    _bars(axes, series, [n if " " in n else f"{n} distinct" for n in names])
    axes.set(xlabel="batch and adapters", ylabel="ms per decode step", title="Llama 2 7B, LoRA on")
    for row in rows:
        if (row["model"], row["popularity"], row["batch"]) == ("7b", "backbone", 32):
            label = "granatum without adapters, batch 32"
            axes.axhline(row["step_ms"], color=BARE, linestyle="--", label=label)
    axes.legend(frameon=False)
    return figure


def serving(rows: list[Row]) -> Figure:
    """Text generation beside peers, and throughput by batch."""
    figure: Figure
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.8))
    own = {m: _by("popularity", "tokens_per_s", rows, m, "textgen") for m in ("engine", "service")}
    names = [n for n in ("distinct", "identical", "backbone") if n in own["engine"]]
    series = {"granatum, engine": [own["engine"][n] for n in names]}
    if all(n in own["service"] for n in names):
        series["granatum, whole service"] = [own["service"][n] for n in names]
    series |= {peer: [speeds[n] for n in names] for peer, speeds in TEXTGEN.items()}
    _bars(left, series, names)
    left.set(ylabel="tokens per second", title="Text generation, 7B, batch 32", ylim=(0, 5600))
    left.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
    for popularity, color in (("backbone", BARE), ("identical", SERVICE), ("distinct", OURS)):
        mine = [row for row in rows if row.get("popularity") == popularity]
        speeds = _by("batch", "tokens_per_s", mine, "curve", "steady")
        speeds |= _by("batch", "tokens_per_s", mine, "engine", "steady")
        batches = sorted(speeds)
        if batches:
            right.plot(batches, [speeds[b] for b in batches], "o-", color=color, label=popularity)
    right.set(xlabel="batch", ylabel="tokens per second", title="In the long run")
    right.set(xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False)
    return figure


def loads(rows: list[Row]) -> Figure:
    """Inter-token times while adapters arrive, and memory over thousands of loads."""
    figure: Figure
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.8))
    arrivals = [row for row in rows if row["scenario"] == "arrivals"]
    names = ["\n".join(row["tier"].split(": ")) for row in arrivals]
    series = {
        name: [row[f"inter_token_ms_{key}"] for row in arrivals]
        for name, key in (("median", "p50"), ("99th percentile", "p99"))
    }
    _bars(left, series, names)
    left.set(ylabel="ms from token to token", title="The other 31 streams while adapters arrive")
    left.tick_params(axis="x", labelsize=7)
    left.legend(frameon=False)
    for row in rows:
        if row["scenario"] == "churn":
            for key, color in (("device", OURS), ("pinned", "#4878a8"), ("resident", "#7fb08a")):
                samples = row["samples"]
                grown = [sample[f"{key}_mib"] - samples[0][f"{key}_mib"] for sample in samples]
                right.plot([s["loads"] for s in samples], grown, color=color, label=key)
            right.legend(frameon=False)
    right.set(xlabel="loads", ylabel="MiB grown", title="Memory")
    return figure


def lora_ops(rows: list[Row]) -> Figure:
    """A layer's time at rank 16 by distinct adapters, beside that of their bytes and vLLM's."""
    figure: Figure
    figure, axes = pyplot.subplots(figsize=(6, 3))
    for model, color in (("7b", OURS), ("8b", "#4878a8")):
        chosen = [
            row
            for row in rows
            if (row["model"], row["rank"], row["popularity"]) == (model, 16, "distinct")
            and row["rows"] <= 64
        ]
        by_rows = {n: [r for r in chosen if r["rows"] == n] for n in (1, 2, 4, 8, 16, 32, 64)}
        layers = {n: mine for n, mine in by_rows.items() if mine}
        ours = [sum(r["us"] for r in mine) for mine in layers.values()]
        floor = [
            sum(r["us"] * r["fraction_of_read_bandwidth"] for r in mine) for mine in layers.values()
        ]
        axes.plot(list(layers), ours, "o-", color=color, label=model)
        axes.plot(list(layers), floor, "--", color=color, label=f"{model}, bytes alone")
        peer = {n: [r["vllm_us"] for r in mine] for n, mine in layers.items()}
        peer = {n: times for n, times in peer.items() if all(times)}
        sums = [sum(times) for times in peer.values()]
        axes.plot(list(peer), sums, "s:", color=color, label=f"{model}, vLLM 0.22.1")
    axes.set(xscale="log", yscale="log", xlabel="rows, an adapter each", ylabel="µs per layer")
    axes.set_title("LoRA on a layer's four linears, rank 16")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _bars(axes: Axes, series: dict[str, list[float]], names: list[str]) -> None:
    """Groups of bars, each with its value."""
    colors = iter((OURS, SERVICE, "#7a7a7a"))
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        places = [n + (index - (len(series) - 1) / 2) * width for n in range(len(names))]
        color = PEERS.get(label) or next(colors)
        bars = axes.bar(places, values, width * 0.94, label=label, color=color)
        texts = [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values]
        axes.bar_label(bars, texts, fontsize=6)
    axes.set_xticks(range(len(names)), names)
    axes.spines[["top", "right"]].set_visible(False)


def _by(name: str, value: str, rows: Iterable[Row], mode: str, scenario: str) -> dict[Any, Any]:
    """Of 7B, by one field, another."""
    wanted = {"mode": mode, "scenario": scenario, "model": "7b"}
    return {
        row[name]: row[value]
        for row in rows
        if wanted.items() <= row.items() and name in row and value in row
    }


def main() -> None:
    """Draw what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draws: dict[str, Callable[[list[Row]], Figure]]
    draws = {"decode": decode, "serving": serving, "loads": loads, "lora_ops": lora_ops}
    for name, draw in draws.items():
        path = args.results / f"{name}.json"
        if path.is_file():
            draw(read_rows(path)).savefig(args.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

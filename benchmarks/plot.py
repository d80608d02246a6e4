"""A picture of `allreduce.py --sweep`: how fast, by length of the vector and number of peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> Path:
    """Draw what is in the JSON of a run; needs matplotlib.

    Returns:
        The PNG's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if "failed" not in row]
    counts = sorted({row["peers"] for row in rows})
    figure, axes = pyplot.subplots(
        2,
        max(1, len(counts)),
        figsize=(max(8, 4 * len(counts)), 7),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    lines = list(dict.fromkeys((row["system"], row["codec"]) for row in rows))
    for column, peers in enumerate(counts):
        for field, axis in zip(("GB/s", "whole_s"), axes[:, column], strict=True):
            for number, (system, codec) in enumerate(lines):
                mine = [
                    row
                    for row in rows
                    if (row["system"], row["codec"], row["peers"]) == (system, codec, peers)
                ]
                mine.sort(key=lambda row: row["mb"])
                axis.plot(
                    [row["mb"] for row in mine],
                    [row[field] for row in mine],
                    color=f"C{number % 10}",
                    marker="o",
                    linestyle="-" if system == "shoal" else "--",
                    label=f"{system} {codec}",
                )
            sizes = sorted({row["mb"] for row in rows if row["peers"] == peers})
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{mb:g}" for mb in sizes])
            axis.set_xticks([], minor=True)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{peers} peers")
        axes[1, column].set_xlabel("vector, MB of float32")
    if counts:
        axes[0, 0].set_ylabel("exchange, GB/s per peer")
        axes[1, 0].set_ylabel("whole round, s")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    machine = report["machine"]
    figure.suptitle(
        f"{machine['cores']} cores of {machine['cpu']}, commit {report['commit'][:7]},"
        f" {report['date'][:10]}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

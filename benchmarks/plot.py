"""Pictures of `allreduce.py --sweep` and of `convergence.py`."""

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


def plot_convergence(report: dict[str, Any], path: Path) -> Path:
    """Draw the curves of `convergence.py`: loss by bytes sent and by seconds; needs matplotlib.

    One row of pictures for each link, one line for each run; runs that differ in the seed alone
    have one colour.

    Returns:
        The PNG's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if "failed" not in row]
    links = sorted({row["mbit"] for row in rows})
    names = list(dict.fromkeys((row["setting"], row["lost"]) for row in rows))
    figure, axes = pyplot.subplots(
        max(1, len(links)),
        2,
        figsize=(12, max(5, 4 * len(links))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for mbit, (by_bytes, by_time) in zip(links, axes, strict=False):
        for number, (setting, lost) in enumerate(names):
            mine = [
                row
                for row in rows
                if (row["setting"], row["lost"], row["mbit"]) == (setting, lost, mbit)
            ]
            for run, row in enumerate(mine):
                points = [p for p in row["points"] if p["val_loss"] is not None and p["bytes"] > 0]
                losses = [point["val_loss"] for point in points]
                name = f"{setting}, {lost:g} lost" if lost else setting
                style: dict[str, Any] = {
                    "color": f"C{number % 10}",
                    "linestyle": "-" if setting.startswith("shoal") else "--",
                    "label": name if run == 0 else None,
                }
                by_bytes.plot([point["bytes"] / 1e6 for point in points], losses, **style)
                by_time.plot([point["wall_s"] for point in points], losses, **style)
        for axis in (by_bytes, by_time):
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            axis.set_title(f"{mbit:g} Mbit/s" if mbit else "no limit")
        by_bytes.set_ylabel("validation loss, nats/byte")
    if links:
        axes[-1, 0].set_xlabel("MB sent by a peer")
        axes[-1, 1].set_xlabel("seconds")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    machine = report["machine"]
    figure.suptitle(
        f"{report['peers']} peers, {report['numel'] / 1e6:.1f} M parameters, {report['steps']}"
        f" steps; {machine['cores']} cores of {machine['cpu']}, commit {report['commit'][:7]},"
        f" {report['date'][:10]}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

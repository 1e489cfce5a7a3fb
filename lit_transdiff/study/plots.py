"""Figures of runs. Each function takes runs or tables and returns a labelled matplotlib figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require
from lit_transdiff.evaluation.scores import JUDGED_BY, judged_by
from lit_transdiff.sampling.pictures import narrowed, scaled
from lit_transdiff.study.compare import MAX_IN_LABEL, Comparison, distinct, label, labels
from lit_transdiff.study.records import AXES, Run
from lit_transdiff.study.repeats import pooled, repeats
from lit_transdiff.study.scored import Entry, entries_of, higher_is_better, metric_of, title_of
from lit_transdiff.study.verdicts import BEST, NO_DIFFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["bars", "curves", "parallel_coordinates", "pareto", "response", "side_by_side", "spread"]
AXIS_LABELS = {
    "step": "optimizer steps",
    "images_seen": "images seen",
    "device_hours": "device-hours (GPU-hours on GPUs)",
}
GREY = "#9aa0a8"
MARKERS = "o^sDvP"  # one per judge
Point = tuple[float, float, str]  # cost, quality, the run's ``where``
DPI, SHOWN_WIDTH, MIN_CELL, HEADING, SPACE = 100, 480, 160, 26, 10  # pixels of pictures side by side
MAX_LEGEND, BESIDE = 20, 8  # the most names in a legend; a legend of more than ``BESIDE`` is beside the axes


def label_of(metric: str) -> str:
    """The title of a score with its better direction, or the name of another metric."""
    better = f" ({'higher' if higher_is_better(metric) else 'lower'} is better)" if metric_of(metric) else ""
    return title_of(metric) + better


def legend(axes: Axes | Figure, handles: Sequence[Any], names: Sequence[str], **where: Any) -> None:
    """A legend of literal names, even with dollar signs, and a count of those beyond ``MAX_LEGEND``."""
    from matplotlib.lines import Line2D

    more = len(names) - MAX_LEGEND
    if more > 0:
        handles = [*handles[:MAX_LEGEND], Line2D([], [], linestyle="none")]
        names = [*names[:MAX_LEGEND], f"and {more} more"]
    place = where or (dict(loc="upper left", bbox_to_anchor=(1.01, 1)) if len(names) > BESIDE else {})
    made = axes.legend(handles, [str(i) for i in range(len(names))], fontsize="small", frameon=False, **place)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def curves(
    runs: Sequence[Run], metric: str, over: str = "images_seen", labels: Mapping[str, str] | None = None
) -> Figure:
    """One line per run: ``metric`` over step, images_seen or device_hours; ``labels`` by the run's place."""
    from matplotlib.figure import Figure

    require(over in AXES, "over", over, ", ".join(AXES))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = {**distinct(runs, {run.where: run.name for run in runs}), **(labels or {})}
    drawn = []
    for run in runs:
        history = run.history([metric])
        if metric in history:
            drawn.append(names[run.where])
            axes.plot(history[over], history[metric], marker="o" if len(history) < 30 else None, markersize=3)
    require(len(axes.lines) > 0, "metric", metric, "a metric that one of the runs has logged")
    figure.set_figheight(max(3.6, 0.22 * min(len(drawn), MAX_LEGEND + 1) + 0.4))
    axes.set(xlabel=AXIS_LABELS[over], ylabel=label_of(metric))
    legend(axes, axes.lines, drawn)
    axes.grid(alpha=0.3)
    return figure


def spread(compared: Comparison, metric: str) -> Figure:
    """Mean and spread over seeds, with a dot per run; filled: the best, and no difference from it."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    verdicts = compared.verdicts(metric)
    figure = Figure(figsize=(6.4, 0.5 * len(verdicts) + 1.4), layout="constrained")
    axes = figure.subplots()
    names, keys = list(compared.groups["first run"]), compared.settings or ["first run"]
    if len(compared.settings) <= MAX_IN_LABEL:
        names = [label(row) for row in compared.groups[keys].to_dict("records")]
    for i, (verdict, mean, rows) in enumerate(
        zip(verdicts["verdict"], verdicts["mean"], compared.members, strict=True)
    ):
        axes.plot(compared.table[metric].iloc[rows], [i] * len(rows), "o", color=GREY, markersize=4)
        if math.isfinite(mean):
            filled = "full" if verdict in (BEST, NO_DIFFERENCE) else "none"
            axes.plot(mean, i, "D", color="C0", fillstyle=filled, markersize=9)
            above = (0, 9)
            axes.annotate(verdict, (mean, i), above, textcoords="offset points", ha="center", fontsize=8)
        else:
            middle = axes.get_yaxis_transform()
            axes.text(0.5, i, verdict, transform=middle, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=label_of(metric), ylim=(-0.6, len(names) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    looks: dict[str, dict[str, Any]] = {
        "a run": dict(marker="o", color=GREY, markersize=4),
        "mean, best or no difference from it": dict(marker="D", markersize=9),
        "mean of others": dict(marker="D", markersize=9, fillstyle="none"),
    }
    handles = [Line2D([], [], linestyle="none", **look) for look in looks.values()]
    legend(figure, handles, list(looks), loc="outside lower center", ncols=3)
    return figure


def short(name: str, between: str = ".") -> str:
    """The last part of a dotted name."""
    return name.split(between)[-1]


def side_by_side(
    pictures: Mapping[str, Image.Image], columns: int = 3, title: str = "", width: float | None = None
) -> Figure:
    """Pictures in rows of ``columns``, each under its name.

    Each is shown pixel by pixel or slightly smaller, so that its labels stay legible; ``width`` (inches)
    scales all of them to one width.
    """
    from matplotlib.figure import Figure

    require(len(pictures) > 0, "pictures", len(pictures), "at least one")
    fit = partial(scaled, width=round(width * DPI)) if width else readable
    shown = [fit(picture) for picture in pictures.values()]
    columns = min(columns, len(shown))
    across = max(MIN_CELL, *(picture.width for picture in shown)) + SPACE
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    heights = [HEADING + max(picture.height for picture in row) for row in rows]
    tops = [*itertools.accumulate(heights, initial=HEADING * bool(title))]
    total_width, total_height = across * columns, tops[-1]
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    for i, (name, picture) in enumerate(zip(pictures, shown, strict=True)):
        left, top = across * (i % columns) + (across - picture.width) // 2, tops[i // columns] + HEADING
        low, wide, high = total_height - top - picture.height, picture.width, picture.height
        place = (left / total_width, low / total_height, wide / total_width, high / total_height)
        axes = figure.add_axes(place, aspect="auto")
        axes.set_axis_off()
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_title(name, fontsize=10)
    figure.suptitle(title)
    return figure


def readable(picture: Image.Image) -> Image.Image:
    """``picture``, at most ``SHOWN_WIDTH`` pixels wide, or twice that if it is a strip."""
    return narrowed(picture, SHOWN_WIDTH * (2 if picture.width > 3 * picture.height else 1))


def parallel_coordinates(runs: Sequence[Run], settings: Sequence[str], metric: str) -> Figure:
    """One line per run through its settings to ``metric``, darker if better; text is spaced evenly."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scored, left_out = judged_alike(runs, metric)
    scored.sort(key=lambda pair: pair[1], reverse=not higher_is_better(metric))  # the best is plotted last
    places = [positions([entry.settings.get(name) for entry, _ in scored]) for name in settings]
    places.append(positions([value for _, value in scored]))
    figure = Figure(figsize=(1.9 * len(places) + 0.8, 3.8), layout="constrained")
    axes = figure.subplots()
    for i in range(len(scored)):
        tone = colormaps["viridis_r"](i / max(1, len(scored) - 1))
        heights = [place[0][i] for place in places]
        axes.plot(range(len(places)), heights, color=tone, alpha=0.85, linewidth=1.6)
    ends = {f"best, {scored[-1][1]:.4g}": axes.lines[-1], f"worst, {scored[0][1]:.4g}": axes.lines[0]}
    legend(figure, list(ends.values()), list(ends), loc="outside lower center", ncols=2)
    for x, (_, marks) in enumerate(places):
        axes.axvline(x, color=GREY, linewidth=0.8)
        for text, height in marks.items():
            box = dict(facecolor="white", edgecolor="none", pad=1)
            axes.text(x + 0.04, height, text, fontsize=9, va="center", bbox=box)
    axes.set_xticks(range(len(places)), [*map(short, settings), label_of(metric).split(" (")[0]])
    axes.set(yticks=[], ylim=(-0.06, 1.06), ylabel="low to high", xlim=(-0.2, len(places) - 0.6))
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axes.set_title("; ".join(filter(None, ["the darker, the better", left_out])), fontsize=9)
    return figure


def positions(values: Sequence[Any]) -> tuple[list[float], dict[str, float]]:
    """Positions in [0, 1] and ticks: numbers to scale (logarithmic over two decades), other values evenly."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numeric:
        low, high = min(values), max(values)
        bend = math.log if low > 0 and high / low > 99 else float
        span = bend(high) - bend(low)
        heights = [(bend(value) - bend(low)) / span if span else 0.5 for value in values]
        ends = {f"{low:.3g}": 0.0, f"{high:.3g}": 1.0} if span else {f"{low:.3g}": 0.5}
        return heights, ends
    kinds = sorted({str(value) for value in values})
    marks = {kind: i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
    return [marks[str(value)] for value in values], marks


def pareto(
    runs: Sequence[Run], quality: str = "eval/frechet_distance", cost: str = "decoder_evaluations_per_image"
) -> Figure:
    """Quality against the cost per image; the legend names the Pareto-optimal runs of each judge.

    Evaluations that differ only in their seed are one point at their mean. ``cost`` is a number in the
    manifest.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    name = short(quality, "/")
    scored = [(group, run) for run in runs for group in repeats(run.evaluations) if cost in group[0].manifest]
    by_judge: dict[tuple[Any, ...], list[Point]] = {}
    for group, run in scored:
        if (score := pooled(group, name)) is not None and math.isfinite(score.mean):
            point = (group[0].manifest[cost], score.mean, run.where)
            by_judge.setdefault(judged_by(group[0].manifest), []).append(point)
    require(len(by_judge) > 0, "runs", len(scored), f"runs with evaluations that have {quality} and {cost}")
    told, names = labels(runs), []
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for k, (judge, points) in enumerate(by_judge.items()):
        best, number = front(points, higher_is_better(quality)), len(axes.lines)
        number_of_images = judge[JUDGED_BY.index("num_images")]
        among = f" of {number_of_images} images by {judge[0]}" if len(by_judge) > 1 else ""
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], MARKERS[k % len(MARKERS)], color=GREY)
        axes.step([x for x, _, _ in best], [y for _, y, _ in best], "-", where="post", color=f"C{k}")
        for i, (x, y, _) in enumerate(best):
            axes.plot(x, y, MARKERS[k % len(MARKERS)], color=f"C{i + number}")
        names += [f"evaluations{among}", f"Pareto front{among}", *(told[where] for _, _, where in best)]
    axes.set(xlabel=cost.replace("_", " "), ylabel=label_of(quality), xscale="log")
    costs = sorted({x for points in by_judge.values() for x, _, _ in points})
    axes.set_xticks([x for i, x in enumerate(costs) if i == 0 or x / costs[i - 1] > 1.15])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    figure.set_size_inches(6.4, 3.8 + 0.2 * min(len(names) - 2, MAX_LEGEND))
    legend(figure, axes.lines, names, loc="outside lower center")
    axes.grid(alpha=0.3)
    return figure


def front(points: Sequence[Point], higher: bool) -> list[Point]:
    """The Pareto front of points (cost, quality, run), sorted by cost."""
    sign = -1 if higher else 1
    found, best = [], math.inf
    for x, y, where in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if sign * y < best:
            best = sign * y
            found.append((x, y, where))
    return found


def judged_alike(runs: Sequence[Run], metric: str) -> tuple[list[tuple[Entry, float]], str]:
    """The entries of the most common judge with their values of ``metric``, and a note on the others."""
    found: dict[tuple[Any, ...], list[tuple[Entry, float]]] = {}
    for entry in [entry for run in runs for entry in entries_of(run)]:
        score = entry.scores().get(metric)
        if score is not None and math.isfinite(score.mean):
            found.setdefault(entry.judge(metric), []).append((entry, score.mean))
    require(len(found) > 0, "metric", metric, "a metric that is a number in one of the runs")
    most = max(found.values(), key=len)
    others = sum(map(len, found.values())) - len(most)
    return most, f"{others} judged otherwise are left out" if others else ""


def response(runs: Sequence[Run], setting: str, metric: str, by: str | None = None) -> Figure:
    """``metric`` over one setting, with one line per value of the setting ``by``; repeats are averaged."""
    import pandas as pd
    from matplotlib.figure import Figure

    scored, left_out = judged_alike(runs, metric)
    settings = [one.settings for one, _ in scored]
    table = pd.DataFrame({"x": [own.get(setting) for own in settings], "y": [value for _, value in scored]})
    table["by"] = [str(own.get(by)) if by else "" for own in settings]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    if not all(isinstance(x, int | float) for x in table["x"]):
        table["x"] = table["x"].astype(str)
    for i, (name, part) in enumerate(table.groupby("by")):
        mean = part.groupby("x")["y"].mean()
        axes.plot(part["x"], part["y"], "o", color=f"C{i}", alpha=0.4, markersize=4)
        axes.plot(mean.index, mean.values, "-", color=f"C{i}", label=f"{short(by)} {name}" if by else None)
    numbers = [x for x in table["x"] if isinstance(x, int | float)]
    if len(numbers) == len(table) and min(numbers) > 0 and max(numbers) / min(numbers) > 20:
        axes.set_xscale("log")
    axes.set(xlabel=setting, ylabel=label_of(metric))
    axes.set_title(left_out, fontsize=9)
    if by:
        axes.legend(fontsize="small", frameon=False)
    axes.grid(alpha=0.3)
    return figure


def bars(values: Mapping[str, float], label: str, names: str = "") -> Figure:
    """A bar chart of named numbers with their values; ``names`` is the label of the axis of names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.2, 1.3 * len(values)), 3.2), layout="constrained")
    axes = figure.subplots()
    drawn = axes.bar(list(values), list(values.values()), color="C0", width=0.6)
    axes.bar_label(drawn, fmt="%.3g")
    axes.set(xlabel=names, ylabel=label)
    axes.margins(y=0.15)
    return figure

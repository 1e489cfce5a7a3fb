"""Figures show the numbers that they are given, with every axis labelled."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from lit_transdiff.figures import plots
from lit_transdiff.tracking.compare import compare, labels
from lit_transdiff.tracking.records import Run
from lit_transdiff.tracking.runs import runs
from tests.tracking.test_runs import make_run


@pytest.fixture
def found(tmp_path: Path) -> list[Run]:
    for seed in (0, 1):
        for lr in (1e-3, 1e-2, 1.0):
            make_run(tmp_path, f"lr{lr}-{seed}", 2 + lr + seed / 10, seed=seed, lr=lr)
    return runs(tmp_path)


def labelled(figure) -> None:
    figure.savefig(io.BytesIO(), format="png")  # draws: nothing is wrong with fonts, sizes or scales
    for axes in figure.axes:
        if axes.axison:
            assert axes.get_xlabel() or any(text.get_text() for text in axes.get_xticklabels())
            assert axes.get_ylabel() or any(text.get_text() for text in axes.get_yticklabels())


def test_curves(found: list[Run]) -> None:
    figure = plots.curves(found, "train/loss", "step", {"lr0.01-0": "mine"})
    (axes,) = figure.axes
    assert len(axes.lines) == 6 and list(axes.lines[0].get_xdata()) == [2, 4, 6]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(found[0].history()["train/loss"][0])
    assert axes.get_xlabel() == "optimizer steps" and "mine" in [text.get_text() for text in axes.get_legend().get_texts()]
    labelled(figure)
    with pytest.raises(ValueError, match="metric: got 'no'"):
        plots.curves(found, "no")


def test_the_front_is_what_nothing_beats(found: list[Run]) -> None:
    for i, run in enumerate(found):
        run.evaluations[0].manifest["cost"] = [1, 2, 3, 4, 5, 6][i]
    figure = plots.pareto(found, cost="cost")
    points = [(i + 1, run.evaluations[0].value("frechet_distance")) for i, run in enumerate(found)]
    front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    drawn = figure.axes[0].lines[1]
    named = [text.get_text() for text in figure.legends[0].get_texts()][2:]
    wanted = {run.evaluations[0].value("frechet_distance"): labels(found)[run.name] for run in found}
    assert named == [wanted[y] for _, y in front] and named[0].startswith("lr ")
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == front
    labelled(figure)


def test_parallel_coordinates_end_at_the_metric(found: list[Run]) -> None:
    figure = plots.parallel_coordinates(found, ["optimizer.lr", "seed"], "eval/frechet_distance")
    ends = [line.get_ydata()[-1] for line in figure.axes[0].lines[:6]]
    assert ends == sorted(ends, reverse=True) and (ends[0], ends[-1]) == (1.0, 0.0)  # the best, lowest, is drawn last
    labelled(figure)


def test_words_are_spaced_evenly_and_wide_numbers_by_logarithm() -> None:
    assert plots.positions(["a", "c", "b"])[0] == [0.0, 1.0, 0.5]
    assert plots.positions([0.01, 0.1, 1.0])[0] == pytest.approx([0.0, 0.5, 1.0])


def test_the_rest_is_labelled(found: list[Run]) -> None:
    labelled(plots.spread(compare(found), "eval/frechet_distance"))
    labelled(plots.response(found, "optimizer.lr", "eval/frechet_distance", by="seed"))
    labelled(plots.bars({"a": 1.0, "b": 2.0}, "numbers", "letters"))
    figure = plots.side_by_side({run.name: picture for run in found for picture in run.samples().values()}, columns=2)
    assert [axes.get_title() for axes in figure.axes][:2] == [found[0].name, found[1].name]
    figure = plots.side_by_side({"wide": Image.new("RGB", (40, 4)), "high": Image.new("RGB", (4, 8))}, columns=1)
    labelled(figure)
    wide, high = (axes.get_position().height for axes in figure.axes)
    assert high > 3 * wide  # each row is as high as its pictures

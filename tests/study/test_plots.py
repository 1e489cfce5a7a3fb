"""Figures show the numbers that they are given, with every axis labelled."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from lit_transdiff.study import plots
from lit_transdiff.study.compare import compare, labels
from lit_transdiff.study.records import Run
from lit_transdiff.study.runs import runs
from tests.helpers.run_folders import make_run


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
    figure = plots.curves(found, "train/loss", "step", {found[0].where: "mine"})
    (axes,) = figure.axes
    assert len(axes.lines) == 6 and list(axes.lines[0].get_xdata()) == [2, 4, 6]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(found[0].history()["train/loss"][0])
    assert axes.get_xlabel() == "optimizer steps" and "mine" in [
        text.get_text() for text in axes.get_legend().get_texts()
    ]
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
    best = named(figure)[2:]
    wanted = {run.evaluations[0].value("frechet_distance"): labels(found)[run.where] for run in found}
    assert best == [wanted[y] for _, y in front] and best[0].startswith("lr ")
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == front
    labelled(figure)


def named(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_parallel_coordinates_end_at_the_metric(found: list[Run]) -> None:
    figure = plots.parallel_coordinates(found, ["optimizer.lr", "seed"], "eval/frechet_distance")
    ends = [line.get_ydata()[-1] for line in figure.axes[0].lines[:6]]
    # the best, lowest, is drawn last
    assert ends == sorted(ends, reverse=True) and (ends[0], ends[-1]) == (1.0, 0.0)
    scores = sorted(run.evaluations[0].value("frechet_distance") for run in found)
    assert named(figure) == [f"best, {scores[0]:.4g}", f"worst, {scores[-1]:.4g}"]
    labelled(figure)


def test_words_are_spaced_evenly_and_wide_numbers_by_logarithm() -> None:
    assert plots.positions(["a", "c", "b"])[0] == [0.0, 1.0, 0.5]
    assert plots.positions([0.01, 0.1, 1.0])[0] == pytest.approx([0.0, 0.5, 1.0])


def test_the_rest_is_labelled(found: list[Run]) -> None:
    labelled(figure := plots.spread(compare(found), "eval/frechet_distance"))
    assert named(figure) == ["a run", "mean, best or no difference from it", "mean of others"]
    labelled(plots.response(found, "optimizer.lr", "eval/frechet_distance", by="seed"))
    labelled(plots.bars({"a": 1.0, "b": 2.0}, "numbers", "letters"))
    figure = plots.side_by_side(
        {run.name: picture for run in found for picture in run.samples().values()}, columns=2
    )
    assert [axes.get_title() for axes in figure.axes][:2] == [found[0].name, found[1].name]


def test_pictures_side_by_side_keep_their_pixels() -> None:
    """Text in pictures can be read as before; wide ones are made smaller."""
    given = {
        "wide": Image.new("RGB", (400, 40)),
        "high": Image.new("RGB", (40, 80)),
        "wider": Image.new("RGB", (960, 400)),
    }
    figure = plots.side_by_side(given, columns=2, title="some")
    labelled(figure)
    extents = [axes.get_window_extent() for axes in figure.axes]
    assert [(round(e.width), round(e.height)) for e in extents] == [(400, 40), (40, 80), (480, 200)]
    # none lies on another
    assert extents[0].x1 < extents[1].x0 and extents[2].y1 < min(extents[0].y0, extents[1].y0)
    figure = plots.side_by_side(given, width=2.0)
    assert {round(axes.get_window_extent().width) for axes in figure.axes} == {200}


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_legends_name_every_run_as_it_is_called(tmp_path: Path) -> None:
    for folder, name in (("x", "run"), ("y", "run"), ("z", "_hidden"), ("z", "formula")):
        make_run(tmp_path / folder, name, 1.0)
    found = runs(tmp_path)
    figure = plots.curves(
        found, "train/loss", labels={run.where: "a$x_{$b$^" for run in found if run.name == "formula"}
    )
    assert sorted(texts(figure)) == sorted(["run (x/run)", "run (y/run)", "_hidden", "a$x_{$b$^"])
    labelled(figure)


def test_a_long_legend_is_cut(tmp_path: Path) -> None:
    for i in range(25):
        make_run(tmp_path, f"run{i:02}", 1.0)
    figure = plots.curves(runs(tmp_path), "train/loss")
    assert len(figure.axes[0].lines) == 25 and len(texts(figure)) == 21 and texts(figure)[-1] == "and 5 more"
    labelled(figure)


def test_scores_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    for i, score in enumerate((1.0, float("nan"), 2.0)):
        make_run(tmp_path, f"r{i}", score, lr=0.1 * (i + 1))
    found = runs(tmp_path)
    figure = plots.parallel_coordinates(found, ["optimizer.lr"], "eval/frechet_distance")
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines[:2]] == [1.0, 0.0]
    labelled(figure)
    assert len(plots.pareto(found).axes[0].lines[0].get_xdata()) == 2
    labelled(plots.spread(compare(found), "eval/frechet_distance"))


def test_what_was_judged_otherwise_is_on_no_line_with_the_rest(found: list[Run]) -> None:
    for i, run in enumerate(found):
        run.evaluations[0].manifest.update({"cost": i + 1, "num_images": 5 if i < 2 else 20})
    figure = plots.response(found, "optimizer.lr", "eval/frechet_distance")
    assert sum(len(line.get_xdata()) for line in figure.axes[0].lines[::2]) == 4
    assert figure.axes[0].get_title() == "2 judged otherwise are left out"
    figure = plots.pareto(found, cost="cost")
    names = named(figure)
    fronts = ["Pareto front of 5 images by None", "Pareto front of 20 images by None"]
    assert [name for name in names if "front" in name] == fronts
    labelled(figure)

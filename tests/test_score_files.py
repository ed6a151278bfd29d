"""The files of --report."""

import csv

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mae.evaluate import score_files


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_report_writes_tables_and_a_picture(tmp_path):
    labels, predictions = np.array([0, 0, 0, 1, 1]), np.array([0, 2, 2, 1, 1])
    score_files.write(tmp_path / "new", ["cat", "dog", "emu"], labels, predictions)
    assert rows(tmp_path / "new" / "classes.csv") == [
        ["class", "images", "right", "accuracy", "most often taken for"],
        ["cat", "3", "1", "0.3333", "emu"],
        ["dog", "2", "2", "1.0000", ""],
        ["emu", "0", "0", "", ""],
    ]
    matrix = rows(tmp_path / "new" / "confusion.csv")
    assert matrix[0][1:] == ["cat", "dog", "emu"]
    assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == [[1, 0, 2], [0, 2, 0], [0, 0, 0]]
    assert Image.open(tmp_path / "new" / "confusion.png").width > 200


def test_names_of_classes_are_no_formulas_and_may_be_many(tmp_path):
    score_files.write(tmp_path, [r"$\frac{1$", "$5-$9"], np.array([0, 1]), np.array([0, 1]))
    assert Image.open(tmp_path / "confusion.png").width > 200
    labels = np.arange(300)
    score_files.write(tmp_path, [str(n) for n in labels], labels, labels)
    assert Image.open(tmp_path / "confusion.png").height <= 1300


def test_the_picture_shows_the_share_of_each_true_class(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure) or save(figure, path))
    score_files.write(tmp_path, ["cat", "dog", "emu"], np.array([0, 0, 0, 0, 1, 1]), np.array([0, 2, 2, 2, 1, 0]))
    picture = figures[0].axes[0].images[0]
    assert picture.get_array().tolist() == [[0.25, 0, 0.75], [0.5, 0.5, 0], [0, 0, 0]]
    assert picture.get_clim() == (0, 1)

"""The CSV files that the project writes, read by pandas and by its own readers."""

import csv
import io

import numpy as np
import pandas
import pytest
from mains import open_source
from PIL import Image

from mae.compare import summary
from mae.evaluate import score_files
from mae.files import spreadsheet

# Formulas, numbers, and texts with apostrophes of their own.
NAMES = ["=1+1", "+cmd|' /C calc'!A0", "-cat", "@sum", "\ttab", "\rreturn", "＝wide", "'=quoted", "''-twice", "'90s",
         "-1.2", "+3", "1e-3", "Ω, \"b\"\nc", "plain", ""]  # fmt: skip
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝")


def cells_of_pandas(path):
    """All cells as texts, with the header."""
    return pandas.read_csv(path, header=None, dtype=str, keep_default_na=False).values.tolist()


def assert_no_formula(rows):
    wrong = [cell for row in rows for cell in row if cell.startswith(FORMULAS)]
    assert all(pandas.to_numeric(cell) == float(cell) for cell in wrong)


def test_every_text_is_read_as_it_was(tmp_path):
    spreadsheet.write(tmp_path / "one.csv", [["title", *NAMES], [0, *range(len(NAMES) - 1), -1.5]])
    with (tmp_path / "one.csv").open(newline="", encoding="utf-8") as file:
        written = file.read()
    header, numbers = spreadsheet.read(written)
    assert header[1:] == NAMES
    assert float(numbers[-1]) == -1.5
    plain = list(csv.reader(io.StringIO(written, newline="")))
    assert plain[0][1:] == ["'=1+1", "'+cmd|' /C calc'!A0", "'-cat", "'@sum", "'\ttab", "'\rreturn", "'＝wide",
                            "''=quoted", "'''-twice", *NAMES[9:]]  # fmt: skip
    assert cells_of_pandas(tmp_path / "one.csv") == plain
    assert_no_formula(plain)


@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_the_files_of_a_report_are_no_formulas(kind, tmp_path):
    names = ["=HYPERLINK(1)", "-1.2", "@b"]
    labels = np.array([0, 1, 2, 2])
    if kind == "classes":
        score_files.write(tmp_path, names, labels, labels[::-1])
    else:
        truth = np.eye(3)[labels]
        score_files.write_targets(tmp_path, names, truth, truth - 0.5)
    files = sorted(tmp_path.glob("*.csv"))
    assert len(files) == (2 if kind == "classes" else 1)
    for file in files:
        rows = cells_of_pandas(file)
        assert_no_formula(rows)
        assert [row[0] for row in rows[1:]] == ["'=HYPERLINK(1)", "-1.2", "'@b"]
        assert [row[0] for row in spreadsheet.read(file.read_text(encoding="utf-8"))[1:]] == names
    table = pandas.read_csv(files[0])
    assert table.iloc[:, 1:].select_dtypes("number").shape[1] >= 2  # scores stay numbers


def test_results_of_a_comparison_are_read_as_they_were(tmp_path):
    results = [
        summary.Result("=mine", "k-NN", 12, 0, -1.25, "k 5", 1.5, "python main_knn.py", "r2", 7, 0.5),
        summary.Result("@scratch", "linear probe", 12, 1, float("nan"), "", 2.0, "python", "r2"),
    ]
    summary.write(tmp_path, results)
    assert_no_formula(cells_of_pandas(tmp_path / "results.csv"))
    assert pandas.read_csv(tmp_path / "results.csv").accuracy[0] == -1.25
    first, second = summary.read(tmp_path)
    assert first == results[0]
    assert (second.encoder, np.isnan(second.accuracy)) == ("@scratch", True)


def test_a_list_that_was_written_has_the_names_and_files(tmp_path):
    """A list of a user, too: only an apostrophe before one of the characters is removed."""
    names = ["=1", "'90s", "@home", "-cat"]
    files = [f"{name}.png" for name in names]
    for number, file in enumerate(files):
        Image.new("L", (4, 4), number).save(tmp_path / file)
    spreadsheet.write(tmp_path / "train.csv", [("path", "label"), *zip(files, names, strict=True)])
    source = open_source("train", file_list=str(tmp_path / "train.csv"))
    assert [source.classes[label] for label in source.labels] == names
    assert [source.names[index] for index in range(4)] == files
    (tmp_path / "plain.csv").write_text(
        "path,label\n" + "".join(f"{f},{n}\n" for f, n in zip(files, names, strict=True))
    )
    assert open_source("train", file_list=str(tmp_path / "plain.csv")).classes == source.classes

"""Results on the disk: sealed, and refused where they were changed by hand."""

import json

import pytest
from test_table import METRICS, make_cells

from reflow_lab.errors import UserError
from reflow_lab.studies import estimates, results, table
from reflow_lab.studies.description import Row, Study

STUDY = Study(
    "A title",
    (),
    (1, 9),
    (Row("base", ("a=1",)), Row("better", ("a=2",), "base", paper={"here": {"value": 2.23, "source": "abs"}})),
    paper="FID at 9 NFE",
    name="group/mine",
)


@pytest.fixture
def result(tmp_path):
    return estimates.build(STUDY, make_cells(tmp_path, [0, 1, 2]), "here", ["study=group/mine", "scale=mini", "out=x", "seeds=3"])


def test_a_result_tells_all_that_a_table_needs(result):
    assert (result["study"], result["data"], result["seeds"], result["metric"]) == (
        "group/mine",
        "here",
        [0, 1, 2],
        "fd_lite0_teacher",
    )
    assert set(result["metrics"]) == set(METRICS) and result["distance"] == "fd_lite0"
    assert [row["paper"] for row in result["rows"]] == [None, {"value": 2.23, "source": "abs"}]
    assert result["command"] == "reflow-lab study study=group/mine scale=mini seeds=3"
    assert result["rows"][1]["command"] == "reflow-lab study study=group/mine scale=mini seeds=3 'rows=[\"better\"]'"
    assert len(result["estimates"]) == 4 * 2 * 2 and len(result["effects"]) == 4 * 2
    (found,) = [e for e in result["effects"] if (e["metric"], e["nfe"]) == ("fd_lite0", 1)]
    assert found["value"] == pytest.approx(-9) and found["low"] == pytest.approx(-9 - 4.302653 * 2 / 3**0.5, rel=1e-6)


def with_scores(cells):
    """Recall of a cell: its distance over 100; of one seed it has no interval, since the noise is not resampled for it."""
    scored = {"scores": ["kd_lite0", "kd_lite0_std", "recall"], "kd_lite0_std": 0.5}
    return [cell | scored | {"recall": cell["fd_lite0"] / 100, "kd_lite0": 2 * cell["fd_lite0"]} for cell in cells]


def test_scores_stand_beside_the_distances(tmp_path):
    """With intervals over seeds; of one seed without."""
    one, three = (estimates.build(STUDY, with_scores(make_cells(tmp_path / str(num), range(num))), "here", []) for num in (1, 3))
    assert three["metrics"] == ["fd_lite0_teacher", "fd_lite0", "fd_lite0_added", "paired_rmse", "kd_lite0", "recall"]
    for place in ("estimates", "effects"):
        for alone, several in zip(one[place], three[place], strict=True):
            if alone["metric"] == "recall":
                assert alone["low"] is None and several["low"] < several["value"] < several["high"]
    by_metric = {e["metric"]: e["value"] for e in three["effects"] if e["nfe"] == 1}
    assert by_metric["recall"] == pytest.approx(by_metric["fd_lite0"] / 100)
    text = table.markdown(one)
    assert "## recall: share of the data within the samples' manifold; higher is better" in text
    assert "## kd_lite0: kernel distance to the data" in text and "kd_lite0_std" not in text


def test_it_is_read_back_as_it_was_written(result, tmp_path):
    results.write(tmp_path, result)
    again = results.read(tmp_path)
    assert {key: value for key, value in again.items() if key != results.SEAL} == json.loads(json.dumps(result))
    assert results.read(tmp_path / results.FILE) == again


@pytest.mark.parametrize("place", ["estimates", "effects", "cells"])
def test_a_result_that_was_changed_by_hand_is_refused(result, tmp_path, place):
    results.write(tmp_path, result)
    path = tmp_path / results.FILE
    changed = json.loads(path.read_text())
    key = "fd_lite0" if place == "cells" else "value"
    changed[place][0][key] *= 0.99
    path.write_text(json.dumps(changed))
    with pytest.raises(
        UserError, match=r"table\.json: was changed after it was written: its sha256 is [0-9a-f]+, its content's is"
    ):
        results.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"study": "a"}', "{"])
def test_what_is_no_result_is_one_line(tmp_path, content):
    (tmp_path / results.FILE).write_text(content)
    with pytest.raises(UserError, match=r"table\.json: (not the result of a study|cannot be read)") as caught:
        results.read(tmp_path)
    assert "\n" not in str(caught.value)

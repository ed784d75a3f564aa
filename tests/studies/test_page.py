"""The page of all results, and that the committed one is what is made of the committed results."""

import json
import shutil

import pytest
import yaml
from test_results import STUDY
from test_table import make_cells

from reflow_lab.cli import main
from reflow_lab.errors import UserError
from reflow_lab.paths import conf_dir
from reflow_lab.studies import estimates, page, results

EXPERIMENTS = conf_dir().parent / "experiments"


@pytest.fixture
def folder(tmp_path):
    """Two studies, of which one was run."""
    rows = [
        {"name": "base", "overrides": []},
        {"name": "last", "overrides": [], "paper": {"ffhq": {"value": 2.84, "source": "abs"}}},
    ]
    for name in ("mine", "other"):
        path = tmp_path / "experiments" / "group" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"title": f"About {name}", "overrides": [], "nfe": [1, 9], "rows": rows, "paper": "FID at 9 NFE"}
        path.write_text(yaml.safe_dump(about))
    (at := tmp_path / "experiments" / "results" / "mine").mkdir(parents=True)
    results.write(at, estimates.build(STUDY, make_cells(tmp_path, [0, 1, 2]), "here", ["scale=mini"]))
    return tmp_path / "experiments"


def test_each_study_has_its_results_or_the_command_that_makes_them(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    assert main(["tables"]) == 0 and "written: experiments/README.md" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    mine, other = text.split("## [group/")[1:]
    assert mine.startswith("mine](group/mine.yaml): About mine") and "| better against base | -9.0 ± 5.0 |" in mine
    assert (
        results.read(folder / "results" / "mine")[results.SEAL] in mine and "reflow-lab study study=group/mine scale=mini" in mine
    )
    assert "Not run: `reflow-lab study study=group/other`" in other and "last, ffhq: 2.84 [abs]" in other


def test_a_changed_result_is_refused_and_the_page_stays(folder, capsys):
    page.main([str(folder)])
    before = (folder / "README.md").read_text()
    path = folder / "results" / "mine" / results.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"title": "better"}))
    with pytest.raises(UserError, match=r"mine/table\.json: was changed after it was written"):
        page.main([str(folder)])
    assert (folder / "README.md").read_text() == before


def test_results_may_lie_anywhere_below_a_folder_of_ones_own(folder, capsys):
    """Beside which the page goes, with links from there; tables of `evaluate` and `search` are no studies'."""
    outputs = folder.parent / "outputs"
    shutil.move(folder / "results" / "mine", outputs / "group" / "mine")
    for other in ("sweeps", "search"):
        (outputs / other / "key").mkdir(parents=True)
        (outputs / other / "key" / results.FILE).write_text("[]")
    page.main([str(folder), "--results", str(outputs)])
    text = (outputs / "README.md").read_text()
    assert not (folder / "README.md").exists() and "[group/mine](../experiments/group/mine.yaml)" in text
    assert "[its cells](group/mine/table.json)" in text and (outputs / "group" / "mine" / "table.json").exists()
    with pytest.raises(UserError, match=r"^--results=nowhere: no such folder"):
        page.main([str(folder), "--results", "nowhere"])


def test_a_file_that_is_no_study_keeps_no_other_from_the_page(folder):
    (folder / "group" / "wrong.yaml").write_text("title: [")
    page.main([str(folder)])
    text = (folder / "README.md").read_text()
    assert "wrong.yaml: not a study" in text and "About mine" in text
    with pytest.raises(UserError, match=r"^FOLDER=nowhere: no such folder"):
        page.main(["nowhere"])


def test_the_committed_page_is_made_of_the_committed_results(tmp_path):
    copy = tmp_path / "experiments"
    shutil.copytree(EXPERIMENTS, copy)
    page.main([str(copy)])
    assert (copy / "README.md").read_text() == (EXPERIMENTS / "README.md").read_text(), "run `make tables`"

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from reflow_lab.studies.description import Row, Study
from reflow_lab.studies.request import overruled, place


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study=nonsense"], "study=nonsense: no such study; there are "),
        (["rows=[x]"], "rows=['x']: must be some of base flow, BSL"),
        (["seeds=0"], "seeds=0: must be a whole number of at least 1"),
        (["nfe=3"], "nfe=3: a study measures at the numbers of steps that its file lists"),
    ],
)
def test_a_mistake_is_answered_without_torch(tmp_path, words, says):
    """Which takes seconds to import."""
    code = f"import sys; from reflow_lab.cli import main; print(main(['study', *{words}]), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "2 False\n" and says in found.stderr and found.stderr.count("\n") == 1


def test_what_rows_do_not_heed_is_said():
    rows = (Row("a", ("inf.solver.gamma=1", "flow_map=ayf")), Row("b", ("flow_map=lmd",)), Row("c", ("flow_map=lmd",)))
    given = ["++inf.solver.gamma=0", "flow_map=lmd", "trainer=cpu"]
    expected = ["++inf.solver.gamma=0: not heeded by rows that set it themselves: a"]
    assert overruled(Study("", (), (), rows), ["a", "b"], given) == [
        *expected,
        "flow_map=lmd: not heeded by rows that set it themselves: a",
    ]
    assert overruled(Study("", (), (), rows), ["b", "c"], given) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "outputs/group/mine"),
        (["experiment=quickstart", "seeds=3", "data.path=x"], "outputs/group/mine"),
        (["experiment=cifar10", "scale=mini"], "outputs/group/mine-cifar10"),
        (["experiment=toy", "data=two_moons"], "outputs/group/mine-toy-two_moons"),
    ],
)
def test_tables_on_other_data_do_not_replace_each_other(given, expected):
    study, cfg = Study("", ("experiment=quickstart",), (), (), name="group/mine"), {"outputs": "outputs", "out": None}
    assert str(place(OmegaConf.create(cfg), study, given)) == expected
    assert str(place(OmegaConf.create(cfg | {"out": "here"}), study, given)) == "here"

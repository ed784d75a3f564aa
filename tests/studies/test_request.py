import subprocess
import sys

import pytest


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

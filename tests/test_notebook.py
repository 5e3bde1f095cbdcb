"""The notebook: a valid file without outputs, whose cells run one after another."""

import json
import re

import pytest
from runs import ROOT

FILE = ROOT / "notebooks" / "multi_token_prediction.ipynb"


def cells():
    content = json.loads(FILE.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return content["cells"]


def test_the_notebook_holds_no_outputs():
    for cell in cells():
        assert cell["cell_type"] in ("code", "markdown") and cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.packages
@pytest.mark.parametrize("whole", [False, True])
def test_every_cell_of_the_notebook_runs(whole, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `notebook`")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, names = [], {}
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf().axes))
    for cell in cells():
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            if not whole:
                code = re.sub(r"^(STEPS\w*) = \d+", r"\1 = 20", code, flags=re.M)
            exec(compile(code, str(FILE), "exec"), names)

    out = capsys.readouterr().out
    assert "50 different sequences" in out and "of 3 tokens a pass" in out
    assert [len(axes) for axes in drawn] == [1, 3, 1]
    assert all(axes[0].lines or axes[0].images for axes in drawn)
    if whole:
        for curve in names["curves"].values():
            assert curve[-1] < 1.05 * names["p"].least_loss(1)
        assert min(names["means"]) > 0.95

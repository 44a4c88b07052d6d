"""CUDA graphs: what can be seen of them without CUDA, and on a GPU that they change no number."""

import drama
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from test_drama import CONTEXTS, close, command, fake, outcome, runs  # noqa: F401
from tools import graphs


class Replayed:
    """As Graph does it, but with Python: inputs are copied to where they were when it was recorded,
    and the outputs of a call overwrite those of the call before."""

    replayed = set()

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= graphs.Graph.WARM:
            return self.function(*inputs)
        if self.calls == graphs.Graph.WARM + 1:
            self.inputs = tree_map(torch.clone, inputs)
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            mine.copy_(given)
        fresh = self.function(*self.inputs)
        if self.calls == graphs.Graph.WARM + 1:
            self.replayed.add(self.function.func.__name__)
            self.outputs = tree_map(torch.clone, fresh)
        for mine, new in zip(tree_leaves(self.outputs), tree_leaves(fresh), strict=True):
            mine.copy_(new)
        return self.outputs


@pytest.fixture
def restored(monkeypatch):
    """After the test the updates of drama.py are its own again."""
    for name in graphs.UPDATES:
        monkeypatch.setattr(drama, name, getattr(drama, name))


@pytest.mark.parametrize("flags", [[], CONTEXTS])
def test_a_run_from_graphs_is_the_run_without(flags, runs, fake, restored, tmp_path):
    assert command(tmp_path / "plain", *flags) == 0
    graphs.launch_graphs(make=Replayed)
    fake.setattr(Replayed, "replayed", set())
    assert command(tmp_path / "graphs", *flags) == 0
    assert Replayed.replayed == set(graphs.UPDATES)
    assert outcome(runs[0], tmp_path / "plain") == outcome(runs[1], tmp_path / "graphs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is none")
def test_without_a_GPU_graphs_are_refused(restored, capsys):
    assert drama.command_line(graphs.run_command, [], "tools.graphs") == 2
    assert capsys.readouterr().err == "tools.graphs: graphs need a CUDA GPU, and there is none.\n"
    with pytest.raises(SystemExit) as end:  # which needs none
        drama.command_line(graphs.run_command, ["--help"], "tools.graphs")
    out = capsys.readouterr().out
    assert end.value.code == 0 and "tools.graphs --check" in out and "--model-steps" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [[], CONTEXTS, ["--backbone", "mamba"]])
def test_on_CUDA_a_run_from_graphs_has_the_numbers_of_one_without(flags, runs, restored, tmp_path):
    torch.backends.cudnn.deterministic = True  # or a latent might be drawn otherwise
    assert command(tmp_path / "plain", "--device", "cuda", *flags) == 0
    graphs.launch_graphs()
    assert command(tmp_path / "graphs", "--device", "cuda", *flags) == 0
    plain, from_graphs = (tree_leaves([run.model.state_dict(), run.agent.state_dict()])
                          for run in runs)
    for with_graphs, without in zip(from_graphs, plain):
        close(with_graphs.float().cpu(), without.float().cpu(), 1e-3)

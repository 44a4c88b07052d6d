"""Train on CUDA with every update launched as one graph; no GPU has tried it yet.

    python -m tools.graphs --check                      is it right here, and what does it save?
    python -m tools.graphs --game Breakout --preset best    drama.py, with graphs

An update of Drama is thousands of small kernels, and a GPU is done with one before Python has
launched the next. Nothing in an update waits for the host (agent.take_step decides on the device),
so each can be recorded once and launched at a stroke.
"""

import functools
import statistics
import sys
import time

import drama  # first: it sets up torch
import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map


class Graph:
    """A function of tensors, recorded on a CUDA GPU and from then on launched at one stroke.

    What is recorded is a list of kernels with their addresses: so shapes are fixed, inputs are
    copied to where they were, the outputs of a call are overwritten by the next, and nothing inside
    may look at a number. Random numbers follow torch.manual_seed as ever. The first calls run
    unrecorded, on the stream that will record: there libraries prepare themselves.
    """

    WARM = 3

    def __init__(self, function):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= self.WARM:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == self.WARM + 1:
            self.inputs, self.graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        torch._foreach_copy_(tree_leaves(self.inputs), tree_leaves(inputs))
        self.graph.replay()
        return self.outputs


def graphed(update, make=Graph):
    """update(run, *tensors) -> the same from a graph, one for each run."""
    graphs = {}

    @functools.wraps(update)
    def launch(run, *tensors):
        if run not in graphs:
            graphs[run] = make(functools.partial(update, run))
        return graphs[run](*tensors)

    return launch


UPDATES = ("update_world_model", "update_agent")


def launch_graphs(make=Graph):
    """From now on the updates of drama.py come from graphs."""
    for name in UPDATES:
        setattr(drama, name, graphed(getattr(drama, name), make))


def check(updates: int = 30):
    """Weights after the same updates with graphs and without, and the time of each."""
    before = {name: getattr(drama, name) for name in UPDATES}
    weights, seconds = {}, {}
    torch.backends.cudnn.deterministic = True  # or a latent might be drawn differently
    for kind in ("plain", "graphs"):
        s, device, _ = drama.new_settings(dict(preset="laptop", device="cuda", steps=4000))
        run, times = drama.Run(s, device), []
        rng = np.random.default_rng(0)
        run.replay.append_steps(dict(
            frame=rng.integers(256, size=(s.steps, 64, 64, 3), dtype=np.uint8),
            action=rng.integers(run.game.actions, size=s.steps, dtype=np.int32)))
        for group in run.model_optimizer.param_groups + run.agent_optimizer.param_groups:
            group["lr"].fill_(group["rate"])
        for update in range(updates):
            batch = run.draw_windows(s.batch, s.length, drama.reseed(s.seed, update, "windows"))
            torch.cuda.synchronize()
            start = time.perf_counter()
            _, good = drama.update_world_model(run, batch)
            drama.average_weights(run, "model")
            drama.update_agent(run, batch, good)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        weights[kind] = tree_leaves([run.model.state_dict(), run.agent.state_dict()])
        seconds[kind] = statistics.median(times[updates // 2 :])
        launch_graphs()
    for name, update in before.items():
        setattr(drama, name, update)
    apart = max(((a - b).abs().max() / (1 + b.abs().max())).item()
                for a, b in zip(weights["graphs"], weights["plain"]) if a.is_floating_point())
    plain, graphs = (1e3 * seconds[kind] for kind in ("plain", "graphs"))
    print(f"{torch.cuda.get_device_name()}: an update of laptop takes {plain:.1f} ms, {graphs:.1f} "
          f"from graphs; after {updates} updates weights differ by {apart:.1e} at most, of the "
          "largest in a tensor")


def run_command(argv: list[str]):
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
    elif not torch.cuda.is_available():
        raise drama.Mistake("graphs need a CUDA GPU, and there is none.")
    elif argv == ["--check"]:
        return check()
    launch_graphs()
    drama.run_command(argv)


if __name__ == "__main__":
    sys.exit(drama.command_line(run_command, name="tools.graphs"))

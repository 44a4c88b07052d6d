#!/usr/bin/env bash
# torch 2.13.0: the first optimizer that a process makes takes as long as `import torch`.
#
# `import torch` leaves torch._dynamo out, and a program that compiles nothing should never meet
# it. But some methods of torch.optim.Optimizer are marked as none of the compiler's business, and
# the mark imports torch._dynamo when such a method is first called: add_param_group, from the
# constructor. So any first optimizer, a subclass of one's own with a single parameter too, brings
# 800 modules (parts of torch._inductor and all of sympy among them) after torch's own 1,100, and
# takes 1.3 seconds, after 1.2 for torch. The next one takes 0.1 ms. Short programs pay half of
# their time for it: tests that train in a process of their own, workers that each make one.
#
# Seen with Python 3.11 on Linux; CPU seconds of one core. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import sys
import time

start = time.process_time()
import torch


class Mine(torch.optim.Optimizer):
    """Has parameters, and never a step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})


def report(what, start, before):
    seconds, new = time.process_time() - start, set(sys.modules) - before
    compiler = {"torch._dynamo", "torch._inductor", "sympy"} & new
    print(f"{what}: {len(new) // 100} hundred modules,", *sorted(compiler) or ["no compiler"])
    return seconds


of_torch = report("import torch", start, set())
parameters, before = [torch.nn.Parameter(torch.zeros(3))], set(sys.modules)
start = time.process_time()
Mine(parameters)
of_first = report("the first optimizer", start, before)
start = time.process_time()
torch.optim.Adam(parameters)
of_second = time.process_time() - start
print("over half the time of the import:", of_first > of_torch / 2)
print("over 100 times that of the second optimizer:", of_first > 100 * of_second)
PYTHON
diff "$folder/seen" - <<'END'
import torch: 11 hundred modules, no compiler
the first optimizer: 8 hundred modules, sympy torch._dynamo torch._inductor
over half the time of the import: True
over 100 times that of the second optimizer: True
END
echo "as stated"

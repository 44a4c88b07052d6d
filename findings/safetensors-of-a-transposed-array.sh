#!/usr/bin/env bash
# safetensors 0.8.0: a transposed or strided numpy array is saved as another one, with no warning.
#
# save and save_file of safetensors.numpy used to ask numpy for an array's bytes, and so got them in
# order. Since 0.8.0 they write what lies in memory from the array's first number on, under the
# array's shape. Frames with their channels moved to the front, or every second frame, come back
# with the right shape, type and range, and wrong. It need not be a view: astype and np.copy keep
# the order in memory, so that new arrays made of a transposed one are concerned as well. Arrays
# "need to be contiguous", says the docstring, as it did in 0.7.0, which saved all rightly; and
# safetensors.torch raises an error. np.ascontiguousarray before saving is enough.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
cat > "$folder/save.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

frames = np.random.default_rng(0).integers(256, size=(8, 84, 84, 3), dtype=np.uint8)
channels_first = np.moveaxis(frames, 3, 1)
arrays = {
    "frames": frames,
    "channels first": channels_first,
    "channels first, as float32": channels_first.astype(np.float32),
    "every second frame": frames[::2],
    "channels first, made contiguous": np.ascontiguousarray(channels_first),
}
save_file(arrays, sys.argv[1])
for name, array in arrays.items():
    loaded = load_file(sys.argv[1])[name]
    assert loaded.shape == array.shape and loaded.dtype == array.dtype
    equal = "equal" if np.array_equal(loaded, array) else "not equal"
    print(f"{safetensors.__version__}, {name}: {equal}")
PYTHON
for version in 0.7.0 0.8.0; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==$version
    "$folder/venv/bin/python" "$folder/save.py" "$folder/arrays.safetensors"
done > "$folder/seen"
diff "$folder/seen" - <<'END'
0.7.0, frames: equal
0.7.0, channels first: equal
0.7.0, channels first, as float32: equal
0.7.0, every second frame: equal
0.7.0, channels first, made contiguous: equal
0.8.0, frames: equal
0.8.0, channels first: not equal
0.8.0, channels first, as float32: not equal
0.8.0, every second frame: not equal
0.8.0, channels first, made contiguous: equal
END
echo "as stated"

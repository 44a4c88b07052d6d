#!/usr/bin/env bash
# rliable 1.2.0 with arch 7.2.0 and pandas 3.1.1 passes `pip check` and cannot be imported.
#
# Papers of Atari 100k state interquartile means and their intervals by rliable. It asks for pandas
# 1.0 or newer and for arch below 8; the last such, 7.2.0, asks for pandas 1.4 or newer; so pandas 3
# is what `pip install rliable` brings. But arch decorates with deprecate_kwarg, of pandas' private
# module pandas.util._decorators, and in pandas 3 its first argument is another one. The import ends
# in a TypeError that names none of the three packages. pandas below 3 is all that it takes.
#
# Seen with Python 3.11 on Linux. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install rliable==1.2.0 arch==7.2.0 pandas==3.1.1 numpy==2.4.6 scipy==1.17.1
cat > "$folder/median.py" <<'PYTHON'
import numpy as np
from rliable import library, metrics

scores = {"agent": np.arange(10.0).reshape(5, 2)}  # of 5 seeds in 2 games
points, intervals = library.get_interval_estimates(
    scores, lambda x: np.array([metrics.aggregate_median(x)]), reps=50)
print("median", points["agent"][0], "and an interval of", len(intervals["agent"]), "ends")
PYTHON
for pandas in 3.1.1 2.3.3; do
    "${pip[@]}" install pandas==$pandas
    "${pip[@]}" check > "$folder/check" && echo "pip check finds nothing with pandas $pandas"
    ("$folder/venv/bin/python" "$folder/median.py" 2>&1 || true) | tail -n 1
done > "$folder/seen"
diff "$folder/seen" - <<'END'
pip check finds nothing with pandas 3.1.1
TypeError: deprecate_kwarg() missing 1 required positional argument: 'new_arg_name'
pip check finds nothing with pandas 2.3.3
median 4.5 and an interval of 2 ends
END
echo "as stated"

#!/usr/bin/env bash
# ale-py 0.12.1: Frostbite does not end when its player freezes on the last life.
#
# A player who stands still loses three lives, and freezes on the fourth. Then the count of lives
# jumps from 1 back to 4, and the console plays its demo, in which nothing is earned or lost
# whatever is pressed: an episode lasts until the cap of 108,000 frames instead of 14,578. Lives
# that rise by two or more are the sign of it. Reported in 2019 (openai/gym, issue 1539).
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import random

from ale_py import Action, ALEInterface, LoggerMode, roms

ALEInterface.setLoggerMode(LoggerMode.Error)
ale = ALEInterface()
ale.setFloat("repeat_action_probability", 0.0)
ale.loadROM(roms.get_rom_path("frostbite"))
ale.reset_game()
keys, draw, lives, earned = ale.getMinimalActionSet(), random.Random(0), [ale.lives()], 0
for frame in range(1, 108_001):
    frozen = len(lives) == 5
    earned += ale.act(draw.choice(keys) if frozen else Action.NOOP)
    if ale.lives() != lives[-1]:
        lives.append(ale.lives())
        print(f"frame {frame}: {lives[-1]} lives")
print(f"frame {frame}: earned {earned}, game over {ale.game_over()}")
PYTHON
diff "$folder/seen" - <<'END'
frame 3137: 3 lives
frame 6273: 2 lives
frame 9409: 1 lives
frame 14578: 4 lives
frame 108000: earned 0, game over False
END
echo "as stated"

#!/usr/bin/env bash
# ale-py 0.12.1: whoever plays too well is fined the whole score, in most games, but not in all.
#
# A console's score has a few digits, and goes on from 0 after the last number. The reward is the
# difference of two scores. In Space Invaders (after 9,999) and Asteroids (after 99,990) ale-py
# knows of it, and the reward stays small; in others the step that scores brings minus everything
# earned so far: the episode's return is about 0, and a clipped reward is -1 where it should be 1.
# In Wizard of Wor that comes at 200,000 and not at 1,000,000. Here most of the score is written
# into the console's memory, in its own digits, and then earned on by random play.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import random

from ale_py import ALEInterface, LoggerMode, roms

ALEInterface.setLoggerMode(LoggerMode.Error)
DIGITS = {  # the bytes of a score, two digits each, as a long game fills them
    "space_invaders": {0xE6: 0x99, 0xE8: 0x99}, "asteroids": {0xBD: 0x99, 0xBE: 0x99},
    "asterix": {0xDE: 0x99, 0xDF: 0x99, 0xE0: 0x99},
    "phoenix": {0xC9: 0x99, 0xC8: 0x99}, "qbert": {0xD9: 0x99, 0xDA: 0x99, 0xDB: 0x99},
    "time_pilot": {0x8F: 0x99, 0x8D: 0x99}, "video_pinball": {0xB4: 0x99, 0xB2: 0x99},
    "wizard_of_wor": {0x88: 0x19, 0x86: 0x99}}
for game, digits in DIGITS.items():
    ale, draw = ALEInterface(), random.Random(0)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    keys = ale.getMinimalActionSet()
    earned = sum(ale.act(draw.choice(keys)) for _ in range(400))
    for place, two in digits.items():
        ale.setRAM(place - 0x80, two)
    key, rewards = draw.choice(keys), []
    earned += ale.act(key)
    full = earned
    for frame in range(1, 6000):
        key = key if frame % 4 else draw.choice(keys)
        reward = ale.act(key)
        earned += reward
        if reward:
            rewards.append(reward)
        if reward < 0 or len(rewards) == 3:
            break
    print(f"{game}: at {full:,} the rewards", *rewards, f"make {earned:,}")
PYTHON
diff "$folder/seen" - <<'END'
space_invaders: at 9,999 the rewards 5 5 10 make 10,019
asteroids: at 99,990 the rewards 50 50 100 make 100,190
asterix: at 999,999 the rewards -999950 make 49
phoenix: at 999,900 the rewards 20 20 -999920 make 20
qbert: at 999,999 the rewards -999975 make 24
time_pilot: at 999,900 the rewards -999900 make 0
video_pinball: at 999,900 the rewards -999900 make 0
wizard_of_wor: at 199,900 the rewards -199900 make 0
END
echo "as stated"

#!/usr/bin/env bash
# ale-py 0.12.1: Pong has six actions, not three. FIRE sends the ball off twice as fast.
#
# NOOP and FIRE, RIGHT and RIGHTFIRE, LEFT and LEFTFIRE are mostly one, and many agents are given
# three actions only. They differ while the ball touches the player's paddle, in about one state
# of a hundred of random play: with the button down it then flies back at twice the speed.
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
ale.loadROM(roms.get_rom_path("pong"))
ale.reset_game()


def flight(key):
    """Where the ball is, from left to right, at every fourth frame after this key."""
    ale.restoreState(here)
    places = []
    for action in (key, *[Action.NOOP] * 4):
        for _ in range(4):
            ale.act(action)
        places.append(int(ale.getRAM()[49]))
    return places


draw = random.Random(0)
for step in range(600):
    here = ale.cloneState(include_rng=True)
    flights = {key: flight(key) for key in (Action.NOOP, Action.FIRE)}
    ale.restoreState(here)
    if flights[Action.NOOP] != flights[Action.FIRE]:
        for key, places in flights.items():
            print(f"step {step}, {key.name}: {places}")
    key = draw.choice(ale.getMinimalActionSet())
    for _ in range(4):
        ale.act(key)
PYTHON
diff "$folder/seen" - <<'END'
step 304, NOOP: [186, 182, 178, 174, 170]
step 304, FIRE: [184, 176, 168, 160, 152]
step 568, NOOP: [185, 181, 177, 173, 169]
step 568, FIRE: [182, 174, 166, 158, 150]
END
echo "as stated"

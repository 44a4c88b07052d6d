"""A copy of a run that goes on under other settings: what do they change from there on?

    python -m tools.branch runs/Krull-s0 runs/Krull-calm --entropy 1e-3 --cooldown 0.2
    python drama.py --run runs/Krull-calm

The copy has all of the newest save: networks, replay, tables, the episode under way. With no other
setting it goes on bit for bit like the run itself; with --seed alone it has other luck, and begins
with a new episode. Its file branch.json tells where it comes from.
"""

import argparse
import contextlib
import functools
import sys
from dataclasses import fields, replace
from pathlib import Path

import drama  # first: it sets up torch
import torch
from buffer import Folder, Mistake, command_line, versions, write_file, write_json

# What the weights, the optimisers' memories and the replay of a run were made for
FIXED = ("preset", "game", "game_args", "action_repeat", "channels", "strides", "kernel", "groups",
         "classes", "backbone", "layers", "d_model", "d_state", "head_dim", "head_hidden",
         "harmony", "local", "actor_hidden", "critic_hidden", "agent_layers", "optimizer")


def branch(source: Path, target: Path, flags: dict) -> dict:
    """Copy the newest save of a run, with these settings changed -> what branch.json holds."""
    manifest, state, files = Folder(source).load()
    before = drama.settings_of(manifest)
    if flags.get("precision") == "auto":  # what auto means was settled when the run began
        del flags["precision"]
    drama.check(s := drama.without_effect(replace(before, **flags), flags))
    changed = {f.name: [getattr(before, f.name), getattr(s, f.name)] for f in fields(s)
               if getattr(before, f.name) != getattr(s, f.name)}
    for name in changed:
        if name in FIXED:
            raise Mistake(f"a branch keeps {drama.as_flag(name, changed[name][0])} of its run: "
                          "leave that out.")
        if name in drama.MAY_CHANGE and name != "steps":
            raise Mistake(f"leave out {drama.flag(name)}: drama.py takes it, when it goes on.")
    if target.exists():
        raise Mistake(f"{target} is there already: name a new folder.")
    if s.steps <= state["step"]:
        raise Mistake(f"{source} has {state['step']} steps already: give more --steps.")
    if {"length", "context", "dream_from"} & {*changed}:  # they set the age of a player's memory
        state["player"] = None
    if "seed" in changed:  # it does not lead to where the episode under way is
        state |= dict(score=0.0, episode_length=0, frame=None)
    torch.set_num_threads(manifest["threads"])
    run, folder = drama.Run(s, torch.device("cpu")), Folder(target)
    folder.resume(manifest, state, files, run.replay)
    drama.restore(run, state)
    with contextlib.closing(folder):  # from here on the disk is written to
        folder.open_for_writing(new=True)
        for name, content in files.items():
            write_file(target / name, content)
        about = dict(of=str(source), step=run.step, changed=changed, versions=versions())
        write_json(target / "branch.json", about)
        folder.rewrite_tables()
        drama.save(run, folder)
    return about


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.branch", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("new", metavar="NEW", help="folder of the copy")
    parser.add_settings(drama.own_preset())
    flags = parser.parse(argv)
    source, target = Path(flags.pop("run")), Path(flags.pop("new"))
    about = branch(source, target, flags)
    told = [f"{drama.as_flag(name, now)} (was {drama.as_text(before)})"
            for name, (before, now) in about["changed"].items()]
    print(f"{target}: {source} at step {about['step']:,}, {', '.join(told) or 'nothing changed'}\n"
          f"python drama.py --run {target} goes on with it")


main = functools.partial(command_line, run_command, name="tools.branch")

if __name__ == "__main__":
    sys.exit(main())

"""The page: actions, dreams and sessions by their definitions; safe to ask; in a real browser."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import struct
import threading

import numpy as np
import pytest
import torch
from agent import Start
from test_check import refused
from test_drama import FakeGame, close, contents, fake, finished, pixels, png_chunks
from test_drama import run_folder, table

import buffer
import drama
from buffer import Mistake
from tools import page


@pytest.fixture(autouse=True)
def same_threads():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def agent(run_folder):
    """Of the tiny run, in FakeGame, whose reward is the action taken; by name it is Breakout."""
    return page.Agent(run_folder, "cpu")


# ---------------------------------------------------------------- actions by their meaning

BREAKOUT = ["NOOP", "FIRE", "RIGHT", "LEFT"]
KUNG_FU = ["NOOP", "UP", "RIGHT", "LEFT", "DOWN", "DOWNRIGHT", "DOWNLEFT", "RIGHTFIRE", "LEFTFIRE",
           "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE"]  # fmt: skip
MINIGRID = ["left", "right", "forward", "pickup", "drop", "toggle", "done"]


@pytest.mark.parametrize("names, keys, wanted", [
    (BREAKOUT, "", "NOOP"), (BREAKOUT, "LEFT", "LEFT"), (BREAKOUT, "FIRE", "FIRE"),
    (BREAKOUT, "LEFT RIGHT", "NOOP"), (BREAKOUT, "UP", "NOOP"), (BREAKOUT, "UP LEFT", "LEFT"),
    (KUNG_FU, "UP", "UP"), (KUNG_FU, "DOWN LEFT", "DOWNLEFT"), (KUNG_FU, "UP DOWN LEFT", "LEFT"),
    (KUNG_FU, "UP RIGHT FIRE", "UPRIGHTFIRE"), (KUNG_FU, "FIRE", "RIGHTFIRE"),
    (KUNG_FU, "9", "DOWNFIRE"), (MINIGRID, "", None), (MINIGRID, "UP", "forward"),
    (MINIGRID, "LEFT", "left"), (MINIGRID, "FIRE", None), (MINIGRID, "3 LEFT", "pickup"),
    (MINIGRID, "7", None), (["0", "1"], "LEFT", "0"), (["0", "1"], "RIGHT", "1"),
    (["0", "1"], "UP", None), (["0", "1"], "", None)])  # fmt: skip
def test_keys_are_the_action_that_means_most_of_them(names, keys, wanted):
    action = page.action_of(keys.split(), names)
    assert (None if action is None else names[action]) == wanted


def test_actions_have_the_names_that_the_game_gives_them():
    assert page.action_names(drama.Settings(game="Breakout"), 4) == BREAKOUT  # ale-py's own
    assert page.action_names(drama.Settings(game="KungFuMaster"), 14) == KUNG_FU
    assert page.action_names(drama.Settings(game="Dot"), 2) == ["0", "1"]


# ---------------------------------------------------------------- minds and sessions


def seen(here):
    return np.array(here.world.frame[0])


def test_a_mind_remembers_what_a_scan_of_its_steps_holds(agent):
    here, steps = page.Session(agent, "film"), []
    for _ in range(3):  # the age of `finished`, 8, is not reached
        steps.append((here.real.z, here.world.recorded, here.world.first))
        here.step(None)
    z, action, first = zip(*steps)
    model = agent.player.model
    with torch.no_grad():
        token = model.token(torch.stack(z, 1), torch.tensor([action]))
        d, _ = model.sequence(token, reset=torch.tensor([first]))
        close(here.real.d_past, d[:, -1])
        reward = model.two_hot.mean(model.reward_head(d[:, -1]))
        assert here.real.reward == pytest.approx(float(reward), abs=1e-6)


def test_a_dream_is_that_of_the_world_model(agent, monkeypatch):
    """Step by step it is WorldModel.imagine with the same random numbers."""
    here = page.Session(agent, "film")
    here.begin(4)
    z, d_past = here.real.z.clone(), here.real.d_past.clone()
    start = Start(z, d_past, here.real.state, here.real.first)
    actions = [(int(agent.moments["action"][4]) + 1) % 4, 2, 1]  # the first is not the film's
    monkeypatch.setattr(drama, "reseed", lambda *_: None)
    torch.manual_seed(5)
    dream = agent.player.model.imagine(start, 3, lambda t, z, d: torch.tensor([actions[t]]))
    torch.manual_seed(5)
    here.leave()
    frame, alive = seen(here), 1.0
    for t, action in enumerate(actions):
        here.step(action)
        moment = here.moment()
        assert torch.equal(here.dream.z, dream.z[t + 1])
        alive *= 1 - float(dream.end[t])
        assert moment["reward"] == pytest.approx(float(dream.reward[t]), abs=1e-6)
        assert moment["end"] == pytest.approx(float(dream.end[t])) and moment["alone"] == t + 1
        assert moment["alive"] == pytest.approx(alive) and moment["parted"]
        assert moment["earned"] is None and np.array_equal(seen(here), frame)
        with torch.no_grad():
            picture = 255 * agent.player.model.decode(dream.z[t + 1])[0].permute(1, 2, 0)
            value = agent.player.agent.value(dream.z[t + 1], dream.d_past[t + 1])
        told = np.frombuffer(base64.b64decode(moment["pictures"]["dream"]), np.uint8)
        assert np.abs(told.reshape(64, 64, 3) - picture.numpy()).max() <= 0.5 + 1e-3
        assert moment["value"] == pytest.approx(float(value), abs=1e-5)
        assert sum(moment["policy"]) == pytest.approx(1)
    here.dream = None
    assert torch.equal(here.real.z, z) and torch.equal(here.real.d_past, d_past)


def test_the_game_goes_on_beside_the_dream_with_the_same_actions(agent):
    here, beside = page.Session(agent, "game"), FakeGame()
    frame = beside.reset(drama.episode_seeds(0, page.EPISODE, "test"))
    assert np.array_equal(seen(here), frame[0])
    scores = []
    for step, action in enumerate([2, 3, 1, 2, 2, 1, 3]):
        if step == 2:
            here.leave()
        here.step(action)
        scores.append(action)
        frame, _, _, done = beside.step([action])
        moment = here.moment()
        assert np.array_equal(seen(here), frame[0]) and not done[0] and not moment["parted"]
        assert moment["earned"] == action and moment["score"] == sum(scores)
        assert moment["alone"] == (step - 1 if step >= 2 else None)
    while not done[0]:  # until the game is over: the dream goes on alone
        here.step(3)
        scores.append(3)
        *_, done = beside.step([3])
    last = seen(here)
    here.step(0)
    assert here.moment()["parted"] and here.last_score == sum(scores) and here.score == 0
    assert np.array_equal(seen(here), last) and here.alone == len(scores) - 2 + 1
    here.dream = None
    here.step(1)  # in the next episode
    (seed,) = drama.episode_seeds(0, page.EPISODE + 1, "test")
    assert here.score == 1 and seen(here)[0, 0, 0] == seed % 251


def test_the_agent_acts_by_its_policy(agent):
    here = page.Session(agent, "game")
    for mind in (here.real, None):
        if mind is None:
            here.leave()
        (here.dream or here.real).policy = torch.tensor([0.0, 0.0, 1.0, 0.0])
        here.step(None)
        assert here.taken == 2 and here.earned == 2


def test_the_policy_that_is_shown_is_the_one_that_plays(agent, monkeypatch):
    mind = page.Session(agent, "game").real
    odds = torch.tensor([[0.6, 0.4, 1e-30, 1e-30]])
    monkeypatch.setattr(mind.agent.actor, "forward", lambda features: odds.log())
    with torch.no_grad():
        mind.see(mind.z, False)
    assert (agent.s.temperature, agent.s.policy_unimix) == (0.5, 0.01)  # 3 to 2 are 9 to 4
    assert mind.policy.tolist() == pytest.approx(
        [0.995 * 9 / 13 + 0.00125, 0.995 * 4 / 13 + 0.00125, 0.00125, 0.00125])


def test_a_film_is_entered_at_any_step_with_what_led_there(agent):
    columns = agent.moments
    opened = np.flatnonzero(columns["first"])
    within = int(opened[1]) + 5
    here = page.Session(agent, "film")
    here.begin(within)
    assert here.world.at == within and np.array_equal(seen(here), columns["frame"][within])
    known = [int(action) for _, action, _ in here.real.history]
    assert known == columns["action"][within - agent.player.half : within].tolist()
    assert 0 < len(known) <= 5 and here.score == 0
    here.begin(int(opened[1]))  # where nothing led
    assert json.loads(page.as_json(here.moment())[1])["at"] == opened[1]
    here.begin(len(columns["action"]) - 1)
    here.step((int(columns["action"][-1]) + 1) % 4)
    assert here.taken == columns["action"][-1]  # the film's, not the key's
    assert here.world.at == 0 and here.world.first and here.earned == columns["reward"][-1]


def test_a_film_goes_on_beside_a_dream_that_does_the_same_and_no_further(agent):
    here = page.Session(agent, "film")
    here.leave()
    for at in range(2):
        here.step(int(agent.moments["action"][at]))
        assert here.world.at == at + 1 and not here.parted
    here.step((int(agent.moments["action"][2]) + 1) % 4)
    assert here.world.at == 2 and here.parted
    here.step(int(agent.moments["action"][2]))
    assert here.world.at == 2 and here.alone == 4


def test_without_its_game_a_run_is_dreamt_from_its_film(run_folder, fake):
    def missing(*_, **__):
        raise Mistake("it cannot be made")

    fake.setattr(drama, "make_game", missing)
    agent = page.Agent(run_folder, "cpu")
    assert agent.worlds == ["film"] and agent.no_game == "it cannot be made"
    session = page.Session(agent, "film")
    session.leave()
    session.step(None)
    assert session.alone == 1


def asked(page_, **wish):
    return json.loads(page_.post("/dream", wish)[1])


def test_windows_do_not_disturb_each_other(run_folder):
    def scenes(wishes):
        """Wishes of windows 0 and 1 -> what each was answered."""
        here, shown = page.Page([run_folder], "cpu"), ([], [])
        names = [asked(here, do="open")["session"] for _ in shown]
        for window, wish in wishes:
            shown[window].append(asked(here, session=names[window], **wish))
        return shown

    step, leave, press = dict(do="step"), dict(do="leave"), dict(do="step", keys=["RIGHT"])
    one, two = [step, leave, step, step], [press, press, leave, press]
    together = scenes([pair for wishes in zip(one, two) for pair in enumerate(wishes)])
    assert together == scenes([(0, wish) for wish in one] + [(1, wish) for wish in two])
    assert together[0][-1]["alone"] == 2 and together[1][-1]["action"] == 2


def test_the_session_longest_unused_gives_way(run_folder):
    here = page.Page([run_folder], "cpu")
    names = [asked(here, do="open")["session"] for _ in range(page.WINDOWS)]
    asked(here, do="step", session=names[0])
    names.append(asked(here, do="open")["session"])
    assert len(set(names)) == page.WINDOWS + 1 and len(here.sessions) == page.WINDOWS
    with pytest.raises(page.Refused, match="reload it"):
        asked(here, do="step", session=names[1])
    assert asked(here, do="step", session=names[0])["at"] == page.EPISODE
    asked(here, do="open", session=names[0])  # the same window begins anew, and costs no other
    assert names[0] not in here.sessions and names[2] in here.sessions


def test_who_has_no_action_that_does_nothing_waits_for_a_key(run_folder, monkeypatch):
    monkeypatch.setattr(page, "action_names", lambda *_: ["0", "1", "2", "3"])
    here = page.Page([run_folder], "cpu")
    opened = asked(here, do="open")
    name = opened["session"]
    assert not opened["idle"] and asked(here, do="step", session=name, keys=[])["action"] is None
    assert asked(here, do="step", session=name, keys=["UP"])["action"] == 2


# ---------------------------------------------------------------- a run, from its files


@pytest.fixture
def growing(tmp_path):
    """A run of KungFuMaster, 400 of 1,000 steps old, that is writing a row."""
    folder = tmp_path / "growing"
    folder.mkdir()
    settings = dict(game="KungFuMaster", preset="laptop", steps=1000, seed=4)
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "episodes.csv").write_text("step,score,length\n100,5,9\n300,7.5,9\n40")
    (folder / "metrics.csv").write_text(
        "step,kl,steps_per_second\n200,,\n300,nan,2\n400,6.5,4\n500,1")
    (folder / "evaluation-000300.json").write_text('{"step": 300, "scores": [1, 2]}')
    for step in (100, 300, 200):
        (folder / f"dream-{step:06d}.png").write_bytes(b"png of %d" % step)
    return folder


def test_progress_is_what_the_files_say_and_they_stay_as_they_are(growing):
    before = contents(growing)
    told = page.progress(growing, "kl")
    assert told["scores"] == [[100, 5], [300, 7.5]] and told["tests"] == [[300, 1.5]]
    assert told["column"] == [[400, 6.5]] and told["columns"] == ["kl", "steps_per_second"]
    assert (told["step"], told["steps"], told["left"]) == (400, 1000, 150)  # 600 at 4 a second
    assert told["picture"] == "dream-000300.png" and 0 <= told["silent"] < 600
    os.utime(growing / "metrics.csv", (0, 0))
    assert page.progress(growing, "kl")["silent"] > 1e9
    (growing / "save-000400.json").write_text("{}")  # between two rows, as in `paper` on a CPU
    assert page.progress(growing, "kl")["silent"] < 600
    (growing / "save-000400.json").unlink()
    assert told["known"]["human"] == 22736.3 and told["known"]["Drama_XS_DFS"] == 23920
    assert page.progress(growing, "../../secret")["column"] == [] and contents(growing) == before


def test_a_run_that_has_only_begun_or_is_damaged_is_named_beside_the_others(growing, tmp_path):
    young, broken = tmp_path / "young", tmp_path / "broken"
    for folder, text in (
            (young, '{"game": "Dot", "preset": "best", "steps": 9, "seed": 0}'), (broken, "{")):
        folder.mkdir()
        (folder / "settings.json").write_text(text)
    here = page.Page([broken, tmp_path / "file.pt", young, growing], "cpu")
    first, second, third = json.loads(here.get("/progress", {"column": "kl"})[1])
    assert first["name"] == "broken" and "settings.json is damaged" in first["error"]
    assert (second["step"], second["left"], second["scores"]) == (0, None, [])
    assert third["name"] == "growing" and third["step"] == 400
    (young / "episodes.csv").write_text("step,score\n1,nan\n2,7\n3,inf\n")
    _, second, _ = json.loads(here.get("/progress", {"column": "kl"})[1])
    assert second["scores"] == [[2, 7]]
    assert here.get("/picture", {"run": "2"}) == ("image/png", b"png of 300")  # the third folder
    for number in ("0", "1", "3", "-1", "x", ""):  # the first two have none
        with pytest.raises(page.Refused):
            here.get("/picture", {"run": number})


# ---------------------------------------------------------------- what may be asked, and by whom


@pytest.fixture
def port(run_folder, tmp_path):
    """Of a page that is served, for a run and its exported agent, which scored 4 ± 1."""
    (run_folder / "evaluation-000064.json").write_text('{"step": 64, "scores": [3, 5]}')
    buffer.export(run_folder, tmp_path / "exported.pt")
    with page.Server(("127.0.0.1", 0), page.Handler) as server:
        server.page = page.Page([run_folder, tmp_path / "exported.pt"], "cpu")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()
        server.page.close()


def request(port, method="GET", path="/about", body=None, **headers):
    """-> code, headers, content."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def wish(port, **words):
    code, _, content = request(port, "POST", "/dream", json.dumps(words))
    return code, json.loads(content)


def test_only_this_machine_may_ask_and_only_by_a_local_name(port):
    for host, code in (("127.0.0.1", 200), ("localhost:8000", 200), (f"127.0.0.1:{port}", 200),
                       ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
                       ("localhost.evil.example:8000", 403), ("evil.example:127.0.0.1", 403)):
        assert request(port, Host=host)[0] == code, host
    for origin, code in ((f"http://127.0.0.1:{port}", 200), ("http://evil.example", 403),
                         ("null", 403), ("http://127.0.0.1:1", 403)):
        assert request(port, "POST", "/dream", '{"do": "open"}', Origin=origin)[0] == code, origin
    assert request(port, Host="evil.example")[1]["Connection"] == "close"
    with socket.socket() as other:  # of this machine, but not its loopback address
        other.settimeout(5)
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            with pytest.raises(OSError):
                other.connect((address, port))


def test_nothing_but_the_page_is_served_and_it_loads_nothing_from_elsewhere(port):
    code, headers, html = request(port, path="/?x=1")
    assert code == 200 and b"<title>Drama</title>" in html
    assert b"//" not in html.replace(b"// ", b"")  # comments
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    for path in ("/page.html", "/page.py", "/../drama.py", "/%2e%2e/drama.py", "//etc/passwd",
                 "/etc/passwd", "/picture?run=9", "/picture?run=../..", "/picture?run=" + "1" * 900,
                 "/dream", "*", "http://127.0.0.1/", "localhost"):
        assert request(port, path=path)[0] == 404, path


@pytest.mark.parametrize("body, code", [
    ("", 400), ("{", 400), ("[]", 400), ("{}", 400), ('"open"', 400), ('{"do": "fly"}', 410),
    ('{"do": 1}', 400), ('{"do": "open", "run": 2}', 400), ('{"do": "open", "run": -1}', 400),
    ('{"do": "open", "run": "0"}', 400), ('{"do": "open", "world": "moon"}', 400),
    ('{"do": "open", "self": 1}', 400), ('{"do": "step", "session": "none"}', 410),
    ('{"do": "step", "keys": "LEFT"}', 400), ('{"do": "open", "return": {}}', 400),
    ("9" * (page.LONGEST + 1), 413), ("9" * 9000, 400), ("[" * 9000, 400),
    ('{"do": "open", "at": 1e999}', 400)])  # fmt: skip
def test_a_wrong_wish_is_answered_in_a_sentence_and_ends_nothing(body, code, port, capfd):
    got, _, content = request(port, "POST", "/dream", body)
    assert got == code and set(json.loads(content)) == {"error"}
    assert request(port)[0] == 200 and not capfd.readouterr().err


def test_broken_connections_end_nothing(port, capfd):
    for data in (b"", b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\n", b"POST /dream HTTP/1.1\r\nHost: "
                 b"localhost\r\nContent-Length: 500\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    code, opened = wish(port, do="open")
    for keys in (["FLY"], ["9"], ["9" * 9000], [1.5, None, {}], ["LEFT"] * 50):
        assert wish(port, do="step", session=opened["session"], keys=keys)[0] == 200
    assert wish(port, do="begin", session=opened["session"], at=10**9)[0] == 200
    assert wish(port, do="fly", session=opened["session"])[0] == 400
    assert "Traceback" not in capfd.readouterr().err


def test_a_fault_of_ours_is_told_and_ends_nothing(port, monkeypatch, capfd):
    monkeypatch.setattr(page.Page, "open", lambda *_: 1 / 0)
    code, answer = wish(port, do="open")
    assert code == 500 and "ZeroDivisionError" in answer["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err and request(port)[0] == 200


# ---------------------------------------------------------------- the command line


def test_bad_flags_are_refused(run_folder, tmp_path, port, capsys):
    (tmp_path / "notes.pt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for argv, says in (([tmp_path / "none"], "there is no folder"), ([], "RUN"),
                       ([run_folder, tmp_path / "notes.pt"], "notes.pt is no agent that --export"),
                       ([run_folder, tmp_path / "empty"], "empty holds no run"),
                       ([run_folder, "--port", port], f"port {port} cannot be had"),
                       ([run_folder, "--port", "70000"], "--port must be from 0"),
                       ([run_folder, "--port", "x"], "x is not a whole number"),
                       ([run_folder, "--seed", "1"], "--seed"),
                       ([run_folder, run_folder, "--film", "a.png"], "--film takes one RUN"),
                       ([run_folder, "--film", "a.png", "--port", "9"], "leave out --port 9"),
                       ([run_folder, "--film", "a.png", "--no-browser"], "leave out --no-browser"),
                       ([run_folder, "--threads", "-1"], "--threads")):
        refused(capsys, page.main, argv, says)


def test_it_says_where_it_is_opens_a_browser_and_ends_at_ctrl_c(run_folder, monkeypatch, capsys):
    opened = threading.Event()
    monkeypatch.setattr(page.webbrowser, "open", lambda address: opened.set())
    asked = []

    def interrupted(server):
        asked.append((server.server_address, opened.wait(5 * (len(asked) == 0))))
        raise KeyboardInterrupt

    monkeypatch.setattr(page.Server, "serve_forever", interrupted)
    assert page.main([str(run_folder), "--port", "0"]) == 0
    out = capsys.readouterr().out
    opened.clear()
    assert page.main([str(run_folder), "--port", "0", "--no-browser"]) == 0
    ((host, number), first), (_, second) = asked
    assert host == "127.0.0.1" and f"http://127.0.0.1:{number}/" in out and first and not second


def test_the_film_shows_game_and_dream_in_turn(run_folder, tmp_path, monkeypatch, capsys):
    for name, steps in dict(UNSEEN=2, PLAYED=2, DREAMT=3, TIMES=2).items():
        monkeypatch.setattr(page, name, steps)
    path = tmp_path / "new" / "film.png"
    assert page.main([str(run_folder), "--film", str(path)]) == 0
    chunks = list(png_chunks(path))
    assert struct.unpack(">2I", chunks[0][1][:8]) == (4 * 136, 4 * 68)
    frames = [data[4 * (kind == "fdAT") :] for kind, data in chunks if kind in ("IDAT", "fdAT")]
    pictures = [pixels(data, 4 * 68, 4 * 136)[::4, ::4] for data in frames]
    framed = [tuple(picture[1, 100]) == (248, 0, 0) for picture in pictures]
    assert framed == 2 * [False, False, True, True, True]
    times = [int(picture[3, 3, 1]) for picture in pictures]  # FakeGame: ten times the step
    length = FakeGame.episode_length(drama.episode_seeds(0, page.EPISODE, "test")[0])
    assert times[:5] == [10 * step & 0xF8 for step in range(3, 8)] and length > 8


# ---------------------------------------------------------------- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def window(port, run_folder):
    """() -> a new window that shows the page: Debian's Chromium, driven by playwright. What it
    complains of, or asks of others, is a failure."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    address, wrong = f"http://127.0.0.1:{port}/", []

    def asked_for(request):
        if not request.url.startswith((address, "data:")):
            wrong.append(request.url)

    with playwright.sync_playwright() as tool:
        flags = ["--no-sandbox"] * (hasattr(os, "getuid") and os.getuid() == 0)
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=flags)

        def open_one(view="", **options):
            window = browser.new_context(**options).new_page()
            window.set_default_timeout(120_000)  # machines may be busy
            window.on("console", lambda message: message.type == "error" and wrong.append(message))
            window.on("pageerror", lambda error: wrong.append(str(error)))
            window.on("request", asked_for)
            window.goto(address + view)
            window.wait_for_selector("#numbers dd", state="attached")
            return window

        open_one.wrong = wrong
        yield open_one
        browser.close()
    assert not wrong


def pixel(window, name, x, y):
    """Red, green, blue on a canvas."""
    return window.evaluate(f"""() => Array.from(document.getElementById("{name}-picture")
        .getContext("2d").getImageData({x}, {y}, 1, 1).data.slice(0, 3))""")


def canvases(window):
    return [window.evaluate(f"() => document.getElementById('{name}-picture').toDataURL()")
            for name in ("game", "reconstruction", "dream")]


def says(window, name, words):
    window.wait_for_selector(f"#{name}:text('{words}')")


def test_keys_play_leave_dream_and_come_back(window):
    """FakeGame shows how many steps it is old, 10 in green each, and in blue the last action."""
    one = window()
    says(one, "dream-says", "expected")
    one.keyboard.press("p")
    says(one, "pause", "Go on")
    one.keyboard.press("e")
    says(one, "game-says", "score 0")
    (seed,) = [pixel(one, "game", 0, 0)[0]]
    assert pixel(one, "game", 0, 0) == [seed, 0, 0]
    for step, (key, action) in enumerate((("ArrowRight", 2), ("ArrowLeft", 3), (" ", 1)), 1):
        one.keyboard.press(key)
        one.wait_for_selector(f"#policy button:nth-child({action + 1}).taken")
        assert pixel(one, "game", 12 * action + 4, 30) == [seed, 10 * step, 255]
        assert pixel(one, "game", 12 * ((action + 1) % 4) + 4, 30) == [seed, 10 * step, 0]
    says(one, "driver", "Let the agent play")
    says(one, "game-says", "score 6")  # the reward is the action
    for bar in one.locator("#policy button").all():
        share = bar.locator("i").bounding_box()["width"] / bar.bounding_box()["width"]
        assert f"{share:.2f}" != "0.00" and abs(100 * share - float(
            bar.locator("span").nth(1).inner_text().removesuffix(" %"))) < 0.1

    one.keyboard.press("Enter")
    says(one, "dream-says", "alone for 0 steps")
    before = canvases(one)
    for step in (1, 2, 3):
        one.keyboard.press("2")
        says(one, "dream-says", f"alone for {step} steps")
    assert all(a != b for a, b in zip(canvases(one), before))
    assert pixel(one, "game", 28, 30) == [seed, 60, 255]  # it went on beside the dream
    says(one, "dream-name", "Dream")
    says(one, "game-says", "goes on with the same actions")
    one.keyboard.press("Enter")
    says(one, "game-says", "score 12")
    one.keyboard.press("a")
    says(one, "driver", "Play yourself")
    one.keyboard.press("n")
    one.wait_for_selector("#policy .taken")
    one.keyboard.press("p")  # and it goes on by itself, into the next episode
    says(one, "game-says", "the last one")


def test_two_windows_are_two_worlds(window):
    first, second = window(), window(color_scheme="dark", viewport=dict(width=400, height=800))
    for one in (first, second):
        one.keyboard.press("p")
        says(one, "pause", "Go on")
        one.keyboard.press("e")
        says(one, "game-says", "score 0")
    before = canvases(first)
    bar = second.locator("#policy button").nth(3)
    bar.scroll_into_view_if_needed()
    bar.click()  # as on a telephone
    says(second, "game-says", "score 3")
    assert canvases(first) == before
    wide = second.evaluate("() => document.documentElement.scrollWidth")
    assert wide == 400 and first.locator("#policy button").count() == 4


def test_a_film_is_entered_where_its_slider_stands(window, run_folder):
    one = window()
    one.keyboard.press("p")
    one.select_option("#agent", label="exported")
    says(one, "about", "Breakout, 64 steps, seed 0, score 4 ± 1 in 2 episodes")
    one.select_option("#world", "film")
    says(one, "game-says", "of 64, as filmed")
    one.keyboard.press("p")
    says(one, "pause", "Go on")
    one.locator("#at").fill("20")
    says(one, "game-says", "step 21 of 64")
    frame = np.load(run_folder / "replay-001.npz")["frame"][4]  # 16 steps a file
    assert pixel(one, "game", 0, 0) == frame[0, 0].tolist()
    asked = []
    one.on("request", lambda request: asked.append(request.post_data_json["do"]))
    one.evaluate("""() => {
        for (let at = 0; at < 40; at++) { $("at").value = at; $("at").oninput(); }
    }""")
    says(one, "game-says", "step 40 of 64")
    assert asked == ["begin", "begin"]  # the first, and the newest once that is there


def test_a_run_is_drawn_and_redrawn(window, run_folder):
    one, marks = window("#run"), len(table(run_folder, "episodes")) + 1  # and an evaluation
    one.wait_for_selector("#scores svg circle")
    one.wait_for_selector("#runs :text('64 of 64 steps, finished')")
    assert one.locator("#scores svg :text('human')").count() == 1
    assert one.locator("#scores circle").count() == marks
    one.select_option("#column", "kl")
    one.wait_for_selector("#run > .chart svg path[stroke-linejoin]")
    picture = one.locator("#runs img")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 2 * 16 * 66
    with open(run_folder / "episodes.csv", "a") as file:
        file.write("70,12,6,\n")
    one.wait_for_selector(f"#scores circle >> nth={marks}")  # by itself


def test_an_error_is_a_sentence_on_the_page(window, monkeypatch):
    def late(*_):
        raise Mistake("it is late")

    one = window()
    one.keyboard.press("p")
    says(one, "pause", "Go on")
    monkeypatch.setattr(page.Session, "step", late)
    one.keyboard.press("n")
    says(one, "problem", "it is late")
    monkeypatch.undo()
    one.keyboard.press("n")
    one.wait_for_selector("#problem", state="hidden")
    assert one.locator("#stage").is_visible()
    monkeypatch.setattr(page.Page, "open", late)
    one.select_option("#agent", label="exported")
    says(one, "problem", "it is late")
    one.keyboard.press("n")
    assert not one.locator("#stage").is_visible()  # nor what was open before
    monkeypatch.undo()
    one.select_option("#agent", index=0)
    one.wait_for_selector("#stage")
    assert [("400" in window.wrong.pop().text) for _ in range(2)] == [True, True]

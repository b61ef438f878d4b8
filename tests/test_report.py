"""What is proved about report.html:

it is one well-formed file that loads nothing; it says the numbers of the run; what files and names
hold is text on it; odd files never make a run fail; a browser shows it without a complaint.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from engine import page, pictures, report, system

HOSTILE = '<script>alert("1")</script> & \x00\x1b[2J \udcff'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Parses a page: every tag is closed in order; tags, attributes and texts are kept."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not (self.open and self.open[-1] == "style"):
            self.texts.append(data)

    def text(self):
        return " ".join(self.texts)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def write_run(folder, stage="mae", settings=None, log=(), **metrics):
    """What a run leaves, in small: metrics.json, log.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"num_frames": 8, "input_size": 40, "seed": 0} | (settings or {})
    (folder / "metrics.json").write_text(json.dumps({"stage": stage, "settings": settings}
                                                    | metrics))
    if log:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


LOG = [{"step": 0, "val_loss": 1.5, "val_trivial_loss": 0.99},
       {"step": 10, "loss": 1.1, "clips_per_s": 50.0, "data_wait": 0.1, "memory_mib": 700},
       {"step": 20, "loss": 0.9, "clips_per_s": 70.0, "data_wait": 0.1, "memory_mib": 812},
       {"step": 20, "val_loss": 0.75, "val_trivial_loss": 0.99}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of stage 1, with pictures."""
    out = tmp_path_factory.mktemp("run") / "mae"
    flags = "--steps 2 --batch-size 4 --eval-clips 4 --workers 0 --precision fp32 --device cpu"
    assert train.main(["mae", *flags.split(), "--num-frames", "2", "--input-size", "16",
                       "--mask-ratio", "0.5", "--out", str(out)]) == 0
    return out


def test_a_run_ends_with_one_well_formed_page_that_loads_nothing(run):
    content = (run / "report.html").read_text()
    found = read(run / "report.html")
    assert "://" not in content and not re.search(r"@import|url\((?!#)", content)
    for tag, attributes in found.tags:
        assert tag not in ("script", "iframe", "object", "form")
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), attributes[name]
        assert not any(name.startswith("on") for name in attributes)
    images = found.named("img")
    assert len(images) == 4 and all(image["alt"] for image in images)
    moving = base64.b64decode(images[0]["src"].removeprefix("data:image/gif;base64,"))
    assert moving == (run / "reconstruction_0.gif").read_bytes()
    anchors = {attributes.get("id") for _, attributes in found.tags}
    assert all(link["href"][1:] in anchors for link in found.named("a"))


def test_the_page_says_every_number_of_the_run_and_the_words_of_its_clips(run):
    metrics, said = json.loads((run / "metrics.json").read_text()), read(run / "report.html").text()
    for name, value in metrics.items():
        if name not in report.FACTS:
            assert page.short(value) in said, name
    for name, value in metrics["settings"].items():
        assert name.replace("_", "-") in said
    assert page.millions(metrics["parameters"]) in said
    assert f"loss {page.short(metrics['val_loss'])}" in said  # in the box of the system
    assert "held-out clip: " in said and "left to right: input, what the encoder saw" in said


def test_without_figures_there_is_no_page_and_a_second_run_keeps_the_first_ones(run, tmp_path):
    flags = ("--steps 1 --batch-size 2 --eval-clips 2 --workers 0 --num-frames 2 --input-size 16 "
             "--mask-ratio 0.5 --precision fp32 --device cpu").split()
    out = tmp_path / "mae"
    assert train.main(["mae", *flags, "--out", str(out), "--no-figures"]) == 0
    assert (out / "metrics.json").exists() and not (out / "report.html").exists()
    (out / "report.html").write_text("the first")
    assert train.main(["mae", *flags, "--out", str(out)]) == 0
    assert (out / "previous-1" / "report.html").read_text() == "the first"
    assert "<!doctype html>" in (out / "report.html").read_text()


def test_a_folder_with_nothing_but_numbers_gives_a_page_and_so_does_an_empty_one(tmp_path):
    path = report.write(write_run(tmp_path / "a", val_loss=0.625, val_clips=3))
    assert "0.625" in read(path).text()
    (tmp_path / "b").mkdir()
    assert read(report.write(tmp_path / "b")).named("h1")


def test_what_names_and_files_hold_is_text_and_never_part_of_the_page(tmp_path):
    words = HOSTILE.replace("\udcff", "").replace("\x00", "")
    folder = write_run(
        tmp_path / "<b>run", stage=HOSTILE, settings={HOSTILE: HOSTILE, "encoder": HOSTILE},
        protocol={HOSTILE: HOSTILE}, bad_files={HOSTILE: HOSTILE}, val_loss=HOSTILE,
        log=[{"step": 1, "loss": 1.0, "gate_" + words: 0.5, "share_" + words: 0.5}])
    clip = torch.rand(3, 2, 8, 8)
    pictures.moving_picture(clip, folder / "<i>_0.gif", f"{words}\n\"'>{words}")
    (folder / "table.json").write_text(json.dumps(
        {"protocol": HOSTILE, "rows": {HOSTILE: {HOSTILE: 1.5}}}))
    found = read(report.write(folder))
    assert not {"script", "i", "b"} & {tag for tag, _ in found.tags}
    assert found.text().count('<script>alert("1")</script>') >= 8
    assert "\x00" not in found.text() and "\x1b" not in found.text()
    assert '<script>alert("1")</script>' in found.named("img")[0]["alt"]


ODD = {
    "metrics.json": ["", "[]", "{", "null", '{"settings": 3, "stage": 7}', '{"val_loss": NaN}',
                     '{"stage": "mae", "val_loss": 1e999, "parameters": "many", "bad_files": []}',
                     '{"stage": "fuse", "seconds": 1' + "0" * 400 + "}", "[" * 100_000],
    "config.json": ["[]", '{"size": 3}', '{"size": {"depth": []}, "frames": 4}',
                    '{"size": {"depth": 1, "width": 2, "patch": 0}, "frames": 4, '
                    '"image_size": [4, 4]}', '{"masked": [], "multimodal": {}}'],
    "log.jsonl": ["\n\n[]\n", '{"step": "one", "loss": 1}\n{"step": 2, "loss": "high"}',
                  '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e308}\n{"step": 3, "lo'],
    "table.json": ['{"rows": []}', '{"rows": {"a": 1, "b": {}}}', '{"rows": {"a": {"x": null}}}'],
    "x.png": ["", "no picture", "\x89PNG\r\n"],
    "captions_0.gif": ["", "GIF89a"],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("stage", ["mae", "clip", "classify", "fuse", "answer"])
def test_odd_files_give_a_page_with_less_on_it(tmp_path, name, stage):
    for number, content in enumerate(ODD[name]):
        folder = write_run(tmp_path / str(number), stage, {"encoder": "masked"}, LOG, val_loss=0.5)
        (folder / name).write_text(content)
        read(report.write(folder))
        read(report.write(tmp_path, [str(number), "missing"]))


def test_a_page_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (folder / "report.html").mkdir()
    assert report.write(folder) is None
    assert "report.html was not written" in capsys.readouterr().out


def test_pictures_beyond_the_room_of_a_page_are_named_and_left_beside_it(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a")
    for i in range(3):
        pictures.moving_picture(torch.rand(3, 2, 40, 40), folder / f"captions_{i}.gif", "words")
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.gif"))]
    monkeypatch.setattr(report, "MOST_BYTES", sum(sizes[:2]))
    found = read(report.write(folder))
    assert len(found.named("img")) == 2 and "captions_2.gif" in found.text()
    assert report.write(folder).stat().st_size < 4 / 3 * sum(sizes[:2]) + 40_000


def test_of_very_many_bad_files_the_page_lists_some_and_says_how_many(tmp_path):
    bad = {f"clip_{i}.mp4": "no video in it" for i in range(5000)}
    path = report.write(write_run(tmp_path, bad_files=bad))
    said = read(path).text()
    assert "5,000 files that could not be read, the first 100" in said
    assert "clip_99.mp4" in said and "clip_100.mp4" not in said
    assert path.stat().st_size < 60_000


def test_captions_move_and_say_what_was_written_and_what_is_true(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (7, 4, 16, 16, 3), dtype=np.uint8)
    truths, written = [f"truth {i}" for i in range(7)], [f"model\x07 {i}" for i in range(7)]
    truths[2] = " ".join(["a long sentence that the picture shortens"] * 9)
    paths = pictures.captions(clips, truths, written, tmp_path / "captions.png")
    assert [path.name for path in paths] == ["captions.png"] + [f"captions_{i}.gif"
                                                                for i in range(6)]
    found = read(report.write(write_run(tmp_path, "clip")))
    said = found.text()
    assert "model: model. 5" in said and "truth: truth 5" in said and "truth 6" not in said
    assert truths[2] in said  # the page has room for all of it
    assert len(found.named("img")) == 6  # the strip that stands still is left out


def default_runs(folder):
    """Numbers and configs of the six runs of the default run, made up."""
    size = {"width": 96, "depth": 3, "patch": 8}
    video = {"size": size, "frames": 8, "image_size": [40, 40]}
    configs = {"mae": video | {"tubelet": 2},
               "clip": {"clip": video | {"temporal_downsample": True, "embedding": 64,
                                         "vocabulary": 767, "context": 32, "text_size": size}},
               "masked": video | {"tubelet": 2, "classes": 30},
               "multimodal": video | {"classes": 30}, "scratch": video | {"classes": 30},
               "fuse": {}}
    for i, (name, config) in enumerate(configs.items()):
        stage = name if name in ("mae", "clip", "fuse") else "classify"
        log = LOG + [{"step": 20, "gate_a": -0.5, "gate_b": 0.25, "share_masked": 0.2,
                      "share_multimodal": 0.8}] * (name == "fuse")
        encoder = "multimodal" if name == "multimodal" else "masked"
        out = write_run(folder / name, stage, {"encoder": encoder, "mask_ratio": 0.75}, log,
                        val_loss=0.5, val_all_facts=11.5 + i, parameters=10**6, seconds=60.0)
        (out / "config.json").write_text(json.dumps(config))
    return list(configs)


def test_the_system_has_the_shapes_and_numbers_of_all_six_runs(tmp_path):
    names = default_runs(tmp_path)
    said = read(report.write(tmp_path, names)).text()
    for words in ("3 × 8 × 40 × 40", "100 × 96", "28 × 96", "4 × 26 × 96", "L ≤ 32", "2 × 30",
                  "2 gates, up to 50 % open", "shares 20 : 80", "13.5 % right", "14.5 % right",
                  "16.5 % right", "6 minutes"):
        assert words in said, words
    assert "15.5 % right" not in said  # from scratch is in no box
    rows = {"masked encoder": {"all facts": 37.0}, "cross-model attention": {"all facts": 94.44}}
    (tmp_path / "table.json").write_text(json.dumps({"protocol": "p", "rows": rows}))
    said = read(report.write(tmp_path, names)).text()
    assert "37.0 % right" in said and "94.4 % right" in said and "13.5 % right" not in said
    assert 'class="s-fuse off"' not in (tmp_path / "report.html").read_text()
    alone = read(report.write(tmp_path / "mae"))
    assert "13.5 % right" not in alone.text()
    assert any(tag == "g" and "s-fuse off" in attributes["class"]
               for tag, attributes in alone.tags)


def test_boxes_lie_in_the_plane_and_apart_and_hold_their_lines():
    for place in (4, 5):
        boxes = [box[place] for box in system.BOXES.values()]
        for i, (x, y, w, h) in enumerate(boxes):
            assert x >= 0 and y >= 0 and h >= 18 * 3
            for u, v, r, s in boxes[:i]:
                assert x + w <= u or u + r <= x or y + h <= v or v + s <= y
    ends = {name for _, begin, end, *_ in system.ARROWS for name in (begin, end)}
    assert ends == set(system.BOXES)


def test_ticks_are_round_and_between_and_long_logs_become_short_lines():
    for low, high in ((0, 1), (-0.95, 0.9), (0.3, 0.31), (0, 12_345), (5, 5), (1e-9, 2e-9)):
        found = page.ticks(low, high)
        assert len(found) <= 7 and all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    points = page.thin([(i, 2.0) for i in range(10_001)])
    assert len(points) <= 240 and {value for _, value in points} == {2.0}
    drawn = page.chart("Loss", [("training", "train", [(i, i) for i in range(10_001)])])
    assert len(drawn) < 8_000 and "10,001" not in drawn and "from" in drawn
    assert page.chart("Loss", [("training", "train", [])]) == ""


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    """0.5, 0.05 and 0.005 are equally far apart there; on a linear axis the last two coincide."""
    def heights(log, *values):
        drawn = page.chart("Loss", [("training", "train", list(enumerate(values)))], log=log)
        return [float(y) for y in re.findall(r'cy="([0-9.]+)"', drawn)]
    first, middle, last = heights(True, 0.5, 0.05, 0.005)
    assert abs((middle - first) - (last - middle)) < 0.2
    first, middle, last = heights(False, 0.5, 0.05, 0.005)
    assert last - middle < (middle - first) / 5
    assert heights(True, 3.0, 2.0, 1.0) == heights(False, 3.0, 2.0, 1.0)  # it does not fall far
    assert pictures.falls_far([0.5, 0.01]) and not pictures.falls_far([3.0, 1.0])
    assert not pictures.falls_far([0.5, 0.0])  # zero has no place on such an axis
    for low, high in ((0.003, 0.7), (1e-6, 1.0), (0.9, 30)):
        marks = page.log_ticks(low, high)
        assert 2 <= len(marks) <= 7 and all(low <= mark <= high for mark in marks)


# --------------------------------------------------------------------------------------------------
# A real browser


class Browser:
    """Chromium without a screen, spoken to through a pipe (the DevTools protocol)."""

    def __init__(self, program, profile):
        to_browser, self.to = os.pipe()
        self.heard, from_browser = os.pipe()
        # The browser listens on file 3 and answers on file 4.
        line = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", program, "--headless", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
             "--disable-dev-shm-usage", "--hide-scrollbars"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.count, self.rest, self.events, self.session = 0, b"", [], None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{name}.enable")

    def answer(self):
        """The next message of the browser."""
        while b"\0" not in self.rest:
            piece = os.read(self.heard, 1 << 16)
            assert piece, "the browser has ended"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method, **params):
        """The result of a command; what happens until then is in self.events."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while True:
            message = self.answer()
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, path, width, scheme):
        """Load a page in a window of this width, light or dark -> events until it is there."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.answer())
        return self.events

    def value(self, expression):
        """The value of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression,
                        returnByValue=True)["result"].get("value")

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.heard)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_shows_the_page_whole_on_a_telephone_and_a_screen(run, tmp_path):
    """No message on the console, nothing loaded, no part wider than the window, light and dark."""
    names = default_runs(tmp_path / "default")
    for path in run.glob("*.gif"):
        shutil.copy(path, tmp_path / "default" / "mae")
    long = "no_break_" * 60
    write_run(tmp_path / "long", settings={long: long}, protocol={long: long}, log=LOG,
              bad_files={long: long}, val_loss=0.5)
    (tmp_path / "default" / "table.json").write_text(json.dumps({"protocol": long, "rows": {
        "masked encoder": {f"column {i}": 50.0 for i in range(20)}}}))
    paths = [run / "report.html", report.write(tmp_path / "long"),
             report.write(tmp_path / "default", names)]
    browser, backgrounds = Browser(CHROMIUM, tmp_path / "profile"), set()
    try:
        for path in paths:
            for width in (400, 1400):
                for scheme in ("light", "dark"):
                    events = browser.open(path, width, scheme)
                    browser.value("document.querySelectorAll('details').forEach(d => d.open = "
                                  "true)")
                    assert browser.value("document.documentElement.scrollWidth") <= width
                    assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
                    assert not [event for event in events if event["method"] in (
                        "Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
                    loaded = [event["params"]["request"]["url"] for event in events
                              if event["method"] == "Network.requestWillBeSent"]
                    assert [url for url in loaded if not url.startswith("data:")] == [
                        path.resolve().as_uri()]
                    backgrounds.add(browser.value(
                        "getComputedStyle(document.body).backgroundColor"))
                    shown = browser.value("[...document.querySelectorAll('.system svg')].map(s => "
                                          "getComputedStyle(s).display != 'none').join()")
                    assert shown == ("false,true" if width == 400 else "true,false")
        assert len(backgrounds) == 2
    finally:
        browser.close()

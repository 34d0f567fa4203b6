"""`rae report`: one page that needs nothing else, holds what the run holds, and runs none of its text."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from raecli.errors import InputError
from raecli.inspection import inspect
from raecli.recipe.load import dump_recipe, load_recipe
from raecli.report import MAX_SHEETS, document, write_report

HOSTILE = "<script>alert(1)</script>\"'&"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: tags in balance, links, anchors, pictures, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.anchors, self.links, self.pictures, self.text, self.tags = [], set(), [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.anchors.add(told.get("id"))
        self.links += [told["href"]] if "href" in told else []
        self.pictures += [told["src"]] if "src" in told else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """A run folder as a training that was stopped leaves it, with a hostile name and hostile words."""
    folder = tmp_path / "a <b> $x$ run"
    (folder / "samples").mkdir(parents=True)
    overrides = [f"paper={json.dumps(HOSTILE)}", f"output={json.dumps(str(folder))}", "cache=nowhere"]
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(None, "digits/diffusion", overrides)))
    lines = [{"step": 5 * i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, 30)]
    lines += [{"step": 50, "evaluate_images": 8, "fid": 9.5}, {"step": 100, "fid": 11.25}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"python": HOSTILE}))
    for step in range(1, MAX_SHEETS + 4):
        Image.fromarray(np.full((40, 2000, 3), step, np.uint8)).save(folder / "samples" / f"step-{step:07d}.png")
    return folder


def test_a_page_needs_nothing_else_and_shows_what_the_run_holds(run, tmp_path):
    write_report([str(run)], tmp_path / "out.html", [], [])
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert all(link.startswith("#") and link[1:] in page.anchors for link in page.links) and len(page.links) >= 3
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.pictures) == 1 + MAX_SHEETS  # the curves and the sheets
    sizes = []
    for picture in page.pictures:
        head, _, data = picture.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            sizes.append(max(image.size))
    assert max(sizes[1:]) == 1600  # made smaller
    assert "3 of 27 sheets are left out" in page.text
    assert "unfinished, stopped" in page.text and "9.5" in page.text and "11.25" in page.text
    assert HOSTILE in page.text and "a <b> $x$ run" in page.text


def test_a_run_without_figures_and_one_beside_it_are_told(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    assert "No figures yet" in Page(document([str(bare)])).text
    assert "No sheets of samples" in Page(document([str(bare), str(run)])).text


@pytest.mark.parametrize("content", [None, "stage: sample\nmodel: a\nautoencoder: b\noutput: c\n"])
def test_what_is_no_training_run_is_refused(tmp_path, content):
    (tmp_path / "thing").mkdir()
    if content:
        (tmp_path / "thing" / "recipe.yaml").write_text(content)
    with pytest.raises(InputError, match="no training run"):
        document([str(tmp_path / "thing")])


def test_reports_of_eval_and_damaged_pictures_are_told_in_words(run, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"fid": 3.25, "samples_path": HOSTILE}))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "grid.png").write_bytes(b"\x89PNG cut")
    page = Page(document([str(run)], [str(tmp_path / "made")], [str(tmp_path / "report.json")]))
    assert "3.25" in page.text and "grid.png: cannot be read" in page.text
    with pytest.raises(InputError, match="give a folder of rae sample"):
        document([str(run)], [str(tmp_path)])


def test_inspect_does_not_count_a_picture_of_samples_as_one(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps({"num": 2}))
    for name in ("000000.png", "grid.png", "trajectory.png"):
        (tmp_path / name).write_bytes(b"")
    assert inspect(tmp_path).problems == ["1 of 2 images are missing"]


def test_inspect_tells_a_sweep(tmp_path):
    rows = [{"guidance_scale": 1.5, "fid": 4.0}, {"guidance_scale": 2.0, "fid": 3.0}, {"guidance_scale": 3.0}]
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": rows}))
    assert inspect(tmp_path).facts == {"trials": 3, "measured": 2, "best": "guidance_scale 2.0, fid 3.0"}

"""What a run tells of itself: the meter's arithmetic, its sinks, progress on a terminal and in a file, the curves."""

import fcntl
import io
import json
import os
import re
import struct
import sys
import termios

import pytest
import torch
from PIL import Image

from raecli.cli import plot as plotting
from raecli.errors import InputError, UsageError
from raecli.recipe.blocks import TrackingSpec
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDecoderRecipe, TrainDiffusionRecipe
from raecli.stages.train_diffusion import training_flops
from raecli.store.run_folder import OPERATIONAL, MetricsLog, read_metrics
from raecli.store.tracking import check_tracking
from raecli.training import meter as metering
from raecli.training import progress as progressing
from raecli.training.distributed import Ranks
from raecli.training.meter import Meter
from raecli.training.peak import known_peak
from raecli.training.progress import Progress, duration

ALONE = Ranks(0, 1, torch.device("cpu"))


class Clock:
    """A clock that is told what time it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metering, "time", clock)
    return clock


def recipe(tmp_path, *overrides):
    return load_recipe(
        TrainDiffusionRecipe, "digits/diffusion", [f"output={tmp_path}", "log_every=4", "batch_size=64", *overrides]
    )


def train(meter, clock, steps, *, total, rate=0.1, wait=0.5, compute=1.5):
    """Steps of 2 s, of which half a second is waiting for the batch."""

    def batches():
        for step in steps:
            clock.now += wait
            yield step

    for step in meter.timed(batches()):
        clock.now += compute
        meter.record(step, {"loss": torch.tensor(float(step)), "gradient_norm": 2.0}, {"learning_rate": rate})


def test_a_line_holds_every_figure_of_its_steps(tmp_path, clock):
    with Meter(recipe(tmp_path), ALONE, first_step=0, total_steps=20, samples=128) as meter:
        train(meter, clock, range(1, 9), total=20)
    first, second = read_metrics(tmp_path)
    assert second == {
        "step": 8,
        "epoch": 4.0,
        "samples": 512,
        "loss": pytest.approx(6.5),  # of steps 5, 6, 7, 8
        "gradient_norm": 2.0,
        "learning_rate": 0.1,
        "images_per_second": pytest.approx(32.0),
        "data_wait_share": pytest.approx(0.25),
        "seconds_per_step": pytest.approx(2.0),
        "eta_seconds": pytest.approx(24.0),
    }
    assert first["loss"] == pytest.approx(2.5) and first["eta_seconds"] == pytest.approx(32.0)
    assert not {"mfu", "gpu_memory_peak_gib"} & first.keys()  # a CPU has no known peak: nothing is made up


def test_time_spent_aside_has_its_own_key_and_slows_no_image(tmp_path, clock):
    with Meter(recipe(tmp_path), ALONE, first_step=0, total_steps=12, samples=128) as meter:
        train(meter, clock, range(1, 5), total=12)
        with meter.aside("save"):
            clock.now += 100.0
        with meter.aside("save"):
            clock.now += 20.0
        train(meter, clock, range(5, 9), total=12)
        with meter.aside("evaluate"):
            clock.now += 7.0
        meter.tell(8, {"fid": 3.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 8]
    assert "save_seconds" not in lines[0] and lines[1]["save_seconds"] == pytest.approx(120.0)
    assert lines[1]["images_per_second"] == pytest.approx(32.0)
    assert lines[1]["data_wait_share"] == pytest.approx(0.25)
    assert lines[1]["eta_seconds"] == pytest.approx(4 * (120 + 8) / 4)  # what is aside takes its time all the same
    assert lines[2] == {"step": 8, "fid": 3.0, "evaluate_seconds": pytest.approx(7.0)}


def test_a_step_that_is_slow_once_leaves_the_forecast_after_the_first_line(tmp_path, clock):
    with Meter(recipe(tmp_path), ALONE, first_step=0, total_steps=100, samples=128) as meter:
        clock.now += 300.0  # compiling
        train(meter, clock, range(1, 9), total=100)
    first, second = read_metrics(tmp_path)
    assert first["eta_seconds"] > 1000 and second["eta_seconds"] == pytest.approx(92 * 2.0)


def test_no_figure_is_looked_at_before_its_line(tmp_path):
    unreadable = {"loss": torch.empty((), device="meta"), "gradient_norm": torch.empty((), device="meta")}
    with Meter(recipe(tmp_path), ALONE, first_step=0, total_steps=100, samples=128) as meter:
        for step in (1, 2, 3):
            meter.record(step, unreadable, {"learning_rate": 0.1})  # reading one would raise, as it would stall a GPU
        with pytest.raises((NotImplementedError, RuntimeError)):
            meter.record(4, unreadable, {"learning_rate": 0.1})


def test_the_last_step_is_told_although_no_line_is_due(tmp_path, clock):
    with Meter(recipe(tmp_path), ALONE, first_step=0, total_steps=2, samples=128) as meter:
        meter.record(1, {"loss": torch.tensor(1.0)}, {"learning_rate": 0.1})
        clock.now += 1
        meter.record(2, {"loss": torch.tensor(3.0)}, {"learning_rate": 0.1}, last=True)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(2, 2.0)]


def test_mfu_is_three_forwards_over_the_devices_peak(tmp_path, clock):
    told = recipe(tmp_path, "peak_tflops=0.5")
    with Meter(told, ALONE, first_step=0, total_steps=20, samples=128, training_flops=1e9) as meter:
        train(meter, clock, range(1, 5), total=20)
    assert read_metrics(tmp_path)[0]["mfu"] == pytest.approx(32.0 * 1e9 / 0.5e12)
    sizes = ("model.in_channels=768", "model.input_size=16", "model.num_classes=1000")
    flops = training_flops(load_recipe(TrainDiffusionRecipe, "dith_xl", sizes))
    assert flops / 3e9 == pytest.approx(323.2, abs=0.05)  # GFLOP of a forward, PERFORMANCE's table


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a slice of a card
        ("NVIDIA GeForce RTX 3090 Ti", None),  # another card than the 3090
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_peak_is_that_of_the_very_card_or_none(name, bf16):
    assert known_peak(name, "bf16") == bf16


def test_what_only_tells_of_a_run_may_change_when_it_goes_on():
    assert {"tracking", "peak_tflops", "evaluation"} <= OPERATIONAL
    for kind in (TrainDiffusionRecipe, TrainDecoderRecipe):
        assert {"tracking", "peak_tflops"} <= kind.model_fields.keys()


def test_tensorboard_holds_what_the_log_holds_and_a_resumed_run_doubles_no_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (12, 8)).save(tmp_path / "sheet.png")
    tracking = TrackingSpec(tensorboard=True)
    log = MetricsLog(tmp_path, 0, tracking)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": step / 8})
    log.picture(20, "sheet", tmp_path / "sheet.png")
    del log  # killed: never closed
    log = MetricsLog(tmp_path, 20, tracking)  # the checkpoint was of step 20
    for step in (30, 40):
        log.write({"step": step, "loss": step / 4})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, 1.25),
        (20, 2.5),
        (30, 7.5),
        (40, 10.0),
    ]
    assert [(picture.step, picture.width, picture.height) for picture in events.Images("sheet")] == [(20, 12, 8)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (10, 1.25),
        (20, 2.5),
        (30, 7.5),
        (40, 10.0),
    ]


@pytest.mark.parametrize(
    ("module", "tracking", "told"),
    [
        ("tensorboard", TrackingSpec(tensorboard=True), r"raecli\[tensorboard\]"),
        ("wandb", TrackingSpec(wandb_project="p"), "pip install wandb"),
    ],
)
def test_a_sink_that_cannot_be_imported_is_named_with_its_cure(monkeypatch, module, tracking, told):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=told):
        check_tracking(tracking)
    check_tracking(TrackingSpec())


def test_progress_in_a_file_is_plain_lines_with_the_time_left(monkeypatch):
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(progressing, "time", clock)
    monkeypatch.setattr(sys, "stderr", file)
    progress = Progress(100, "steps", "train", shown=True)
    for step in range(100):
        clock.now += 1
        progress.advance(1, f"loss {step}")
    progress.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 7  # every 15 s, and the end
    assert lines[0] == "train: 15/100 steps, 1 steps/s, 1 min 25 s left, loss 14"
    assert lines[-1] == "train: 100/100 steps, 1 steps/s, loss 99"
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


@pytest.mark.parametrize(
    ("rate", "told"), [(0.04912, "0.0491"), (12.58, "12.6"), (999.4, "999"), (4412.0, "4,410"), (123456.0, "123,000")]
)
def test_a_rate_has_three_digits_and_no_exponent(rate, told):
    assert progressing.told_rate(rate) == told


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its size
def test_progress_on_a_terminal_is_a_bar_in_one_line(monkeypatch, columns):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(20, "steps", "train", shown=True)
        for _ in range(20):
            progress.advance(1, "loss 0.5")
        progress.close()
        terminal.flush()
        seen = ""
        while "\n" not in seen:
            seen += os.read(ours, 65536).decode()
    os.close(ours)
    assert "20/20" in seen and "loss 0.5" in seen and "\r" in seen
    assert seen.count("\n") == 1


def test_times_as_one_reads_them():
    told = [duration(seconds) for seconds in (0.4, 59, 425, 12345, 187200)]
    assert told == ["0 s", "59 s", "7 min 05 s", "3 h 25 min", "2 d 04 h"]


def write_run(folder, count, **keys):
    folder.mkdir()
    lines = [{"step": 10 * i, **{name: value(i) for name, value in keys.items()}} for i in range(1, count + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_a_plot_has_a_panel_a_key_and_a_colour_a_run(tmp_path):
    a = write_run(tmp_path / "a", 60, loss=lambda i: 2 / i, learning_rate=lambda i: 1e-4, fid=lambda i: 50 / i)
    b = write_run(tmp_path / "b", 5, loss=lambda i: 1 / i)
    curves = plotting.curves_of(plotting.read_runs([a, b]), None)
    assert list(curves) == ["loss", "learning_rate", "fid"] and list(curves["loss"]) == ["a", "b"]
    figure = plotting.drawn(curves)
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == ["loss", "learning rate", "FID"]
    assert panels["loss"].get_yscale() == "log" and panels["learning rate"].get_yscale() == "linear"
    assert {line.get_color() for line in panels["loss"].lines} == {"C0", "C1"}
    assert {line.get_color() for line in panels["FID"].lines} == {"C0"}
    plotting.plot([a, b], out=str(tmp_path / "new" / "two.png"), keys="loss, fid")
    with Image.open(tmp_path / "new" / "two.png") as picture:
        assert picture.width > 800
    plotting.plot([a], out=None, keys=None)
    assert (tmp_path / "a" / "curves.png").is_file()


def test_a_legend_shows_a_folders_name_as_it_is(tmp_path):
    """No mathematics between two dollars, and a leading underscore hides nothing."""
    run = write_run(tmp_path / "_a $x$", 5, loss=lambda i: 1 / i)
    figure = plotting.drawn(plotting.curves_of(plotting.read_runs([run]), None))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"_a \$x\$"]
    assert figure.legends[0].get_texts()[0].get_visible()


def test_what_cannot_be_plotted_is_told(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a", 3, loss=lambda i: 1 / i)
    (tmp_path / "empty").mkdir()
    for path, told in ((tmp_path / "empty", "no figures in metrics.jsonl"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=told):
            plotting.plot([str(path)], out=None, keys=None)
    with pytest.raises(UsageError, match=re.escape("did you mean loss?")):
        plotting.plot([run], out=None, keys="los")
    with pytest.raises(UsageError, match=r"\.png"):
        plotting.plot([run], out="curves.txt", keys=None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"raecli\[plots\]"):
        plotting.plot([run], out=None, keys=None)
    assert not (tmp_path / "a" / "curves.png").exists()


def test_smoothing_keeps_a_level_and_a_slope_and_quietens_noise():
    level = plotting.smoothed([3.0] * 500)
    assert max(abs(value - 3.0) for value in level) < 1e-12
    slope = [0.5 * i for i in range(500)]
    assert max(abs(a - b) for a, b in list(zip(plotting.smoothed(slope), slope, strict=True))[:480]) < 1e-9
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.tensor(plotting.smoothed(noise)).std() < 0.4
    assert plotting.smoothed([2.0]) == [2.0]

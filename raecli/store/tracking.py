"""Where metrics.jsonl is told a second time, if the recipe asks: TensorBoard's event files, Weights & Biases. No torch.

Both are imported only when asked for. `check_tracking` is for the door: what is not installed is found before training.
"""

import time
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from raecli.errors import UsageError
from raecli.recipe.blocks import TrackingSpec
from raecli.store.atomic import write_json
from raecli.store.json_file import read_json

TENSORBOARD_FOLDER, WANDB_FILE = "tensorboard", "wandb.json"

Figures = dict[str, float | int]


class Sink(Protocol):
    """What takes in the figures beside metrics.jsonl."""

    def write(self, step: int, figures: Figures) -> None:
        """Take in the figures of a step."""

    def picture(self, step: int, name: str, png: Path) -> None:
        """Take in a picture of a step."""

    def close(self) -> None:
        """Send on what waits; nothing comes after this."""


def check_tracking(spec: TrackingSpec) -> None:
    """Import what is asked for. Raises UsageError with what to install."""
    if spec.tensorboard:
        try:
            import tensorboard.compat.proto.event_pb2
            import tensorboard.summary.writer.event_file_writer  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"tracking.tensorboard: tensorboard cannot be imported ({error}); pip install 'raecli[tensorboard]', "
                "or set tracking.tensorboard=false: metrics.jsonl is written anyway"
            ) from None
    if spec.wandb_project is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"tracking.wandb_project: wandb cannot be imported ({error}); pip install wandb (it is no part of "
                "raecli), or set tracking.wandb_project=null: metrics.jsonl is written anyway"
            ) from None


def open_sinks(spec: TrackingSpec, run: Path, first_step: int, config: dict[str, Any]) -> list[Sink]:
    """The sinks that are asked for. first_step: figures up to it are kept, later ones are of a run that was cut."""
    check_tracking(spec)
    sinks: list[Sink] = [TensorBoardSink(run, first_step)] if spec.tensorboard else []
    if spec.wandb_project is not None:
        sinks.append(WandbSink(run, spec.wandb_project, config))
    return sinks


class TensorBoardSink:
    """Event files in RUN/tensorboard/. A resumed run says at which step it goes on: what was told beyond is dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run / TENSORBOARD_FOLDER
        resumed = any(folder.glob("events.*"))
        self.writer = EventFileWriter(str(folder))
        if resumed:
            self._add(first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self.writer.flush()

    def write(self, step: int, figures: Figures) -> None:
        """Scalars by their names, on disk when this returns."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._add(step, summary=Summary(value=values))
        self.writer.flush()

    def picture(self, step: int, name: str, png: Path) -> None:
        """The file's bytes as they are."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(png) as image:
            width, height = image.size
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.read_bytes())
        self._add(step, summary=Summary(value=[Summary.Value(tag=name, image=encoded)]))
        self.writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        self.writer.close()

    def _add(self, step: int, **content: Any) -> None:
        """One event, now."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.add_event(Event(wall_time=time.time(), step=step, **content))


class WandbSink:
    """A run of Weights & Biases, its id kept in RUN/wandb.json, so that a resumed run goes on in it.

    W&B never takes a step back: steps that it has already are not told again. They would be the same figures.
    """

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        self.wandb, identity = wandb, run / WANDB_FILE
        known = read_json(identity) if identity.is_file() else {}
        name = known.get("id") if known.get("project") == project else None
        name = name or uuid4().hex[:8]
        try:
            self.run = wandb.init(project=project, id=name, name=run.name, dir=str(run), config=config, resume="allow")
        except wandb.Error as error:
            raise UsageError(
                f"tracking.wandb_project: wandb does not begin ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from None
        write_json(identity, {"project": project, "id": name})
        self.first = int(self.run.step)  # 0 for a new run

    def write(self, step: int, figures: Figures) -> None:
        """Figures by their names."""
        if step >= self.first:
            self.run.log(figures, step=step)

    def picture(self, step: int, name: str, png: Path) -> None:
        """A picture beside the step's figures."""
        if step >= self.first:
            self.run.log({name: self.wandb.Image(str(png))}, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self.run.finish()

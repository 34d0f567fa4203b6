"""`rae eval`: how near samples come to a reference, and whether they show what was asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raecli.cli import evaluate_reconstruction
from raecli.cli import probe as latent_probe
from raecli.cli.options import DevicesOpt, DryRunOpt, JsonOpt, NnodesOpt, NodeRankOpt, RdzvOpt

if TYPE_CHECKING:
    from raecli.launch import LaunchOptions
    from raecli.recipe.recipes import EvaluateRecipe

COLLECTIVE_SECONDS = 3600.0  # ranks meet once a set of images; slices are equal, disks may not be

app = typer.Typer(
    name="eval",
    help="Measure samples: their Frechet distance to a reference, or how many show the class asked for.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SamplesArg = Annotated[str, typer.Argument(metavar="SAMPLES", help="Folder of PNG or JPEG images, or .npz with arr_0.")]
BatchSizeOpt = Annotated[int, typer.Option("--batch-size", help="Images a forward on one rank.", min=1)]
OutOpt = Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON.")]


@app.command("fid")
def fid(
    samples: SamplesArg,
    reference: Annotated[
        str, typer.Option("--ref", metavar="REF", help="The same, or an npz with stored statistics (mu, sigma).")
    ],
    inception: Annotated[
        str | None,
        typer.Option("--inception", metavar="FILE", help="Its weights [default: $RAE_INCEPTION, torch hub's cache]."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", metavar="FILE", help="Instead: a classifier's file, or an encoder's name or folder."
        ),
    ] = None,
    batch_size: BatchSizeOpt = 64,
    as_json: JsonOpt = False,
    out: OutOpt = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Frechet distance between samples and a reference (FID).

    Mean and covariance are streamed in float64, so the figure depends on neither batch size nor number of devices.

    \b
    rae eval fid samples/ --ref adm_ref.npz            ADM's reference batch, Inception
    rae eval fid samples/ --ref images/ --json         against a folder of images
    rae eval fid samples/ --ref test/ --features judge.safetensors
    """
    from raecli.errors import UsageError
    from raecli.launch import LaunchOptions
    from raecli.metrics.inception_file import find_inception
    from raecli.recipe.recipes import EvaluateRecipe

    require_paths(samples, reference)
    if inception and features:
        raise UsageError("--inception and --features exclude one another: FID is measured in one network")
    if features and features.endswith(".safetensors"):
        require_paths(features)
    if not features:
        find_inception(inception)  # refuses before anything is started; the workers find it again
    recipe = EvaluateRecipe(
        stage="eval",
        metrics=("fid",),
        samples=samples,
        reference=reference,
        inception=inception,
        features=features,
        batch_size=batch_size,
        output=out,
        print_json=as_json,
    )
    launch(recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS), dry_run)


@app.command("accuracy")
def accuracy(
    samples: SamplesArg,
    classifier: Annotated[str, typer.Option("--classifier", metavar="FILE", help="The judge: a classifier's file.")],
    batch_size: BatchSizeOpt = 64,
    as_json: JsonOpt = False,
    out: OutOpt = None,
    devices: DevicesOpt = None,
    nnodes: NnodesOpt = 1,
    node_rank: NodeRankOpt = 0,
    rdzv: RdzvOpt = None,
    dry_run: DryRunOpt = False,
) -> None:
    """Share of samples that a classifier takes for the class asked for, as a whole and class by class.

    The class asked for is told by samples.json, which `rae sample` writes, or by class folders.

    \b
    rae eval accuracy samples/ --classifier judge.safetensors
    """
    from raecli.launch import LaunchOptions
    from raecli.recipe.recipes import EvaluateRecipe

    require_paths(samples, classifier)
    recipe = EvaluateRecipe(
        stage="eval",
        metrics=("accuracy",),
        samples=samples,
        classifier=classifier,
        batch_size=batch_size,
        output=out,
        print_json=as_json,
    )
    launch(recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS), dry_run)


def require_paths(*paths: str) -> None:
    """Refuse what is not there before anything is started."""
    from raecli.errors import InputError

    for path in paths:
        if not Path(path).exists():
            raise InputError(f"{path}: no such file or folder")
        if (Path(path) / "unfinished.json").exists():
            raise InputError(f"{path}: its samples are not all made yet; run the same rae sample again")


def launch(recipe: "EvaluateRecipe", options: "LaunchOptions", dry_run: bool) -> None:
    """Start the stage."""
    from raecli.errors import UsageError
    from raecli.launch import start

    if recipe.output is not None and not Path(recipe.output).absolute().parent.is_dir():
        raise UsageError(f"--out {recipe.output}: no such folder to write in; make it first")
    start("eval", recipe, options, dry_run=dry_run)


app.command("reconstruction")(evaluate_reconstruction.reconstruction)
app.command("probe")(latent_probe.probe)
app.command("tsne")(latent_probe.tsne)

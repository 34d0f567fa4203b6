"""`rae eval`: how near samples come to a reference, and whether they show what was asked for."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from raecli.cli import evaluate_compare, evaluate_reconstruction, evaluate_write
from raecli.cli import probe as latent_probe
from raecli.cli.options import (
    CONTEXT,
    DevicesOpt,
    DryRunOpt,
    JsonOpt,
    NnodesOpt,
    NodeRankOpt,
    RdzvOpt,
    list_whole_sentences,
)

if TYPE_CHECKING:
    from raecli.launch import LaunchOptions
    from raecli.recipe.recipes import EvaluateRecipe

COLLECTIVE_SECONDS = 3600.0  # ranks meet once a set of images; slices are equal, disks may not be

app = typer.Typer(
    name="eval",
    help="Measure samples against a reference, as the ADM evaluator does; compare two reports.\n\n"
    "Examples:\n\n"
    "  rae eval fid samples/ --ref adm_ref.npz\n\n"
    "  rae eval reconstruction imagenet/val recon/\n\n"
    "  rae eval compare monday.json tuesday.json",
    short_help="Measure samples against a reference, as the ADM evaluator does.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

SamplesArg = Annotated[
    str,
    typer.Argument(metavar="SAMPLES", help="Folder of PNG or JPEG images, .npz with arr_0, tars, or a feature file."),
]
ReferenceOpt = Annotated[
    str | None,
    typer.Option("--ref", metavar="REF", help="As SAMPLES; or an ADM reference batch, or statistics (mu, sigma)."),
]
InceptionOpt = Annotated[
    str | None,
    typer.Option(
        "--inception", metavar="FILE", help="Inception's weights [default: $RAE_INCEPTION, torch hub's cache]."
    ),
]
Dinov2Opt = Annotated[
    str | None,
    typer.Option("--dinov2", metavar="FILE", help="ViT-L/14's weights, for fdd [default: $RAE_DINOV2, hub's cache]."),
]
FeaturesOpt = Annotated[
    str | None,
    typer.Option(
        "--features", metavar="FILE", help="Instead of Inception: a classifier's file, or an encoder's name or folder."
    ),
]
PrPrecisionOpt = Annotated[
    Literal["both", "exact", "adm"],
    typer.Option("--pr-precision", help="Distances of precision and recall: float32, ADM's float16, or both."),
]
BatchSizeOpt = Annotated[int, typer.Option("--batch-size", help="Images a forward on one rank.", min=1)]
OutOpt = Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON.")]

EVERY = ("fid", "sfid", "is", "precision-recall", "kid", "fdd")
HELP = {
    "fid": """Frechet distance between samples and a reference (FID).

    Mean and covariance are streamed in float64, so the figure depends on neither batch size nor number of devices.

    Examples:

    \b
      rae eval fid samples/ --ref adm_ref.npz    ADM's reference batch, Inception
      rae eval fid samples/ --ref images/ --json  against a folder of images
      rae eval fid samples/ --ref test/ --features judge.safetensors
    """,
    "sfid": """Frechet distance of Inception's spatial features (sFID): 7 channels of mixed_6, 17 x 17 places.

    Examples:

    \b
      rae eval sfid samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    """,
    "is": """Inception Score, over consecutive splits of 5000. Takes no reference.

    Splits follow the order of the samples, as in ADM's evaluator; logits are without bias.

    Samples sorted by class score far too low: they are told of, where labels or class folders tell.

    Examples:

    \b
      rae eval is samples/
    """,
    "precision-recall": """Improved precision and recall, by third neighbours in the pooled features.

    precision and recall are of float32 distances, precision_float16 and recall_float16 as ADM's evaluator rounds on
    a GPU; --pr-precision adm makes those the figures. A reference needs images or features, not statistics alone.

    Examples:

    \b
      rae eval precision-recall samples.npz --ref adm_ref.npz --pr-precision adm
    """,
    "kid": """Kernel Inception Distance (KID): 100 subsets of 1000 in the pooled features.

    Subsets are drawn by position with a fixed seed: another order of the samples moves it within its deviation.

    Examples:

    \b
      rae eval kid samples/ --ref images/
    """,
    "fdd": """Frechet distance of DINOv2's class tokens (FDD). It favours autoencoders on DINOv2: read it beside FID.

    Examples:

    \b
      rae eval fdd samples/ --ref images/ --dinov2 dinov2_vitl14_pretrain.pth
    """,
    "all": """All of these, Inception's in one pass; where one cannot be had, it says why.

    Examples:

    \b
      rae eval all samples.npz --ref adm_ref.npz --out report.json
      rae eval all sample_features.npz --ref reference_features.npz --json
    """,
}


WITHOUT_EFFECT = {  # options of one metric that its help leaves out: all metrics have one signature
    "fid": ("dinov2", "pr_precision"),
    "sfid": ("dinov2", "features", "pr_precision"),
    "is": ("reference", "dinov2", "features", "pr_precision"),
    "precision-recall": ("dinov2",),
    "kid": ("dinov2", "pr_precision"),
    "fdd": ("inception", "features", "pr_precision"),
}


def hidden(annotation: Any) -> Any:
    """The same option, not shown in the help."""
    kind, option = get_args(annotation)
    option = copy.copy(option)
    option.hidden = True
    return Annotated[kind, option]


def measuring(name: str, metrics: tuple[str, ...]) -> Callable[..., None]:
    """The command that measures `metrics`: all of them have one signature."""

    def command(
        samples: SamplesArg,
        reference: ReferenceOpt = None,
        inception: InceptionOpt = None,
        dinov2: Dinov2Opt = None,
        features: FeaturesOpt = None,
        pr_precision: PrPrecisionOpt = "both",
        batch_size: BatchSizeOpt = 64,
        as_json: JsonOpt = False,
        out: OutOpt = None,
        devices: DevicesOpt = None,
        nnodes: NnodesOpt = 1,
        node_rank: NodeRankOpt = 0,
        rdzv: RdzvOpt = None,
        dry_run: DryRunOpt = False,
    ) -> None:
        from raecli.launch import LaunchOptions
        from raecli.recipe.load import recipe_from_options
        from raecli.recipe.recipes import EvaluateRecipe

        check_sides(name, samples, reference)
        check_networks(metrics, samples, inception, features)
        recipe = recipe_from_options(
            EvaluateRecipe,
            {
                "stage": "eval",
                "metrics": metrics,
                "optional": name == "all",
                "samples": samples,
                "reference": reference,
                "inception": inception,
                "dinov2": dinov2,
                "features": features,
                "pr_precision": pr_precision,
                "batch_size": batch_size,
                "output": out,
                "print_json": as_json,
            },
        )
        launch(recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS), dry_run)

    for option in WITHOUT_EFFECT.get(name, ()):
        command.__annotations__[option] = hidden(command.__annotations__[option])
    return command


for _name in (*EVERY, "all"):
    app.command(_name, help=HELP[_name])(measuring(_name, EVERY if _name == "all" else (_name,)))


@app.command("accuracy")
def accuracy(
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="Folder of rae sample, class folders, .npz with arr_0, or tars.")
    ],
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

    Examples:

    \b
      rae eval accuracy samples/ --classifier judge.safetensors
    """
    from raecli.launch import LaunchOptions
    from raecli.recipe.load import recipe_from_options
    from raecli.recipe.recipes import EvaluateRecipe

    require_paths(samples, classifier)
    recipe = recipe_from_options(
        EvaluateRecipe,
        {
            "stage": "eval",
            "metrics": ("accuracy",),
            "samples": samples,
            "classifier": classifier,
            "batch_size": batch_size,
            "output": out,
            "print_json": as_json,
        },
    )
    launch(recipe, LaunchOptions(devices, nnodes, node_rank, rdzv, COLLECTIVE_SECONDS), dry_run)


for _what, _help in evaluate_write.HELP.items():
    app.command(_what, help=_help)(evaluate_write.writing(_what))
app.command("compare")(evaluate_compare.compare)


def check_sides(name: str, samples: str, reference: str | None) -> None:
    """Refuse what is not there, or a reference that nobody named."""
    from raecli.errors import UsageError

    if reference is None and name != "is":
        raise UsageError(f"rae eval {name} needs a reference: --ref REF, a folder of images, features or statistics")
    require_paths(samples, *([reference] if reference else []))


def check_networks(metrics: tuple[str, ...], samples: str, inception: str | None, features: str | None) -> None:
    """Refuse networks that exclude one another, and Inception without weights where samples have to pass it."""
    from raecli.errors import UsageError
    from raecli.metrics.inception_file import find_inception

    if inception and features:
        raise UsageError("--inception and --features exclude one another: FID is measured in one network")
    if features and features.endswith(".safetensors"):
        require_paths(features)
    images = not samples.endswith(".npz")  # an .npz may hold features; the workers look
    if metrics != ("fdd",) and not features and (images or inception):
        find_inception(inception)  # refuses before anything is started; the workers find it again


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
    start("eval", recipe, options, dry_run=dry_run, as_json=recipe.print_json)


app.command("reconstruction")(evaluate_reconstruction.reconstruction)
app.command("probe")(latent_probe.probe)
app.command("tsne")(latent_probe.tsne)
list_whole_sentences(app)

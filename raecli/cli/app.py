"""All verbs of `rae`. Nothing here or in a verb's file imports torch or pydantic before it has work to do."""

from typing import Annotated

import typer

from raecli import __version__
from raecli.cli import (
    convert,
    doctor,
    encode_cache,
    evaluate,
    fetch,
    flops,
    inspect,
    overfit_toy,
    plot,
    recipes,
    reconstruct,
    report,
    sample,
    train,
    verify,
)
from raecli.cli.options import CONTEXT, list_whole_sentences

app = typer.Typer(
    name="rae",
    help="Representation Autoencoders, and the diffusion transformers trained on them.\n\n"
    "images -> encode-cache -> train-decoder, train-diffusion -> sample -> eval\n\n"
    "Examples:\n\n"
    "  rae encode-cache --encoder dinov2-b imagenet/ latents/\n\n"
    "  rae train-diffusion recipes/dith_xl.yaml\n\n"
    "  rae eval fid samples/ --ref adm_ref.npz\n\n"
    "  rae overfit-toy --width 384..896",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"rae {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""


app.command("encode-cache")(encode_cache.encode_cache)
app.command("verify")(verify.verify)
app.command("train-decoder")(train.train_decoder)
app.command("train-diffusion")(train.train_diffusion)
app.command("sample")(sample.sample)
app.command("reconstruct")(reconstruct.reconstruct)
app.add_typer(evaluate.app, name="eval", short_help="Measure samples against a reference, as the ADM evaluator does.")
app.command("overfit-toy")(overfit_toy.overfit_toy)
app.command("plot")(plot.plot)
app.command("report")(report.report)
app.command("convert")(convert.convert)
app.command("fetch")(fetch.fetch)
app.add_typer(recipes.app, name="recipes")
app.command("flops")(flops.flops)
app.command("doctor")(doctor.doctor)
app.command("inspect")(inspect.inspect)
list_whole_sentences(app)

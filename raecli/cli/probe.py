"""`rae eval probe` and `rae eval tsne`: what cached latents tell of classes."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from raecli.cli.options import JsonOpt

LatentsArg = Annotated[str, typer.Argument(metavar="LATENTS", help="A latent cache, of images with classes.")]


def probe(
    latents: LatentsArg,
    val: Annotated[
        str | None,
        typer.Option("--val", metavar="LATENTS", help="Cache to judge on [default: a fifth of the first, held out]."),
    ] = None,
    features: Annotated[
        Literal["pooled", "tokens"], typer.Option("--features", help="The mean of an image's tokens, or all of them.")
    ] = "pooled",
    seed: Annotated[int, typer.Option("--seed", help="Of the split.", min=0)] = 0,
    iterations: Annotated[int, typer.Option("--iterations", help="Of L-BFGS, at most.", min=1)] = 100,
    as_json: JsonOpt = False,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write the report there, as JSON.")] = None,
) -> None:
    """Linear probe: top-1 accuracy of logistic regression on cached latents (Table 1d).

    All samples at once by L-BFGS on standardised features; the L2 weight is the best of six on held-out samples.

    Examples:

    \b
      rae eval probe latents/train --val latents/val
      rae eval probe latents/digits --features tokens --json
    """
    require_folder(out)
    from raecli.evaluation.probe import probe as measure
    from raecli.store.atomic import write_json

    report = measure(latents, val, features, seed, iterations)
    if out:
        write_json(Path(out), report)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    low, high = report["interval_95"]
    typer.echo(f"top-1 accuracy  {report['accuracy']:.2%}  ({report['correct']} of {report['count']})")
    typer.echo(f"95 % interval   {low:.2%} to {high:.2%}")
    typer.echo(f"train accuracy  {report['train_accuracy']:.2%} of {report['train_count']}")
    typer.echo(f"features        {features}, {report['dimension']}; {report['classes']} classes; L2 {report['l2']:g}")
    typer.echo(f"judged on       {report['val']}")


def tsne(
    latents: LatentsArg,
    out: Annotated[str, typer.Argument(metavar="OUT.png", help="The picture.")],
    per_class: Annotated[int, typer.Option("--per-class", help="Images of a class.", min=1)] = 50,
    classes: Annotated[int, typer.Option("--classes", help="Classes at most.", min=2)] = 100,
    perplexity: Annotated[float, typer.Option("--perplexity", help="t-SNE's: about how many near ones count.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice and of t-SNE.", min=0, max=2**32 - 1)] = 0,
    as_json: JsonOpt = False,
) -> None:
    """Picture of cached latents by t-SNE, pooled tokens, a colour a class (Figure 17).

    Examples:

    \b
      rae eval tsne latents/digits tsne.png
    """
    require_folder(out)
    from raecli.evaluation.tsne import tsne as draw

    report = draw(latents, out, per_class, classes, perplexity, seed)
    line = f"{out}: {report['samples']} images of {report['classes']} classes, perplexity {perplexity:g}, seed {seed}"
    typer.echo(json.dumps(report, indent=2) if as_json else line)


def require_folder(out: str | None) -> None:
    """Refuse an output file in a folder that is not there, or that this user cannot write to."""
    from raecli.errors import UsageError
    from raecli.store.room import check_output

    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UsageError(f"{out}: no such folder to write in; make it first")
    if out is not None:
        check_output(out)

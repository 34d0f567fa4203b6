"""The claims on the digits as a table. Reads what claims.sh wrote in RUN; writes RUN/report.json: claims.py RUN."""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from raecli.errors import InputError, RaeError
from raecli.store.atomic import write_json

MODELS = {  # recipe: what it is, in the order of the table
    "diffusion_fast": "DiT d = 96 > n, depth 4, alpha 2",
    "diffusion_narrow": "DiT d = 24 < n, depth 4",
    "diffusion_narrow_deep": "DiT d = 24 < n, depth 12",
    "diffusion_dh": "DiT-DH 24, head 96 x 2",
    "diffusion_dh_narrow": "DiT-DH 24, head 24 x 2",
    "diffusion_shift1": "DiT d = 96, alpha 1",
    "diffusion_shift4": "DiT d = 96, alpha 4",
}
DECODERS = {"decoder_tau0": "tau 0", "decoder": "tau .3", "decoder_tau08": "tau .8"}
SAMPLED = re.compile(rf"({'|'.join(MODELS)})-(\d+)-({'|'.join(DECODERS)})-fid\.json")


def read_json(path: Path) -> dict[str, Any]:
    """A report of rae eval."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole report ({error}); remove it and run claims.sh again") from None


def model_rows(run: Path) -> list[dict[str, Any]]:
    """One row for each recipe and decoder that was judged: means over its seeds."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for path in sorted(run.glob("*-fid.json")):
        if match := SAMPLED.fullmatch(path.name):
            model, seed, decoder = match.groups()
            accuracy = read_json(Path(str(path).replace("-fid.json", "-accuracy.json")))["accuracy"]
            last = (run / f"{model}-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]
            figures = (json.loads(last)["loss"], accuracy, read_json(path)["fid"])
            found.setdefault((model, decoder), []).append(figures)
    order = {name: place for place, name in enumerate([*MODELS, *DECODERS])}
    rows = []
    for (model, decoder), seeds in sorted(found.items(), key=lambda item: [order[name] for name in item[0]]):
        loss, accuracy, distance = (fmean(values) for values in zip(*seeds, strict=True))
        rows.append({"model": model, "decoder": decoder, "seeds": len(seeds)})
        rows[-1] |= {"last_loss": loss, "accuracy": accuracy, "fid": distance, "fids": [row[2] for row in seeds]}
    return rows


def decoder_rows(run: Path) -> list[dict[str, Any]]:
    """Reconstruction of the test split by each decoder that was trained."""
    return [
        {"decoder": name, **{key: read_json(run / f"{name}.json")[key] for key in ("rfid", "psnr")}}
        for name in DECODERS
        if (run / f"{name}.json").is_file()
    ]


def print_tables(models: list[dict[str, Any]], decoders: list[dict[str, Any]]) -> None:
    """Both for a person."""
    print(f"{'model':<36}{'decoder':<9}{'seeds':>6}{'last loss':>11}{'as asked for':>14}{'FD to train':>13}")
    for row in models:
        name, decoder = MODELS[row["model"]], DECODERS[row["decoder"]]
        figures = f"{row['last_loss']:>11.3f}{row['accuracy']:>14.1%}{row['fid']:>13.1f}"
        print(f"{name:<36}{decoder:<9}{row['seeds']:>6}{figures}")
    print(f"\n{'decoder':<36}{'rFD to test':>15}{'PSNR':>11}")
    for row in decoders:
        print(f"{DECODERS[row['decoder']]:<36}{row['rfid']:>15.2f}{row['psnr']:>8.2f} dB")
    print("\nlosses of different alpha are not to be compared; FD: Frechet distance in the judge's features")


def main(arguments: list[str] | None = None) -> int:
    """Command line: claims.py RUN."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args(arguments).run
    try:
        models, decoders = model_rows(run), decoder_rows(run)
        if not models:
            raise InputError(f"{run}: no judged samples here; run bash shell/digits/claims.sh width")
    except RaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print_tables(models, decoders)
    write_json(run / "report.json", {"models": models, "decoders": decoders})
    return 0


if __name__ == "__main__":
    sys.exit(main())

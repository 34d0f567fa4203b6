#!/usr/bin/env bash
# The whole of rae on real images, offline, on a CPU: every verb on scikit-learn's handwritten digits.
# About 6 minutes on two cores after the installation; --fast: half the diffusion steps.
# Ends with runs/digits/picture.png and runs/digits/report.json. Run again, it goes on where it was stopped.
set -euo pipefail
source "$(dirname "$0")/setup.sh" demo

recipe=digits/diffusion
[ "${1:-}" != --fast ] || recipe=digits/diffusion_fast
data=data/digits run=runs/digits
judge=$run/judges/judge.safetensors
started=$SECONDS

step() { printf '\n== %s\n' "$1"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}

step "1 of 8: 1797 real digits, 32 x 32, as PNG class folders; two classifiers to judge by"
run python shell/digits/data.py $data
[ -f $run/judges/judges.json ] || run python shell/digits/train_judges.py $data $run/judges

step "2 of 8: images to latents, by the embedded encoder (a small MAE)"
run rae encode-cache --encoder digits-mae --dtype fp32 $data/train latents/digits

step "3 of 8: a decoder back to pixels"
run rae train-decoder digits/decoder validation.images=$data/test validation.features=$judge
run rae reconstruct $data/test $run/reconstructions --autoencoder $run/decoder
run rae eval reconstruction $data/test $run/reconstructions --metrics rfid,psnr,ssim --features $judge \
    --out $run/eval_reconstruction.json

step "4 of 8: a diffusion transformer on the latents (beside it, on the other core: Theorem 1 on a toy)"
printf '$ rae overfit-toy --preset tiny --out %s/toy\n' $run
rae overfit-toy --preset tiny --out $run/toy >$run/toy.txt 2>$run/toy.log &
toy=$!
trap 'kill $toy 2>/dev/null || true' EXIT
run rae train-diffusion $recipe output=$run/diffusion
run rae train-diffusion $recipe output=$run/untrained "duration=0 steps"

step "5 of 8: noise to images, 40 of each class"
run rae sample $run/diffusion $run/samples --autoencoder $run/decoder --num 400 --guidance-scale 1.5
run rae sample $run/untrained $run/samples_untrained --autoencoder $run/decoder --num 400

step "6 of 8: are they what was asked for, and how near are they to real digits?"
run rae eval accuracy $run/samples --classifier $judge --out $run/eval_accuracy.json
run rae eval fid $run/samples --ref $data/train --features $judge --out $run/eval_fid.json
run rae eval fid $data/test --ref $data/train --features $judge --out $run/eval_fid_floor.json
run rae eval fid $run/samples_untrained --ref $data/train --features $judge --out $run/eval_fid_untrained.json

step "7 of 8: Theorem 1: a transformer narrower than a token cannot fit even one image"
wait $toy || {
    cat $run/toy.log >&2
    exit 1
}
trap - EXIT
cat $run/toy.txt

step "8 of 8: figures ($((SECONDS - started)) s so far)"
run python shell/digits/report.py $run --data $data
cat <<END

Open $run/picture.png: real digits, their reconstructions, and generated ones.
To go on:  source ${RAE_VENV:-.venv}/bin/activate
           rae inspect $run              # what was made
           rae report $run/diffusion     # one page about a run
           rae --help                           # your own images: docs/own_data.md
END

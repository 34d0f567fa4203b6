#!/usr/bin/env bash
# The paper's claims on real images, small, on a CPU: claims.sh width | shift | noise | all.
#   width  a DiT narrower (24) than a token (32 channels) fails; more depth does not mend it, a wide head does
#   shift  the time shift of high-dimensional latents: alpha 1, 2, 4
#   noise  decoders trained with noise on their latents: tau 0, .3, .8
# Each model 1500 steps of batch 64, 400 samples of 50 Euler steps, no guidance, judged by a classifier that no loss
# saw. SEEDS="0 1" trains every diffusion model from each seed. About 2 minutes of CPU a model and seed; a table at the
# end and in runs/claims/report.json. Run again, it goes on where it was stopped.
set -euo pipefail
claim=${1:-}
case $claim in
width | shift | noise | all) ;;
*)
    echo "usage: [SEEDS=\"0 1\"] bash shell/digits/claims.sh width|shift|noise|all" >&2
    exit 2
    ;;
esac
source "$(dirname "$0")/../setup.sh" demo

seeds=${SEEDS:-0}
data=data/digits run=runs/claims judges=runs/digits/judges
judge=$judges/judge.safetensors

run() {
    printf '$ %s\n' "$*"
    "$@"
}

prepare() {
    run python shell/digits/data.py $data
    [ -f $judges/judges.json ] || run python shell/digits/train_judges.py $data $judges
    run rae encode-cache --encoder digits-mae --dtype fp32 $data/train latents/digits
    mkdir -p $run
}

decode_with() { # RECIPE: a decoder, and the Frechet distance of its reconstructions of the test split
    local decoder=$run/$1
    run rae train-decoder "digits/$1" output="$decoder"
    [ -f "$decoder.json" ] || {
        run rae reconstruct $data/test "$decoder-reconstructions" --autoencoder "$decoder"
        run rae eval reconstruction $data/test "$decoder-reconstructions" --features $judge --metrics rfid,psnr --out "$decoder.json"
    }
}

judge_model() { # RECIPE DECODER: train from each seed, sample, judge
    local seed samples
    for seed in $seeds; do
        run rae train-diffusion "digits/$1" output="$run/$1-$seed" seed="$seed"
        samples=$run/$1-$seed-$2
        [ -f "$samples-fid.json" ] || {
            run rae sample "$run/$1-$seed" "$samples" --autoencoder "$run/$2" --num 400 --seed "$seed"
            run rae eval accuracy "$samples" --classifier $judge --out "$samples-accuracy.json"
            run rae eval fid "$samples" --ref $data/train --features $judge --out "$samples-fid.json"
        }
    done
}

width() {
    decode_with decoder
    for model in diffusion_fast diffusion_narrow diffusion_narrow_deep diffusion_dh diffusion_dh_narrow; do
        judge_model $model decoder
    done
}

shift_time() {
    decode_with decoder
    for model in diffusion_shift1 diffusion_fast diffusion_shift4; do
        judge_model $model decoder
    done
}

noise() {
    for decoder in decoder_tau0 decoder decoder_tau08; do
        decode_with $decoder
        judge_model diffusion_fast $decoder
    done
}

prepare
case $claim in
width) width ;;
shift) shift_time ;;
noise) noise ;;
all)
    width
    shift_time
    noise
    ;;
esac
run python shell/digits/claims.py $run

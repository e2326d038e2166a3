#!/bin/bash
# {autoregressive, masked, scratch, stock} x {Primus, ResEnc} on Hippocampus: every line that makes the table, in order. Type any of them
# again at any time: what is there is kept. FOLDER is new or an earlier one of this script; nnU-Net's three folders are in the environment.
#
#     bash benchmarks/encoders.sh FOLDER pretrain       500 steps of 8 crops of the pool's scans
#     bash benchmarks/encoders.sh FOLDER development    choices of order and rate, 20 labels, one seed, the development split
#     bash benchmarks/encoders.sh FOLDER test           the table, with what was chosen
#     bash benchmarks/encoders.sh FOLDER stock          its last arm, which takes as long as all others together
#
# Then append the lines: cat FOLDER/runs.jsonl >> benchmarks/results/encoders.jsonl
set -eu
FOLDER=$1
WHAT=$2
DEVICE=${DEVICE:-cpu}
STEPS=${STEPS:-150}
PRIMUS_RECIPE=${PRIMUS_RECIPE:-pretrained_rate=3e-3 scratch_rate=3e-3}
RESENC_RECIPE=${RESENC_RECIPE:-optimizer=adamw weight_decay=0.05 pretrained_rate=1e-3 scratch_rate=1e-3}
JOBS=${JOBS:-1}

benchmark() {
    autoreg_benchmark -d 4 --steps "$STEPS" --batch 2 --device "$DEVICE" --jobs "$JOBS" -o "$FOLDER" "$@"
}

pretrain() {
    autoreg_pretrain -d 4 --steps 500 --batch 8 --device "$DEVICE" --exclude "$FOLDER/exclude.txt" "$@"
}

RANDOM_ORDER=(sequence.order=random sequence.predictor=query)
RASTER_ORDER=(sequence.order=raster sequence.predictor=next)

# shellcheck disable=SC2086 # recipes are words
case $WHAT in
pretrain)
    benchmark --dry-run
    pretrain --name primus_random --encoder primus_tiny --set "${RANDOM_ORDER[@]}"  # its order was chosen by few_label.py
    pretrain --name resenc_random --encoder resenc_tiny --set "${RANDOM_ORDER[@]}"
    pretrain --name resenc_raster --encoder resenc_tiny --set "${RASTER_ORDER[@]}"
    ;;
development)
    once() { benchmark --split development --labels 20 --seeds 1 "$@"; }
    once --weights primus_random --arms pretrained scratch --recipe $PRIMUS_RECIPE
    once --weights resenc_raster --arms scratch     # with the recipe as it is planned: SGD at nnU-Net's rate
    once --weights resenc_raster --arms pretrained scratch --recipe $RESENC_RECIPE
    once --weights resenc_random --arms pretrained --recipe $RESENC_RECIPE
    ;;
test)
    for seeds in 1 2 3; do         # seed by seed, so that whole comparisons are there early
        benchmark --weights resenc_raster --arms pretrained masked scratch --labels 5 20 --seeds $seeds --recipe $RESENC_RECIPE
        benchmark --weights primus_random --arms pretrained masked scratch --labels 5 20 --seeds $seeds --recipe $PRIMUS_RECIPE
    done
    ;;
stock)
    benchmark --arms stock --labels 5 20
    ;;
*)
    echo "say pretrain, development, test or stock" >&2
    exit 2
    ;;
esac

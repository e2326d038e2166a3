#!/bin/bash
# {autoregressive, masked, scratch, stock} x {Primus, ResEnc} on Hippocampus: every line that makes the table, in order. Type any of them
# again at any time: what is there is kept. FOLDER is new or an earlier one of this script; nnU-Net's three folders are in the environment.
#
#     bash benchmarks/encoders.sh FOLDER measure        the four pretrainings, plans, and seconds a step of each network
#     bash benchmarks/encoders.sh FOLDER development    choices: rates by encoder, 20 labels, one seed, the development split (19 trainings)
#     bash benchmarks/encoders.sh FOLDER test           the table, with the rates chosen: 42 trainings
#
# Then append the lines: cat FOLDER/runs.jsonl >> benchmarks/results/encoders.jsonl
set -eu
FOLDER=$1
WHAT=$2
MINUTES=${MINUTES:-4.5}            # of training; a run with its validation stays below 6
PRIMUS_RATES=${PRIMUS_RATES:-pretrained_rate=3e-3 scratch_rate=3e-3}
RESENC_RATES=${RESENC_RATES:-pretrained_rate=1e-2 scratch_rate=1e-2}
ARMS=(pretrained masked scratch)

benchmark() {
    autoreg_benchmark -d 4 --pretrain-steps 500 --pretrain-batch 8 --batch 2 --budget "$MINUTES" --device "${DEVICE:-cpu}" -o "$FOLDER" "$@"
}

case $WHAT in
measure)                           # of all networks at once: the budget is settled here, for every line below
    benchmark --encoders primus_tiny resenc_tiny --arms "${ARMS[@]}" stock --labels 5 20 --measure
    ;;
development)
    for rate in 1e-3 3e-3 1e-2; do
        for encoder in primus_tiny resenc_tiny; do
            benchmark --encoders $encoder --arms "${ARMS[@]}" --labels 20 --seeds 1 --split development \
                --recipe pretrained_rate=$rate scratch_rate=$rate
        done
    done
    benchmark --arms stock --labels 20 --seeds 1 --split development
    ;;
test)
    for seeds in 1 2 3; do         # seed by seed, so that whole comparisons are there early
        # shellcheck disable=SC2086
        benchmark --encoders primus_tiny --arms "${ARMS[@]}" --labels 5 20 --seeds $seeds --recipe $PRIMUS_RATES
        # shellcheck disable=SC2086
        benchmark --encoders resenc_tiny --arms "${ARMS[@]}" --labels 5 20 --seeds $seeds --recipe $RESENC_RATES
        benchmark --arms stock --labels 5 20 --seeds $seeds
    done
    ;;
*)
    echo "say measure, development or test" >&2
    exit 2
    ;;
esac

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
# Of every training. The default gives all arms the steps that stock makes in 4.5 minutes, on one CPU core about 75: too few to tell Primus
# from Primus. LENGTH="--steps 300" takes its twins 2 minutes and those of ResEnc 5 to 6, but stock 13 to 15.
LENGTH=${LENGTH:---budget 4.5}
STOCK_LENGTH=${STOCK_LENGTH:-$LENGTH}
PRIMUS_RATES=${PRIMUS_RATES:-pretrained_rate=3e-3 scratch_rate=3e-3}
RESENC_RATES=${RESENC_RATES:-pretrained_rate=1e-2 scratch_rate=1e-2}
ARMS=(pretrained masked scratch)

benchmark() {
    autoreg_benchmark -d 4 --pretrain-steps 500 --pretrain-batch 8 --batch 2 --device "${DEVICE:-cpu}" -o "$FOLDER" "$@"
}

case $WHAT in
measure)                           # of all networks at once: a budget of 4.5 minutes is settled here, for every line below
    benchmark --encoders primus_tiny resenc_tiny --arms "${ARMS[@]}" stock --labels 5 20 --budget 4.5 --measure
    ;;
development)
    for rate in 1e-3 3e-3 1e-2; do
        for encoder in primus_tiny resenc_tiny; do
            # shellcheck disable=SC2086
            benchmark --encoders $encoder --arms "${ARMS[@]}" --labels 20 --seeds 1 --split development $LENGTH \
                --recipe pretrained_rate=$rate scratch_rate=$rate
        done
    done
    # shellcheck disable=SC2086
    benchmark --arms stock --labels 20 --seeds 1 --split development $STOCK_LENGTH
    ;;
test)
    for seeds in 1 2 3; do         # seed by seed, so that whole comparisons are there early
        # shellcheck disable=SC2086
        benchmark --encoders primus_tiny --arms "${ARMS[@]}" --labels 5 20 --seeds $seeds $LENGTH --recipe $PRIMUS_RATES
        # shellcheck disable=SC2086
        benchmark --encoders resenc_tiny --arms "${ARMS[@]}" --labels 5 20 --seeds $seeds $LENGTH --recipe $RESENC_RATES
        # shellcheck disable=SC2086
        benchmark --arms stock --labels 5 20 --seeds $seeds $STOCK_LENGTH
    done
    ;;
*)
    echo "say measure, development or test" >&2
    exit 2
    ;;
esac

#!/bin/bash
# Pretrained against scratch classification, five folds, on a CPU: every command that makes the
# lines of kind "tuned" in benchmarks/results/classification.jsonl. Type it again to go on: finished
# folds are kept. nnU-Net's three folders are in the environment.
#
#     python benchmarks/classification_data.py --raw SOURCES --out "$nnUNet_raw"
#     bash benchmarks/classification.sh acdc
#     bash benchmarks/classification.sh lidc
#     bash benchmarks/classification.sh ixi
set -eu
SET=$1
HERE=$(cd "$(dirname "$0")" && pwd)
RESULTS=${RESULTS:-$HERE/results/classification.jsonl}
STEPS=${STEPS:-200}
EPOCHS=${EPOCHS:-8}
export OMP_NUM_THREADS=1 nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1

# Coarse voxels, so that one patch holds nearly the whole scan and a fold takes minutes.
case $SET in
acdc) NUMBER=701 NAME=ACDC100 SPACING="10 5 5" ;;
lidc) NUMBER=702 NAME=LIDC SPACING="1.5 1 1" ;;
ixi) NUMBER=703 NAME=IXI SPACING="6 6 6" ;;
esac

WEIGHTS=cls_$SET
if [ ! -f "$nnUNet_results/autoreg_pretraining/$WEIGHTS/encoder.json" ]; then
    autoreg_pretrain -d $NUMBER --name "$WEIGHTS" --encoder resenc_tiny --steps "$STEPS" --batch 4 \
        --spacing "${SPACING// /,}" --device cpu
fi

export autoreg_weights=$WEIGHTS
FOLDER=$nnUNet_preprocessed/Dataset${NUMBER}_$NAME
if [ ! -d "$FOLDER/AutoregPlans_3d_fullres" ]; then
    # shellcheck disable=SC2086 # a spacing is three words
    nnUNetv2_plan_and_preprocess -d $NUMBER -pl AutoregPlanner -c 3d_fullres -np 1 -npfp 1 \
        -overwrite_target_spacing $SPACING
    python "$HERE/classification.py" plan --preprocessed "$FOLDER" --epochs "$EPOCHS" --batch 4 \
        --rate 1e-3
fi

MODELS=$nnUNet_results/Dataset${NUMBER}_$NAME
for FOLD in 0 1 2 3 4; do
    for ARM in "" Scratch; do
        TRAINER=AutoregClassification${ARM}Trainer
        DONE=$MODELS/${TRAINER}__AutoregPlans__3d_fullres/fold_$FOLD
        if [ ! -f "$DONE/validation/summary.json" ]; then
            nnUNetv2_train $NUMBER 3d_fullres $FOLD -tr "$TRAINER" -p AutoregPlans -device cpu
        fi
    done
done

python "$HERE/classification.py" tuned --set "$SET" --dataset "$nnUNet_raw/Dataset${NUMBER}_$NAME" \
    --pretrained "$MODELS/AutoregClassificationTrainer__AutoregPlans__3d_fullres" \
    --scratch "$MODELS/AutoregClassificationScratchTrainer__AutoregPlans__3d_fullres" \
    --results "$RESULTS"

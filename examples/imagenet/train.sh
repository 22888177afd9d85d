#!/bin/bash
# One machine: every GPU of it (or PROCESSES=n) trains ResNet-50 on DATA. Called again it goes on where it was stopped.
#   DATA=/data/imagenet RUN=runs/imagenet examples/imagenet/train.sh [more options of robustfast train]
set -e
: "${DATA:?expected the folder that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG}" "${RUN:=runs/imagenet}"
source "$(dirname "$0")/settings.sh"
torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m robustfast train "${SETTINGS[@]}" "$@"

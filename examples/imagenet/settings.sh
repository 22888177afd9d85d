# What train.sh and train.sbatch have in common: SETTINGS, the options of robustfast train. A run that has begun keeps its own.
if [ -e "$RUN/state.safetensors" ]; then
  SETTINGS=(--resume --out "$RUN")
else
  SETTINGS=(
    --out "$RUN" --data "folder:$DATA" --size 224 --workers "${WORKERS:-8}"
    --model torchvision.models:resnet50 --inter-dim 512
    --method discriminative --sigma 0.06 --noise-view independent --delta-dist 5
    --epochs 90 --batch-size 1024 --lr 0.4 --weight-decay 1e-4 --schedule cosine --warmup 5
    --label-smoothing 0.1 --ema 0.9998 --amp bf16 --flip --validation 0.02 --test-draws 1
  )
fi

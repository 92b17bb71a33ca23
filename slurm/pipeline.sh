#!/bin/bash
# The whole chain as plain sbatch calls: what `skinsynth launch cluster=slurm` does, told as a story. Read it, copy it, change it.
#
#   slurm/pipeline.sh configs/isic2020-sd15.yaml runs/isic
#
# All its jobs have one name, made of the run's path. While one of them is in the queue, the script refuses to submit them again.
set -euo pipefail
config=$1 run=$2

name="$(basename "${run//,/-}")-$(realpath -m "$run" | cksum | cut -d ' ' -f 1)"
queued=$(squeue --noheader --name="$name" --format=%A | sort -nu | xargs)
if [ -n "$queued" ]; then
  echo "jobs of $run are in the queue already: $queued. Wait for them, or take them back first: scancel --name=$name" >&2
  exit 1
fi

# The run folder with the resolved configuration; the jobs read that and nothing else.
skinsynth config "$config" run="$run" --write

# Each call prints the job's number. A stage starts when those it needs ended well; if one fails, Slurm cancels what waits for it.
# Start the script again after mending: a stage that is done ends at once, one that was begun goes on.
submit() {
  sbatch --parsable --job-name="$name" --kill-on-invalid-dep=yes "$@"
}

# Unit stages: independent tasks, each with its share of the output shards; any number gives the same files.
prepare=$(submit --array=0-7 slurm/stage.sbatch prepare "$run")
encode=$(submit --array=0-3 --gpus-per-node=1 --dependency="afterok:$prepare" slurm/stage.sbatch encode "$run")

# A step stage: one gang, one task per GPU, over two nodes. On a signal all ranks agree on a step, save, and the job asks for another turn.
finetune=$(submit --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=08:00:00 --dependency="afterok:$encode" slurm/stage.sbatch finetune "$run")

# Hundreds of thousands of images: a wide array, throttled so that others can work too.
generate=$(submit --array=0-31%16 --gpus-per-node=1 --dependency="afterok:$finetune" slurm/stage.sbatch generate "$run")
screen=$(submit --array=0-7 --gpus-per-node=1 --dependency="afterok:$generate" slurm/stage.sbatch screen "$run")

# The two arms side by side. The baseline sees real images only, so it need not wait for the synthetic ones.
baseline=$(submit --ntasks-per-node=4 --gpus-per-node=4 --dependency="afterok:$prepare" slurm/stage.sbatch classify "$run" baseline)
hybrid=$(submit --ntasks-per-node=4 --gpus-per-node=4 --dependency="afterok:$screen" slurm/stage.sbatch classify "$run" hybrid)

report=$(submit --dependency="afterok:$baseline:$hybrid:$screen" slurm/stage.sbatch report "$run")
echo "submitted: prepare $prepare, encode $encode, finetune $finetune, generate $generate, screen $screen, classify $baseline $hybrid, report $report"
echo "see them with: squeue --me; skinsynth status $run"

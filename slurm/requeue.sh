# Sourced by a batch script after its srun: `code=$?; source slurm/requeue.sh FAILED || exit $code`. Asks Slurm for another turn of this job
# when the work was stopped by a signal and saved (75), or when a process was killed (128 and more: a lost rank, no memory). A stage that
# failed by itself has written the file FAILED (- for a stage of one process, whose status 1 says it), and gets no other turn.
another_turn() { # a controller that a thousand tasks ask at once, at their time limit, may not answer the first time
  for pause in 5 10 20 30 0; do
    if state=$(squeue --noheader --jobs="$1" --format=%T); then
      [ "$state" = RUNNING ] || return 1 # it is being cancelled, or requeued already
      echo "the step ended with status $code: asking Slurm to run job $1 again"
      scontrol requeue "$1" && return 0
    fi
    sleep "$pause"
  done
  return 1
}
if [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then
  id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
  if [ ! -e "$1" ] && another_turn "${id:-$SLURM_JOB_ID}"; then
    sleep 60 # until Slurm ends this script
  fi
fi
exit "$code"

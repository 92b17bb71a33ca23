# Sourced by every job before its work starts: the one place for what your site needs. Keep it quick: it runs on each node.

# module load cuda/12.4 apptainer
# source "$HOME/miniforge3/bin/activate" skinsynth

# Compute nodes have no internet: models are read from the cache that `skinsynth pull CONFIG` filled on the login node.
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
# export HF_HOME="$SCRATCH/huggingface"

# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

export PYTHONUNBUFFERED=1

# Sourced by every job before its work starts: the one place for what your site needs. Keep it quick: it runs on each node.

# module load apptainer             # no CUDA module: the libraries come with torch, the driver from the node
# source "$HOME/miniforge3/bin/activate" skinsynth

# Compute nodes have no internet: models are read from the cache that `skinsynth pull CONFIG` filled on the login node.
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
# export HF_HOME="$SCRATCH/huggingface"

# The network that the ranks of a gang talk over: NCCL for gradients, gloo for flags. Gloo takes the interface that the node's hostname resolves
# to, which may be one that other nodes do not reach (127.0.1.1, a management network).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=WARN

export PYTHONUNBUFFERED=1

# What the launch scripts here set for torchrun, and why; a value that is there already stays. Sourced, not run.
# What each rank needs for CUDA and NCCL the program sets itself: see dapo/mesh.py. A cluster's own (NCCL_SOCKET_IFNAME,
# NCCL_IB_HCA, GLOO_SOCKET_IFNAME …) are passed on to ranks and servers as they are.

# threads of a rank's CPU work: unset, torchrun would allow one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# seconds that torchrun leaves its ranks to save after Ctrl-C or SIGTERM; its own default is 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

"""kd_dist: offline knowledge distillation on many GPUs, two jobs and one HDF5 file of soft labels between them."""

"""The processes of a run, one a device, under `torch.distributed`: rank 0 drives, others serve."""

"""Where runs are done: on this machine, or elsewhere; another place is one file and one row of `registry`."""

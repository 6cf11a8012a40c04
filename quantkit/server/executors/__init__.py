"""Where runs are done: on this machine, or elsewhere. `registry` knows which places there are."""

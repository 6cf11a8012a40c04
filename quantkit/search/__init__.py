"""EvoPress: which type every tensor gets, by the KL divergence of the whole model."""

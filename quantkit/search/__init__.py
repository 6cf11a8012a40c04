"""EvoPress: choose the type of every tensor by the KL divergence of the whole model.

    database     every way to store every tensor       allocation   a choice for every tensor
    propose      estimated costs, knapsack             mutate       what else children try
    evopress     generations and races                 learn        what children tell of the costs
    fitness      KL on a device                        workers      the same on several
    optimizer    the seam: Evaluator, Problem, Step, Optimizer

Another optimizer needs `allocation`, `propose` and `optimizer`; the rest is EvoPress's own.
"""

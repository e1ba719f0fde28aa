"""Language spaces: estimate, subspace, distance, layer area, save and load.

This room knows tensors, not models: :mod:`shifcon_fast.modeling.estimate_space` feeds it.
"""

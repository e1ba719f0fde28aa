"""Triton kernels, one file per operator; installed as ``shifcon_fast.kernels``. Imports torch and triton only.

Every file reads top to bottom: the formula with its shapes, the kernels, then the launchers with their heuristic
table. The launchers take and return plain tensors; schemas, validation and autograd live with the caller.
"""

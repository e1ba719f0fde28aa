"""Exports of a run to places that do not run this package, one file per target (docs/serving.md).

Boundary k is the residual stream entering block k, which is the output of block k-1. What the shift adds there to
every token of a language is one vector, so each target needs only a place for a constant: a bias of the layer that
ends block k-1 (:mod:`.peft_alone`, :mod:`.merged`), a control vector (:mod:`.control_vector`), a steering vector
(:mod:`.vllm`).
"""

"""Attach language shifts to a Hugging Face decoder, and read its residual stream at block boundaries."""

"""The folder of a run: adapter, shift, card, checkpoints, and how it is written and read."""

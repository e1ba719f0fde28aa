"""The losses of a step but the contrastive one, and what is logged of them."""

"""What training reads: instructions, translation pairs, and the batches that are made of them."""

"""How weights are held and what they take: quantisation, checkpointing, sharding, and a step's plan."""

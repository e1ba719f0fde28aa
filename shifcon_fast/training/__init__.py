"""QLoRA fine-tuning with the ShifCon objective."""

"""What a LoRA adapter changes in a base, and the arithmetic of changing it, block by block."""

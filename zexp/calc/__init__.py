"""What a model costs: sums of what the blocks' specs say. No torch."""

"""Questions about images: sources, prompts, batches, answers and their official scores."""

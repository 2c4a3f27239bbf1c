"""Images: where they come from, how they are made to fit, and how they reach training."""

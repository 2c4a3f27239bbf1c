"""The networks, what they minimise, and one step of their training."""

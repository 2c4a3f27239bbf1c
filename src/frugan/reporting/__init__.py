"""What a person sees of a training: its folder, the console, pictures, the page."""

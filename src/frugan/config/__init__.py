"""What can be asked for, as frozen dataclasses that are checked when built. No torch here."""

"""What every room uses and that knows nothing of any: errors, whole files, random streams, devices, units."""

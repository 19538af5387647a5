"""The order of the steps, for a site and for a coordinator, and nothing else."""

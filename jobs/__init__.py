"""What a node runs: one file per stage."""

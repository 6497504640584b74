"""What adapters do to single weights, whatever kind of adapter says so."""

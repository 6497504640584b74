"""Second evaluations of what adapters do to weights, of other formulas than `algebra`."""

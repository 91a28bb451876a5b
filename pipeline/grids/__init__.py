"""Training grids: model atmospheres with their line profiles, one store schema for every maker."""

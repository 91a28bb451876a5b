"""Everything of FlareField that touches files, clusters and people."""

"""The networks of FlareField: spectral lines to posterior atmospheres, in torch and nothing else."""

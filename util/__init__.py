"""The library of the scripts and engines: one package per subject."""

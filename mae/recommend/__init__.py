"""A recipe for a dataset, a machine and a time: rules, a trial run, and the file."""

"""tensorflow-datasets builders, one folder a dataset."""

"""Datasets on disk to batches of NumPy arrays. Nothing here imports TensorFlow."""

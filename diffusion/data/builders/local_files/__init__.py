"""Data sets from files that the user has: a publisher's own, or a folder of images."""

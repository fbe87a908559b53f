"""Real handwritten digits, composed into captioned colour pictures: the data of the default job."""

"""Speed, measured alone or side by side with Diffusers: see `__main__.py`."""

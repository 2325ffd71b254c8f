"""Documents in, clean packed rows out. Nothing here knows about noise."""

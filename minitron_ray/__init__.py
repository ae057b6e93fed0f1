"""minitron-ray: make a small language model out of a big one, from one YAML file."""

__version__ = "0.1.0"

"""`python -m minitron_ray`."""

from minitron_ray.cli import main

main()

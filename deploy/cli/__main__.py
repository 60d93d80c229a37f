"""``python -m mara.deploy.cli``."""

from mara.deploy.cli import main

main()

"""`python -m tuning.demo`."""

from tuning.demo.make import main

main()

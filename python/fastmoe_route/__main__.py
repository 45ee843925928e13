"""`python -m fastmoe_route`."""

from fastmoe_route.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

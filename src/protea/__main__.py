"""``python -m protea`` is ``protea``."""

from protea.cli import main

if __name__ == "__main__":
    main()

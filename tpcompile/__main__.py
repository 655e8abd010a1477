"""``python -m tpcompile`` is the command ``tpcompile``."""

from tpcompile.cli import main

if __name__ == "__main__":
    main()

"""``python -m nemo_pvs.cli``: the command where no script is installed, as under torchrun."""

from __future__ import annotations

from nemo_pvs.cli.main import main

if __name__ == "__main__":
    main()
